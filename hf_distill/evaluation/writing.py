"""Generate the targets of an encoder-decoder, and compare them with the references."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hf_distill.errors import InputError
from hf_distill.evaluation.generation_metrics import Bleu, ChrF, Rouge
from hf_distill.evaluation.pair import Outputs
from hf_distill.evaluation.predictions import Predictions
from hf_distill.evaluation.task_measures import Measure
from hf_distill.losses.targets import IGNORE
from hf_distill.models.generation import Generator


class Texts(Measure):
    """The generated text and the reference text of each row.

    model: an encoder-decoder, in eval mode
    settings: keywords of `generate`, which override the model's generation config. A sampled text
        (`do_sample`) depends on its source only
    references: a text for each row, or a list of equally good ones; by default the decoded labels,
        without special tokens
    """

    widths_differ: ClassVar[frozenset[str]] = frozenset({"written", "labels"})

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: Mapping[str, Any],
        references: Sequence[str | Sequence[str]] | None,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__()
        pad = tokenizer.pad_token_id
        pad = tokenizer.eos_token_id if pad is None else pad
        self._writer = Generator(model, settings, pad_token_id=pad or 0, autocast=autocast)
        self._tokenizer, self._references = tokenizer, references

    def columns(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `Measure.columns`: ids, (rows, positions)."""
        ids, mask = outputs.batch["input_ids"], outputs.batch.get("attention_mask")
        seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        sources = [row[here].tolist() for row, here in zip(ids, seen, strict=True)]
        seeds = [[zlib.crc32(str(source).encode())] for source in sources]
        found = self._writer.texts(sources, seeds)
        written = [torch.tensor(ids, dtype=torch.long) for ids, _ in found]
        padded = pad_sequence(written, batch_first=True, padding_value=IGNORE)
        return {"written": padded.to(ids.device), "labels": outputs.labels}

    def texts(self) -> list[str]:
        """What was written for each row."""
        return self._decoded("written")

    def references(self) -> list[list[str]]:
        """The accepted texts of each row, none where it has no target."""
        if self._references is None:
            return [[text] if text else [] for text in self._decoded("labels")]
        if len(self._references) != len(self.rows["written"]):
            raise InputError(
                f"there are {len(self._references)} references for {len(self.rows['written'])} "
                "rows: give one for each row"
            )
        return [[one] if isinstance(one, str) else list(one) for one in self._references]

    def figures(self) -> dict[str, float]:
        """See `Measure.figures`: ROUGE, BLEU and chrF, of rows that have a reference."""
        pairs = [pair for pair in zip(self.texts(), self.references(), strict=True) if pair[1]]
        if not pairs:
            raise InputError("no evaluation row has a target text to compare with")
        said, true = ([pair[side] for pair in pairs] for side in (0, 1))
        found: dict[str, float] = {}
        for metric in (Rouge(), Bleu(), ChrF()):
            found |= metric.compute(predictions=said, references=true)
        return found

    def predictions(self) -> Predictions:
        """See `Measure.predictions`; the score is the chrF of the row, 0 to 1."""
        from sacrebleu.metrics import CHRF

        said, true = self.texts(), self.references()
        scorer = CHRF()
        scores = [
            scorer.sentence_score(text, texts).score / 100 if texts else math.nan
            for text, texts in zip(said, true, strict=True)
        ]
        return Predictions(said, [" / ".join(texts) for texts in true], scores)

    def _decoded(self, name: str) -> list[str]:
        ids = [[token for token in row if token != IGNORE] for row in self.rows[name]]
        return self._tokenizer.batch_decode(ids, skip_special_tokens=True)
