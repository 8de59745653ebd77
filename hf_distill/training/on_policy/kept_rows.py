"""The texts that a student generated in a training: save them, reuse them, load them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Features, List, Value

from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE
from hf_distill.training.on_policy.texts import Text

WRITTEN_ROWS = "written_rows.jsonl"
# The newest texts, from which earlier ones are repeated.
MOST_REPEATED = 10_000
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "ce_weight": Value("float64"),
        "step": Value("int64"),
        "prompt_id": Value("string"),
        "prompt": Value("string"),
        "text": Value("string"),
        "finished": Value("bool"),
    }
)


def written_rows(output_dir: str | Path) -> Dataset:
    """Load the rows that a student generated in a training with `keep_rows`, in order of steps.

    output_dir: of the training
    returns: rows for recording and training: `input_ids`, `labels` (the completion, with its
        end-of-text token if it ended; for an encoder-decoder the whole text), `ce_weight` (0, since
        the student's own text is not a label); and for reading: `step` (the optimizer step, from
        1), `prompt_id` (equal for equal prompts), `prompt`, `text` and `finished`
    raises: InputError if no rows were kept
    """
    path = Path(output_dir) / WRITTEN_ROWS
    if not path.is_file():
        raise InputError(
            f"{str(output_dir)!r} holds no {WRITTEN_ROWS}: give the output_dir of a training with "
            "keep_rows"
        )
    return Dataset.from_list([_row(line) for line in _lines(path)], features=FEATURES)


def _row(line: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = line["prompt_ids"], line["completion_ids"]
    joined = not line["encoder_decoder"]
    return {
        "input_ids": prompt + completion if joined else prompt,
        "labels": ([IGNORE] * len(prompt) if joined else []) + completion,
        "ce_weight": 0.0,
        **{name: line[name] for name in ("step", "prompt_id", "prompt", "text", "finished")},
    }


class KeptTexts:
    """The texts of a training so far, of all processes; the same on each of them.

    folder: where the main process writes them
    encoder_decoder: whether a completion is the whole text
    """

    def __init__(self, folder: str | Path, *, encoder_decoder: bool) -> None:
        self.path = Path(folder) / WRITTEN_ROWS
        self._encoder_decoder = encoder_decoder
        self._texts: list[Text] = []

    def resume(self, step: int, accelerator: Accelerator, *, repeated: bool) -> None:
        """Resume after `step` optimizer steps; deletes later texts, also on disk.

        repeated: keep the texts in memory, for `earlier`
        """
        kept: list[Any] = [[]]
        if accelerator.is_main_process:
            lines = [line for line in _lines(self.path) if line["step"] <= step]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(".part")
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines))
            unfinished.replace(self.path)
            kept = [[_text(line) for line in lines[-MOST_REPEATED:]] if repeated else []]
        if repeated and accelerator.num_processes > 1:
            kept = broadcast_object_list(kept)
        self._texts = kept[0]

    def earlier(self, number: float, step: int) -> Text | None:
        """One of the texts before this step; None where there is none.

        number: from 0 to below 1, which decides the text
        """
        found = [text for text in self._texts if text.step < step]
        return found[int(number * len(found))] if found else None

    def add(self, texts: Iterable[Text], tokenizer: Any, *, main: bool, repeated: bool) -> None:
        """Add the texts of a step; a prompt that occurs twice in it has one text.

        tokenizer: to keep them as text too, None for ids only; main: whether to write the file
        repeated: keep them in memory, for `earlier`
        """
        new = sorted(set(texts))
        if repeated:
            self._texts = (self._texts + new)[-MOST_REPEATED:]
        if main and new:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(self._line(t, tokenizer)) + "\n" for t in new))

    def _line(self, text: Text, tokenizer: Any) -> dict[str, Any]:
        return {
            "step": text.step,
            "prompt_id": text.prompt_id,
            "prompt_ids": text.prompt,
            "completion_ids": text.completion,
            "prompt": decoded(tokenizer, text.prompt),
            "text": decoded(tokenizer, text.completion, skip_special_tokens=True),
            "finished": text.finished,
            "encoder_decoder": self._encoder_decoder,
        }


def decoded(tokenizer: Any, ids: tuple[int, ...], **options: Any) -> str:
    """Ids as text, "" without a tokenizer."""
    return tokenizer.decode(list(ids), **options) if hasattr(tokenizer, "decode") else ""


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of texts; the last one may be incomplete after an interruption."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _text(line: dict[str, Any]) -> Text:
    prompt, completion = tuple(line["prompt_ids"]), tuple(line["completion_ids"])
    return Text(line["step"], prompt, completion, line["finished"])
