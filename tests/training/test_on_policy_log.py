"""What a training tells of the text that its student writes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from on_policy_setup import make, written_rows
from trainer_setup import small_model

from hf_distill.training.on_policy.texts import Stopwatch, Text, TextSums, text_figures


def test_figures_of_texts() -> None:
    texts = [
        Text(1, (5, 6), (7, 8, 7, 8, 0), True),  # pairs 78 87 78 80
        Text(1, (5,), (7, 8), False),  # 78
        Text(1, (6,), (0,), True),
    ]
    assert text_figures(texts) == pytest.approx(
        {
            "written_tokens": 8 / 3,
            "written_cut": 1 / 3,
            "written_repetition": (1 / 4 + 0 + 0) / 3,
            "written_distinct": 3 / 5,
        }
    )
    assert text_figures([]) == {}


def test_sums_of_steps_are_the_figures_of_all_their_texts() -> None:
    draw = random.Random(0)
    steps = [
        [
            Text(
                step, (5,), tuple(draw.choices(range(9), k=draw.randrange(9))), draw.random() < 0.5
            )
            for _ in range(draw.choice([0, 3, 12]))
        ]
        for step in range(20)
    ]
    sums = TextSums()
    assert sums.figures() == {}
    for texts in steps:
        assert sums.add(texts) == text_figures(texts)
    everything = [text for texts in steps for text in texts]
    assert sums.figures() == pytest.approx(text_figures(everything))
    assert sums.newest == everything[-8:]


def test_texts_are_not_kept_until_the_log(tmp_path: Path) -> None:
    trainer = make(tmp_path, on_policy=1.0, max_steps=8, logging_steps=6, keep_rows=True)
    trainer.train()
    own = [
        Text(0, (), tuple(token for token in row["labels"] if token != -100), True)
        for row in written_rows(trainer.seen)
    ]
    figures = text_figures(own[: 6 * 4])
    for name in ("written_tokens", "written_repetition", "written_distinct"):
        assert trainer.state.log_history[0][name] == pytest.approx(figures[name])
    assert trainer.state.log_history[0]["written_log_prob"] < 0
    assert len(trainer._writer._texts.newest) == 8
    assert trainer._writer._kept._texts == []  # in memory, where only `replay` needs them


def test_the_stopwatch_keeps_only_events_that_the_device_has_not_passed(monkeypatch: Any) -> None:
    now = 0

    class Event:
        def __init__(self, device: Any, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            nonlocal now
            now += 1
            self.at = now

        def query(self) -> bool:
            return self.at <= now - 4  # the device is two blocks behind

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 1000.0 * (end.at - self.at)

    monkeypatch.setattr(torch, "Event", Event)
    seconds = Stopwatch(torch.device("cuda"))
    for _ in range(50):
        with seconds("step"):
            pass
        assert len(seconds._events) <= 2
    assert seconds.pop() == {"step": 50.0}
    assert seconds.pop() == {}


def test_the_log_has_them_and_the_judgement_of_both_models(tmp_path: Path) -> None:
    teacher = small_model(1)
    student = small_model(0)
    trainer = make(
        tmp_path, model=small_model(0), teacher=teacher, on_policy=1.0, max_steps=1,
        learning_rate=0.0, temperature=2.0,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["ce"] == 0  # no row has labels to learn
    for name in ("writing_seconds", "judging_seconds", "learning_seconds"):
        assert log[name] > 0
    same, log_p, log_q = [], [], []
    for row in written_rows(trainer.seen):
        ids = torch.tensor([row["input_ids"]])
        q, p = (model.eval()(input_ids=ids).logits[0].log_softmax(-1) for model in
                (student, teacher))  # fmt: skip
        for at, label in enumerate(row["labels"][1:]):
            if label != -100:
                same.append(float(q[at].argmax() == p[at].argmax()))
                log_q.append(q[at, label].item())
                log_p.append(p[at, label].item())
    assert log["written_agreement"] == pytest.approx(sum(same) / len(same))
    assert log["written_log_prob"] == pytest.approx(sum(log_q) / len(log_q), rel=1e-4)
    assert log["written_teacher_log_prob"] == pytest.approx(sum(log_p) / len(log_p), rel=1e-4)


def test_texts_are_sampled_into_the_log(tmp_path: Path, tiny_tokenizer: Any) -> None:
    models = [small_model(seed, vocab_size=300, n_positions=64) for seed in (0, 1)]
    trainer = make(
        tmp_path, model=models[0], teacher=models[1], rows=[{"prompt": "the quick"}] * 4,
        data_collator=None, processing_class=tiny_tokenizer, on_policy=1.0, max_steps=7,
        sample_steps=3,
    )  # fmt: skip
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "written_text" in entry]
    assert [entry["step"] for entry in found] == [3, 6]
    assert all(entry["written_prompt"] == "the quick" for entry in found)
    ids = written_rows(trainer.seen)[5 * 4]["input_ids"]
    assert "the quick" + found[1]["written_text"] == tiny_tokenizer.decode(ids)


@pytest.mark.parametrize(("every", "number"), [(0, 0), (50, 0), (1, 4)])
def test_how_often_texts_are_sampled(every: int, number: int, tmp_path: Path) -> None:
    trainer = make(tmp_path, on_policy=1.0, max_steps=4, sample_steps=every)
    trainer.train()
    assert sum("written_text" in entry for entry in trainer.state.log_history) == number


def test_texts_without_an_end_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = small_model(0)
    model.generation_config.suppress_tokens = [0]
    make(tmp_path, model=model, on_policy=1.0, max_steps=6, sampling_temperature=2.0).train()
    told = [record.message for record in caplog.records if "In 3 steps" in record.message]
    assert len(told) == 1
    assert "reached max_new_tokens=6" in told[0]


def test_texts_that_repeat_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = small_model(0)
    model.generation_config.suppress_tokens = [i for i in range(40) if i != 39]
    make(tmp_path, model=model, on_policy=1.0, max_steps=6, max_new_tokens=12).train()
    told = [record.message for record in caplog.records if "was repetition" in record.message]
    assert len(told) == 1
