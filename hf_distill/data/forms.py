"""The column names under which public data sets hold rows, and how they become ours.

Three formats are trained on: `text`, `prompt` + `completion`, and `messages`. The other forms are
converted to one of these.
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
    """One way to hold rows.

    columns: must all be there; optional: are read if they are
    format: what the rows become; mapping: what becomes of what, for people
    convert: columns of a batch to the columns of the format; None where nothing is to be done
    """

    columns: tuple[str, ...]
    format: Format
    mapping: str = ""
    optional: tuple[str, ...] = ()
    convert: Callable[[Mapping[str, Sequence[Any]]], Columns] | None = None

    def present(self, names: Sequence[str]) -> list[str]:
        """The columns of this form among the given names."""
        return [name for name in (*self.columns, *self.optional) if name in names]


def _alpaca(batch: Mapping[str, Sequence[Any]]) -> Columns:
    further = batch.get("input") or [None] * len(batch["instruction"])
    pairs = zip(batch["instruction"], further, strict=True)
    prompts = [f"{first or ''}\n\n{more}" if more else first or "" for first, more in pairs]
    return {"prompt": prompts, "completion": list(batch["output"])}


def _renamed(prompt: str, completion: str) -> Callable[[Mapping[str, Sequence[Any]]], Columns]:
    def convert(batch: Mapping[str, Sequence[Any]]) -> Columns:
        return {"prompt": list(batch[prompt]), "completion": list(batch[completion])}

    return convert


def _sharegpt(batch: Mapping[str, Sequence[Any]]) -> Columns:
    return {"messages": [[_message(turn) for turn in turns] for turns in batch["conversations"]]}


def _message(turn: Mapping[str, Any]) -> dict[str, str]:
    speaker = str(turn.get("from"))
    if speaker not in SPEAKERS:
        raise InputError(
            f"a turn of 'conversations' is from {speaker!r}, but must be from one of "
            f"{', '.join(SPEAKERS)}: rename the speaker, or leave out such rows"
        )
    return {"role": SPEAKERS[speaker], "content": turn.get("value") or ""}


FORMS = (
    Form(("messages",), "chat"),
    Form(("conversations",), "chat", "conversations (from, value) -> messages", (), _sharegpt),
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
        _renamed("question", "answer"),
    ),
    Form(
        ("query", "response"),
        "prompt_completion",
        "query -> prompt, response -> completion",
        (),
        _renamed("query", "response"),
    ),
    Form(("text",), "text"),
)


def find_form(names: Sequence[str]) -> Form | None:
    """The first form whose columns are all among the names."""
    return next((form for form in FORMS if set(form.columns) <= set(names)), None)


def known_forms() -> str:
    """The columns of all forms, for messages."""
    return ", ".join(" + ".join(form.columns) for form in FORMS)


def is_conversation(value: Any) -> bool:
    """Whether a cell holds messages, a list of {role, content}."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
    )


def joined_messages(batch: Mapping[str, Sequence[Any]]) -> Columns:
    """The messages of conversational prompts and completions, one list a row."""
    pairs = zip(batch["prompt"], batch["completion"], strict=True)
    return {"messages": [[*prompt, *completion] for prompt, completion in pairs]}
