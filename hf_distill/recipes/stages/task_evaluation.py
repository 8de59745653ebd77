"""Measure models of other tasks than causal language modelling, and show their predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from hf_distill.data.prompts import for_languages
from hf_distill.evaluation import Evaluation, evaluate_student, examples
from hf_distill.recipes.stages.models import collator_of, rows_of, text_of, tokenizer_of
from hf_distill.recipes.stages.stage import Run
from hf_distill.teachers import LiveTeacher, RememberingTeacher


@dataclass
class TaskMeasure:
    """Measures one model of a run after the other. Call it with a role and its model."""

    run: Run
    teacher: LiveTeacher
    accelerator: Accelerator
    split: str = "eval"
    measured: dict[str, Evaluation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tokenizer = tokenizer_of(self.run)
        self._rows = rows_of(self.run, self.split)
        self._texts = text_of(self.run, self.split)
        # It runs once for all of its students, whose batches are the same.
        self._remembered = RememberingTeacher(self.teacher)

    def __call__(self, role: str, model: Any) -> dict[str, float]:
        """The figures of a model, the same on every process."""
        section, task = self.run.recipe.evaluate, self.run.recipe.task
        # Processes that hold shards of one model cannot write texts of their own.
        writes = task == "seq2seq-lm" and not (role == "teacher" and self.teacher.together)
        references = self._texts["target"] if task == "seq2seq-lm" else self._texts
        self.measured[role] = evaluate_student(
            model,
            self.teacher if role == "teacher" else self._remembered,
            self._rows,
            self._tokenizer,
            references=references,
            generate=self._generation() if writes else None,
            data_collator=collator_of(self.run.recipe, self._tokenizer),
            batch_size=section.batch_size,
            accelerator=self.accelerator,
            speed=section.speed,
        )
        return dict(self.measured[role])

    def examples(self, number: int) -> list[dict[str, str]]:
        """Some held-out rows with each model's prediction, those the student gets wrong first."""
        shown = {
            role: found
            for role, found in self.measured.items()
            if role != "initial" and found.predictions is not None
        }
        prompts = None
        if self.run.recipe.task != "masked-lm":  # which shows the masks
            prompts = [_prompt(row) for row in self._texts]
        return examples(shown, self._rows, self._tokenizer, number=number, prompts=prompts)

    def _generation(self) -> dict[str, Any]:
        data, beams = self.run.recipe.data, self.run.recipe.evaluate.num_beams
        _, forced = for_languages(self._tokenizer, data.source_lang, data.target_lang)
        settings = {"num_beams": beams, "do_sample": False, **forced}
        return {**settings, "max_new_tokens": data.max_target_length}


def _prompt(row: Any) -> str:
    """What models read in a row of text."""
    if "context" in row:
        return f"{row['question']}\n\n{row['context']}"
    if "tokens" in row:
        return " ".join(row["tokens"])
    return "\n".join(row[name] for name in ("source", "text", "pair") if name in row)
