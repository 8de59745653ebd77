"""Known column names of public data sets, and their conversion to the library's formats.

There are three formats to train on: `text`, `prompt` + `completion`, and `messages`. Prompts and
completions are text or lists of messages. The other forms are converted to one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_distill.data.config import Format
from hf_distill.errors import InputError

Columns = dict[str, list[Any]]
# Speakers of ShareGPT's conversations, by the names that its many copies use.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
    "tool": "tool",
}


@dataclass(frozen=True)
class Form:
    """A set of column names and its conversion to a format.

    columns: required; optional: read if they are present
    format: the format of the result; mapping: the conversion as text
    convert: columns of a batch to the columns of the format; None if they keep their names
    """

    columns: tuple[str, ...]
    format: Format
    mapping: str = ""
    optional: tuple[str, ...] = ()
    convert: Callable[[Columns], Columns] | None = None

    def present(self, names: Sequence[str]) -> list[str]:
        """The columns of this form among the given names."""
        return [name for name in (*self.columns, *self.optional) if name in names]

    def described(self, names: Sequence[str]) -> str:
        """The mapping of rows with the given columns, "" where nothing is converted."""
        text = self.mapping
        for name in set(self.optional) - set(names):
            text = text.replace(f" + {name}", "")
        return text

    def read(self, batch: Mapping[str, Sequence[Any]], chat: bool | None = None) -> Columns:
        """The columns of the format from a batch of this form; further columns are left out.

        chat: whether cells hold messages; None for what the format says
        A null prompt is an empty one. A null text or completion stays; null messages are an empty
        list.
        raises: InputError for cells that hold neither text nor messages
        """
        given = {name: list(batch[name]) for name in self.present(list(batch))}
        chat = self.format == "chat" if chat is None else chat
        for name, cells in given.items():
            _check_cells(name, cells, chat)
        rows = given if self.convert is None else self.convert(given)
        if chat:
            return {
                name: [[_message(turn) for turn in cell or ()] for cell in cells]
                for name, cells in rows.items()
            }
        if "prompt" in rows:
            rows["prompt"] = [prompt or "" for prompt in rows["prompt"]]
        return rows


def _alpaca(batch: Columns) -> Columns:
    further = batch.get("input") or [None] * len(batch["instruction"])
    pairs = zip(batch["instruction"], further, strict=True)
    prompts = [f"{first or ''}\n\n{more}" if more else first or "" for first, more in pairs]
    return {"prompt": prompts, "completion": batch["output"]}


def _pairs(batch: Columns) -> Columns:
    return dict(zip(("prompt", "completion"), batch.values(), strict=True))


def _sharegpt(batch: Columns) -> Columns:
    return {"messages": batch["conversations"]}


FORMS = (
    Form(("messages",), "chat"),
    Form(("conversations",), "chat", "conversations -> messages", (), _sharegpt),
    Form(("prompt", "completion"), "prompt_completion"),
    Form(
        ("instruction", "output"),
        "prompt_completion",
        "instruction + input -> prompt, output -> completion",
        ("input",),
        _alpaca,
    ),
    Form(
        ("question", "answer"),
        "prompt_completion",
        "question -> prompt, answer -> completion",
        (),
        _pairs,
    ),
    Form(
        ("query", "response"),
        "prompt_completion",
        "query -> prompt, response -> completion",
        (),
        _pairs,
    ),
    Form(("text",), "text"),
)


def find_form(names: Sequence[str], only: Format | None = None) -> Form | None:
    """The first form whose columns are all among the names.

    only: the format that it must have
    """
    fitting = (form for form in FORMS if only is None or form.format == only)
    return next((form for form in fitting if set(form.columns) <= set(names)), None)


def known_forms() -> str:
    """The columns of all forms, for messages."""
    return ", ".join(" + ".join(form.columns) for form in FORMS)


def is_list(cell: Any) -> bool:
    """Whether a cell holds a list, as conversations do."""
    return isinstance(cell, Sequence) and not isinstance(cell, str | bytes)


def has_target(row: Mapping[str, Any]) -> bool:
    """Whether a row that a form has read has a target text, which may be empty."""
    cell = next(row[name] for name in ("messages", "completion", "text") if name in row)
    return cell is not None and cell != []


def joined_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a conversational prompt and its completion, as one conversation."""
    return [*row["prompt"], *row["completion"]]


def _check_cells(name: str, cells: list[Any], chat: bool) -> None:
    for cell in cells:
        if cell is not None and not (is_list(cell) if chat else isinstance(cell, str)):
            wanted = "a list of messages" if chat else "text"
            raise InputError(
                f"column {name!r} holds {type(cell).__name__}, not {wanted}: convert the column"
            )


def _message(turn: Any) -> dict[str, Any]:
    """A message {role, content}, also from ShareGPT's {from, value}; without null fields."""
    given = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, Mapping) else {}
    if "role" in given:
        return {**given, "content": given.get("content", "")}
    speaker = given.get("from")
    if speaker is None:
        held = ", ".join(turn) if isinstance(turn, Mapping) else type(turn).__name__
        raise InputError(
            f"a message holds {held or 'nothing'}, but must have role and content, or from and "
            "value: rename its fields"
        )
    if speaker not in SPEAKERS:
        raise InputError(
            f"a message is from {speaker!r}, but must be from one of {', '.join(SPEAKERS)}: "
            "rename the speaker, or leave out such rows"
        )
    return {"role": SPEAKERS[speaker], "content": given.get("value", "")}
