"""`evaluate_student` against figures worked out row by row in float64, without padding."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from distributed import launch
from evaluation_setup import PROMPTED, ROWS, WORDS, collate, collate_left, pair, tokenizer
from peft import LoraConfig, get_peft_model
from torch import nn
from trainer_setup import small_model

from hf_distill import DistillationTrainer, evaluate_written
from hf_distill.errors import InputError
from hf_distill.evaluation import continuations, evaluate_models, evaluate_student
from hf_distill.teachers import LiveTeacher

# peft 0.21 asks for a property that transformers 5.23 has renamed.
PEFT_LAGS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

QUALITY = {
    "perplexity", "ce", "bits_per_byte", "kl_to_teacher", "top1_agreement", "calibration_error",
    "targets",
}  # fmt: skip


def evaluate(student: Any, teacher: Any, rows: Any = ROWS, **options: Any) -> dict[str, float]:
    options = {"data_collator": collate, "speed": False} | options
    found = evaluate_student(student, teacher, rows, tokenizer(), **options)
    return {name: value for name, value in found.items() if name in QUALITY}


@torch.no_grad()
def oracle(student: Any, teacher: Any, shared: int) -> dict[str, float]:
    """One row at a time, in float64 and probabilities."""
    student, teacher = (copy.deepcopy(model).double().eval() for model in (student, teacher))
    surprises, divergences, agreed, bins, text = [], [], [], [[] for _ in range(15)], 0
    for row in ROWS:
        ids, labels = torch.tensor(row["input_ids"]), row["labels"]
        q, p = (model(ids[None]).logits[0].softmax(-1) for model in (student, teacher))
        spelt = [label for label in labels[1:] if label != -100]
        text += len(" ".join(WORDS[label] for label in spelt))
        first = next(place for place, label in enumerate(labels[1:]) if label != -100)
        text += row["input_ids"][first] > 1  # the space after a word, not after a special token
        for place, label in enumerate(labels[1:]):
            if label == -100:
                continue
            surprises.append(1 / q[place, label].item())
            best = int(q[place].argmax())
            confidence = q[place, best].item()
            bins[math.ceil(15 * confidence) - 1].append((confidence, best == label))
            ours, theirs = (x[place, :shared] / x[place, :shared].sum() for x in (q, p))
            divergences.append(math.fsum(theirs * (theirs / ours).log()))
            agreed.append(int(ours.argmax()) == int(theirs.argmax()))
    number = len(surprises)
    return {
        "targets": number,
        "perplexity": math.prod(surprise ** (1 / number) for surprise in surprises),
        "ce": math.fsum(map(math.log, surprises)) / number,
        "bits_per_byte": math.fsum(map(math.log2, surprises)) / text,
        "kl_to_teacher": math.fsum(divergences) / number,
        "top1_agreement": sum(agreed) / number,
        "calibration_error": sum(abs(sum(c - k for c, k in found)) for found in bins) / number,
    }


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("collator", [collate, collate_left])
def test_quality_equals_the_oracle(architecture: str, collator: Any) -> None:
    student, teacher = pair(architecture)
    expected = oracle(student, teacher, 40)
    found = evaluate(student, teacher, data_collator=collator, batch_size=5)
    assert found == pytest.approx(expected, rel=2e-5)
    assert found.keys() == QUALITY
    assert found["kl_to_teacher"] > 0.005


def test_padded_heads_compare_the_shared_tokens_only() -> None:
    student, teacher = small_model(3, vocab_size=48), small_model(4, layers=2, vocab_size=44)
    assert evaluate(student, teacher) == pytest.approx(oracle(student, teacher, 40), rel=2e-5)
    found = evaluate(student, teacher, shared_vocabulary=12)
    assert found == pytest.approx(oracle(student, teacher, 12), rel=2e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 13, 64])
def test_batch_size_does_not_matter(batch_size: int) -> None:
    student, teacher = pair()
    found = evaluate(student, teacher, batch_size=batch_size)
    assert found == pytest.approx(evaluate(student, teacher, batch_size=3), rel=1e-6)


def test_the_default_collator() -> None:
    student, teacher = pair()
    rows = Dataset.from_list([{**row, "text": "left out"} for row in ROWS])
    assert evaluate(student, teacher, rows, data_collator=None) == pytest.approx(
        evaluate(student, teacher), rel=1e-6
    )


def test_packed_rows_are_read_as_packed() -> None:
    student, teacher = pair("llama")
    whole = [row for row in ROWS if -100 not in row["labels"]]
    ids = [token for row in whole for token in row["input_ids"]]
    # The first token of each document is not to be predicted from the document before.
    labels = [label for row in whole for label in [-100, *row["labels"][1:]]]
    positions = [place for row in whole for place in range(len(row["input_ids"]))]
    packed = [{"input_ids": ids, "labels": labels, "position_ids": positions}]
    apart = evaluate(student, teacher, whole)
    found = evaluate(student, teacher, packed, data_collator=None)
    assert found["kl_to_teacher"] == pytest.approx(apart["kl_to_teacher"], rel=1e-4)
    assert found["ce"] == pytest.approx(apart["ce"], rel=1e-4)


def test_the_trainer_finds_the_same(tmp_path: Path) -> None:
    from trainer_setup import arguments

    student, teacher = pair()
    found = evaluate(student, teacher)
    trainer = DistillationTrainer(
        student,
        teacher,
        arguments(tmp_path),
        eval_dataset=ROWS,
        data_collator=collate,
        processing_class=tokenizer(),
    )
    metrics = trainer.evaluate()
    for ours, theirs in (
        ("ce", "eval_ce"),
        ("kl_to_teacher", "eval_forward_kl"),
        ("top1_agreement", "eval_top1_agreement"),
    ):
        assert found[ours] == pytest.approx(metrics[theirs], rel=1e-5)


def test_a_model_against_itself_and_against_nobody() -> None:
    student, teacher = pair()
    itself = evaluate(teacher, teacher)
    assert (itself["kl_to_teacher"], itself["top1_agreement"]) == (0.0, 1.0)
    alone = evaluate(student, None)
    assert alone.keys() == QUALITY - {"kl_to_teacher", "top1_agreement"}
    both = evaluate(student, teacher)
    assert alone == {name: both[name] for name in alone}


@PEFT_LAGS
def test_an_adapted_student_with_left_padding() -> None:
    student, teacher = pair()
    adapted = get_peft_model(
        small_model(3), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )  # its B is zero: the same function
    found = evaluate(adapted, teacher, data_collator=collate_left)
    assert found == pytest.approx(evaluate(student, teacher), rel=1e-6)


def test_models_are_handed_back_as_they_were() -> None:
    student, teacher = small_model(3, resid_pdrop=0.5), small_model(4, layers=2)
    student.train()
    student.transformer.h[0].attn.eval()
    teacher.train()
    teacher.lm_head.weight.requires_grad_(False)

    def state(model: nn.Module) -> list[bool]:
        flags = [parameter.requires_grad for parameter in model.parameters()]
        return flags + [module.training for module in model.modules()]

    before = state(student), state(teacher)
    first = evaluate(student, teacher)
    assert (state(student), state(teacher)) == before
    assert evaluate(student, teacher) == first  # no dropout meanwhile
    continuations({"student": student}, [[2, 3]], tokenizer(), max_new_tokens=1)
    assert state(student) == before[0]
    with pytest.raises(InputError, match="no evaluation rows"):
        evaluate(student, teacher, [])
    assert (state(student), state(teacher)) == before


def test_cost_comes_with_quality_unless_unwanted() -> None:
    student, teacher = pair()
    found = evaluate_student(student, teacher, ROWS, tokenizer(), data_collator=collate)
    size = {"parameters", "size_mb"}
    rates = ("prefill_tokens_per_s", "decode_tokens_per_s")
    speed = {*rates, *(f"{rate}_spread" for rate in rates), "peak_memory_mb"}
    assert found.keys() == QUALITY | size | speed
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert json.loads(json.dumps(found)) == found
    found = evaluate_student(student, None, ROWS, tokenizer(), data_collator=collate, speed=False)
    assert not found.keys() & speed


def test_half_precision_is_judged_in_float32() -> None:
    student, teacher = pair()
    exact = evaluate(student, teacher)
    found = evaluate(student.to(torch.bfloat16), teacher.to(torch.bfloat16))
    assert found["ce"] == pytest.approx(exact["ce"], rel=0.02)
    # A sum or softmax in bfloat16 would be a multiple of a power of two.
    assert float(torch.tensor(found["ce"]).bfloat16()) != found["ce"]


@pytest.mark.parametrize("processes", [2])
def test_processes_do_not_matter(processes: int, tmp_path: Path) -> None:
    launch("evaluation_worker.py", str(tmp_path / "out"), processes=processes)
    found = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(processes)]
    assert found[0] == found[1]
    assert found[0]["error"] == "measured"
    assert found[0]["3"]["decode_tokens_per_s"] > 0
    for rows in (13, 3):
        alone = evaluate(*pair(), ROWS[:rows], batch_size=4)
        together = {name: found[0][str(rows)][name] for name in QUALITY}
        assert together == pytest.approx(alone, rel=1e-6)
    student, teacher = pair()
    for name, of_set in (("whole", ROWS), ("part", ROWS[:5])):
        for role, model in (("teacher", teacher), ("student", student)):
            alone = evaluate(model, teacher, of_set, batch_size=4)
            assert found[0]["sets"][name][role] == pytest.approx(alone, rel=1e-6)
    for rows in (13, 3):
        alone = evaluate_written(student, teacher, PROMPTED[:rows], tokenizer(), batch_size=4)
        figures, texts = found[0][f"written {rows}"]
        assert figures == pytest.approx(alone, rel=1e-5)
        assert alone.predictions is not None
        assert texts == alone.predictions.texts


class CountedTeacher(LiveTeacher):
    """A teacher that counts its forwards."""

    asked = 0

    def signal(self, *args: Any) -> Any:
        self.asked += 1
        return super().signal(*args)


@pytest.mark.parametrize("with_itself", [False, True])
def test_one_teacher_is_asked_once_for_several_models(with_itself: bool) -> None:
    student, model = pair()
    other = small_model(9)
    teacher = CountedTeacher(model, tokenizer())
    models = {"teacher": model} if with_itself else {}
    models |= {"student": student, "other": other}
    quality, costs = evaluate_models(
        models, teacher, {"whole": ROWS, "part": ROWS[:5]}, tokenizer(),
        data_collator=collate, batch_size=4, speed=False,
    )  # fmt: skip
    assert teacher.asked == (0 if with_itself else 4 + 2)  # batches
    assert list(costs) == list(models)
    for name, rows in (("whole", ROWS), ("part", ROWS[:5])):
        assert list(quality[name]) == list(models)
        for role, one in models.items():
            alone = evaluate(one, model, rows, batch_size=4)
            assert quality[name][role] == pytest.approx(alone, rel=1e-6)


def with_row(place: int, **changes: Any) -> list[dict[str, Any]]:
    rows = [dict(row) for row in ROWS]
    rows[place] |= changes
    return rows


def test_ids_that_a_model_lacks() -> None:
    student, teacher = pair()
    padded_beyond = small_model(3)  # its tokenizer has a <pad> that it never learned

    def pad_beyond(rows: list[Any]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, 40)
        return batch

    expected = evaluate(student, teacher)
    found = evaluate(padded_beyond, teacher, data_collator=pad_beyond)
    assert found == pytest.approx(expected, rel=1e-6)
    larger = small_model(3, vocab_size=41)
    assert evaluate(larger, teacher, data_collator=pad_beyond)["targets"] == expected["targets"]
    rows = with_row(2, input_ids=[2, 40, 3], labels=[2, 3, 3])
    with pytest.raises(InputError, match=r"reads ids up to 39, but .* id 40"):
        evaluate(student, teacher, rows)
    with pytest.raises(InputError, match=r"teacher .* reads ids up to 39, but .* id 40"):
        evaluate(larger, teacher, rows)
    with pytest.raises(InputError, match="label is the token id 40"):
        evaluate(student, teacher, with_row(2, input_ids=[2, 3, 4], labels=[2, 40, 3]))


def test_different_tokenizers_are_refused(tmp_path: Path) -> None:
    student, teacher = pair()
    teacher.save_pretrained(tmp_path)
    tokenizer([*WORDS[:7], "other", *WORDS[8:]]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="id 7 is 'ababab7' for the student and 'other'"):
        evaluate(student, str(tmp_path))
    tokenizer().save_pretrained(tmp_path)
    assert evaluate(student, str(tmp_path)) == evaluate(student, teacher)


def test_rows_without_anything_to_predict() -> None:
    student, teacher = pair()
    nothing = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS]
    with pytest.raises(InputError, match="no target"):
        evaluate(student, teacher, nothing)
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(InputError, match="IterableDataset, which cannot be counted"):
        evaluate(student, teacher, stream)
    with pytest.raises(InputError, match="no labels, only input_ids, attention_mask"):
        evaluate(
            student,
            teacher,
            data_collator=lambda rows: {k: v for k, v in collate(rows).items() if k != "labels"},
        )


def test_a_loss_that_is_not_finite_names_the_row() -> None:
    student, teacher = pair()
    rows = with_row(9, input_ids=[2, 39, 3], labels=[2, 39, 3])
    rows = [r for i, r in enumerate(rows) if i == 9 or 39 not in r["input_ids"]]
    place = next(i for i, r in enumerate(rows) if r["input_ids"] == [2, 39, 3])
    for broken, what in ((student, "model's loss is nan"), (teacher, "KL to the teacher is nan")):
        kept = broken.transformer.wte.weight.detach().clone()
        head = nn.Linear(16, 40, bias=False)
        head.weight = nn.Parameter(kept.clone())
        broken.lm_head = head  # no longer tied: only inputs of 39 break
        with torch.no_grad():
            broken.transformer.wte.weight[39] = float("nan")
        with pytest.raises(InputError, match=f"the {what} in evaluation row {place}:"):
            evaluate(student, teacher, rows, batch_size=2)
        with torch.no_grad():
            broken.transformer.wte.weight.copy_(kept)


def test_continuations_are_what_each_model_finds_most_likely() -> None:
    student, teacher = pair()
    prompts = [[2, 3, 4], [9]]
    table = continuations({"teacher": teacher, "student": student}, prompts, tokenizer(),
                          max_new_tokens=4)  # fmt: skip
    assert [list(row) for row in table] == [["prompt", "teacher", "student"]] * 2
    for row, prompt in zip(table, prompts, strict=True):
        assert row["prompt"] == " ".join(WORDS[i] for i in prompt)
        for name, model in (("teacher", teacher), ("student", student)):
            ids = list(prompt)
            for _ in range(4):  # without a cache
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            assert 0 not in ids  # else the text would end there
            assert row[name] == " ".join(WORDS[i] for i in ids[len(prompt) :] if i > 1)


def test_continuations_stay_within_the_positions() -> None:
    student, _ = pair()
    (row,) = continuations({"student": student}, [[2] * 30], tokenizer(), max_new_tokens=9)
    assert len(row["student"].split()) <= 2
    with pytest.raises(InputError, match="prompt has 32 tokens, but the student has only 32"):
        continuations({"student": student}, [[2] * 32], tokenizer())
