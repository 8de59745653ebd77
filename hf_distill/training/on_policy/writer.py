"""`OnPolicy`: replaces rows of an optimizer step by the student's own text.

Before the targets of an optimizer step are counted, a share of its rows is replaced: the prompt is
kept, and the student generates the completion. Counting, the objective and the fused head then get
ordinary batches. The student's own text has no cross-entropy (`ce_weight` 0).

The selected rows and the sampled tokens depend on seed, step and prompt only, not on batch size,
accumulation, the number of processes or an interruption. Source: GKD, arXiv:2306.13649.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate.utils import gather_object
from torch import Tensor

from hf_distill.data import TEACHER_PROMPT_IDS
from hf_distill.errors import InputError, warn_once
from hf_distill.recordings.collator import ALL_NAMES
from hf_distill.tasks import TARGET_INDEX, Seq2SeqLM
from hf_distill.training.on_policy.arguments import without_effect
from hf_distill.training.on_policy.backends import Backend, Prompt, make_backend
from hf_distill.training.on_policy.checks import check
from hf_distill.training.on_policy.judgement import judgement
from hf_distill.training.on_policy.kept_rows import KeptTexts, decoded
from hf_distill.training.on_policy.rows import Row, batch_of, read_rows
from hf_distill.training.on_policy.share import share_now
from hf_distill.training.on_policy.texts import Stopwatch, Text, TextSums, Troubles
from hf_distill.training.on_policy.written import (
    DATA_TARGETS,
    OWN_TARGETS,
    WRITTEN,
    Written,
    own_divergence,
    own_draws,
)
from hf_distill.training.target_index import TargetIndex


class OnPolicy:
    """Replaces rows of a step by the student's own text.

    trainer: a `DistillationTrainer`
    seconds: the time spent in parts of a step
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seconds = Stopwatch(trainer.args.device)
        self._state: Any = None  # of the training that the following belongs to
        self._texts = TextSums()  # since the last log, of all processes
        self._troubles = Troubles()
        self._kept: KeptTexts | None = None
        self._made: Backend | None = None
        self._teacher_prompts = False
        if idle := without_effect(vars(trainer.args)):
            warn_once(
                "on_policy is 0, so that the student generates no rows and %s %s no effect.",
                ", ".join(idle),
                "have" if len(idle) > 1 else "has",
            )

    def write(self, batches: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Replace rows in the micro-batches of one optimizer step, in place.

        returns: the counts of the step as it is now; {} where no row is ever replaced
        raises: InputError for rows or a trainer for which this is not possible
        """
        args = self.trainer.args
        if not self.wanted or not batches:
            return {}
        self._teacher_prompts = TEACHER_PROMPT_IDS in batches[0]
        check(self.trainer, batches[0])
        if self.trainer.state is not self._state:  # another training, or a resumed one
            self._state, self._texts = self.trainer.state, TextSums()
            self._troubles, self._kept = Troubles(), None
        rows = [
            read_rows(batch, encoder_decoder=self.encoder_decoder, prompt_tokens=args.prompt_tokens)
            for batch in batches
        ]
        share = share_now(args, self.trainer.state)
        chosen = [
            row for of_batch in rows for row in of_batch if self._number(row, "choose") < share
        ]
        kept = self._kept_texts()
        with self.seconds("writing"):
            texts = self._write([row for row in chosen if not self._repeat(row, kept)])
        self._note(texts, kept)
        for batch, of_batch in zip(batches, rows, strict=True):
            self._replace(batch, of_batch)
        counts = self.trainer._get_num_items_in_batch(batches, args.device)
        return {**counts, **(self._counts(batches) if self.apart else {})}

    def _counts(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The targets of the student's own text and of data rows with a weight in the divergence.

        Over the micro-batches of a step and all processes, at least one each.
        """
        trainer, sums = self.trainer, torch.zeros(2, dtype=torch.int64)
        sums = sums.to(trainer.args.device)
        for batch in batches:
            of_rows = trainer._loss.task.counts(batch)[:, -1]  # "divergence_targets"
            own = batch[WRITTEN].rows
            sums += torch.stack([(of_rows * own).sum(), (of_rows * ~own).sum()])
        if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
            sums = trainer.accelerator.reduce(sums, "sum")
        own_targets, data_targets = sums.clamp(min=1)
        return {OWN_TARGETS: own_targets, DATA_TARGETS: data_targets}

    def pop_figures(self) -> dict[str, float]:
        """What was written since the last call on all processes, for the log.

        The seconds are those of this process.
        """
        texts, self._texts = self._texts, TextSums()
        found = texts.figures()
        seconds = self.seconds.pop()
        if not found:
            return {}
        judging = seconds.get("judging", 0.0)
        self._sample(texts.newest[-1])
        if not self._teacher_prompts:  # the texts do not contain the teacher's prompts
            found |= judgement(self.trainer, texts.newest, self.pad_token_id)
        return found | {
            "writing_seconds": seconds.get("writing", 0.0),
            "judging_seconds": judging,
            "learning_seconds": seconds.get("step", 0.0) - judging,
        }

    def _sample(self, text: Text) -> None:
        """Put a text into the trainer's log history, every `sample_steps` steps."""
        every, state = self.trainer.args.sample_steps, self.trainer.state
        sampled = [entry["step"] for entry in state.log_history if "written_text" in entry]
        tokenizer = self.trainer.processing_class
        if not every or state.global_step // every == max(sampled, default=0) // every:
            return
        state.log_history.append(
            {
                "step": state.global_step,
                "epoch": state.epoch,
                "written_prompt": decoded(tokenizer, text.prompt),
                "written_text": decoded(tokenizer, text.completion),
            }
        )

    def timed(self, name: str) -> AbstractContextManager[None]:
        """A context that adds its time to a figure of the log."""
        return self.seconds(name) if self.wanted else nullcontext()

    def judging(self) -> AbstractContextManager[None]:
        """A context around the teacher's forward, timed in training steps."""
        return self.timed("judging") if self.trainer.model.training else nullcontext()

    # ---- Which rows ----

    @property
    def wanted(self) -> bool:
        """Whether the student may write in some step."""
        return bool(self.trainer.args.on_policy or self.trainer.args.on_policy_raise)

    def _number(self, row: Row, purpose: str) -> float:
        """A number from 0 to below 1 that follows from seed, step and prompt."""
        return self._hash(row, purpose) / 2**63

    def _hash(self, row: Row, purpose: str) -> int:
        """The same as an integer below 2**63."""
        args, step = self.trainer.args, self.trainer.state.global_step
        text = f"{purpose} {args.seed} {step} ".encode()
        return xxhash.xxh3_64_intdigest(text + np.asarray(row.prompt, "<i4").tobytes()) >> 1

    @property
    def encoder_decoder(self) -> bool:
        """Whether the student reads a source and writes a target."""
        return isinstance(self.trainer._loss.task, Seq2SeqLM)

    @property
    def apart(self) -> bool:
        """Whether generated rows and data rows have different signals or divergences."""
        named = self.trainer.args.on_policy_divergence or self.trainer.args.teacher_mix
        return self.trainer._recorded is not None or bool(named) or self._teacher_prompts

    @property
    def pad_token_id(self) -> int:
        """A token that every model has; what it pads is masked."""
        tokenizer = self.trainer.processing_class
        known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((token for token in known if token is not None), 0)

    # ---- Writing ----

    def _write(self, rows: list[Row]) -> list[Text]:
        """Let the student write for these rows; returns the texts of all processes, sorted."""
        step, texts = self.trainer.state.global_step + 1, []
        prompts = [Prompt(row.prompt, self._room(row), self._hash(row, "draw")) for row in rows]
        for row, text in zip(rows, self._backend().write(prompts), strict=True):
            row.completion = text.ids
            texts.append(Text(step, tuple(row.prompt), tuple(text.ids), text.finished))
        return sorted(gather_object(texts))

    def _backend(self) -> Backend:
        """The backend, made at the first step."""
        if self._made is None:
            self._made = make_backend(self.trainer, self.pad_token_id)
        return self._made

    def _room(self, row: Row) -> int:
        """How many tokens can be written after a row's prompt, and its teacher's."""
        most: int = self.trainer.args.max_new_tokens
        theirs = row.prompt if row.teacher_prompt is None else row.teacher_prompt
        runner = getattr(self.trainer.teacher, "runner", None)
        for role, prompt, limit in (
            ("student", row.prompt, self.trainer._loss.student.longest_text),
            ("teacher", theirs, getattr(runner, "longest_text", None)),
        ):
            if limit is None or self.encoder_decoder:
                continue
            if len(prompt) >= limit:
                raise InputError(
                    f"a prompt has {len(prompt)} tokens, but the {role} has {limit} positions, "
                    "which leaves none for a completion: shorten the prompts"
                )
            most = min(most, limit - len(prompt))
        return most

    # ---- Texts of earlier steps ----

    def _kept_texts(self) -> KeptTexts | None:
        """The texts of this training so far; None where they are not kept."""
        args = self.trainer.args
        if self._kept is None and (args.keep_rows or args.replay):
            folder, kind = str(args.output_dir), self.encoder_decoder
            self._kept = KeptTexts(folder, encoder_decoder=kind)
            step, accelerator = self.trainer.state.global_step, self.trainer.accelerator
            self._kept.resume(step, accelerator, repeated=bool(args.replay))
        return self._kept

    def _repeat(self, row: Row, kept: KeptTexts | None) -> bool:
        """Make a row one of an earlier step, for a share of the rows; whether it was done."""
        if kept is None or self._number(row, "replay") >= self.trainer.args.replay:
            return False
        step = self.trainer.state.global_step + 1
        earlier = kept.earlier(self._number(row, "which"), step)
        if earlier is not None:
            row.prompt, row.completion = list(earlier.prompt), list(earlier.completion)
        return earlier is not None

    def _note(self, texts: list[Text], kept: KeptTexts | None) -> None:
        """Note the new texts of a step, of all processes."""
        figures, trainer = self._texts.add(texts), self.trainer
        if kept is not None:
            main, repeated = trainer.is_world_process_zero(), bool(trainer.args.replay)
            kept.add(texts, trainer.processing_class, main=main, repeated=repeated)
        for message in self._troubles.found(figures, trainer.args.max_new_tokens):
            warn_once(message)

    # ---- Batches ----

    def _replace(self, batch: dict[str, Any], rows: list[Row]) -> None:
        """Give a batch its written rows, and the weights that all batches of the step have."""
        batch.pop(TEACHER_PROMPT_IDS, None)
        device, weight = batch["input_ids"].device, batch.get("ce_weight")
        weights = [1.0] * len(rows) if weight is None else weight.tolist()
        weights = [0.0 if row.written else one for row, one in zip(rows, weights, strict=True)]
        batch["ce_weight"] = torch.tensor(weights, dtype=torch.float32, device=device)
        if not self.apart and not any(row.written for row in rows):
            return
        made: dict[str, Any] = batch_of(
            rows, self.pad_token_id, encoder_decoder=self.encoder_decoder
        )
        index = self.trainer._checks.check(made)  # on the CPU, as in the collator
        moved = {name: tensor.to(device) for name, tensor in made.items()}
        for name in ("decoder_input_ids", "decoder_attention_mask"):
            batch.pop(name, None)
        batch |= moved | {TARGET_INDEX: TargetIndex(index.to(device))}
        if self.apart:
            batch[WRITTEN] = self._written(rows, made, index, device)

    def _written(
        self, rows: list[Row], made: Mapping[str, Tensor], index: Tensor, device: Any
    ) -> Written:
        """The targets of generated rows and of data rows. All indices are made on the CPU."""
        own_rows = torch.tensor([row.written for row in rows])
        own = own_rows[torch.div(index, made["labels"].shape[1], rounding_mode="floor")]
        asked = asked_index = None
        # Of the batch, since the recordings may be those of the evaluation set alone.
        if any(row.recorded for row in rows):
            asked, asked_index = self._asked([row for row in rows if row.written] or rows[:1])
            if not own_rows.any():
                asked_index = asked_index[:0]
        elif self._teacher_prompts:
            asked, asked_index = self._asked(
                [row.for_teacher(self.encoder_decoder) for row in rows]
            )
        return Written(
            own_rows.to(device),
            own.nonzero()[:, 0].to(device),
            (~own).nonzero()[:, 0].to(device),
            None if asked is None else {name: part.to(device) for name, part in asked.items()},
            None if asked_index is None else asked_index.to(device),
            own_divergence(self.trainer.args),
            own_draws(self.trainer.args),
        )

    def _asked(self, rows: list[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """A batch for the live teacher, without recordings, and its target index."""
        made = batch_of(rows, self.pad_token_id, encoder_decoder=self.encoder_decoder)
        made = {name: part for name, part in made.items() if name not in ALL_NAMES}
        return made, self.trainer._loss.task.target_index(made)
