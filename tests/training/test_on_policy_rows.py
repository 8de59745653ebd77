"""Which rows are written, when, and how: prompts of all kinds, schedules, limits, engines."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from on_policy_setup import Watching, make, written_rows
from peft import LoraConfig, get_peft_model
from test_distributed import on_two
from test_trainer_rows import ANSWER, CHATML, USER
from trainer_setup import arguments, make_rows, small_model, weights

import hf_distill
from hf_distill import InputError
from hf_distill.data import Collator
from hf_distill.training.on_policy.share import share_now


def prompt_length(row: dict[str, Any]) -> int:
    return next(i for i, label in enumerate(row["labels"]) if label != -100)


def own(trainer: Any) -> list[dict[str, Any]]:
    return [row for row in written_rows(trainer.seen) if row["ce_weight"] == 0]


# ---- Schedules ----


@pytest.mark.parametrize(
    ("warmup", "shares"),
    [(0.0, [0.8] * 6), (0.5, [0.0, 0.8 / 3, 1.6 / 3, 0.8, 0.8, 0.8]), (2, [0.0, 0.4] + [0.8] * 4)],
)
def test_the_share_rises_in_the_first_steps(
    warmup: float, shares: list[float], tmp_path: Path
) -> None:
    args = arguments(tmp_path, on_policy=0.8, on_policy_warmup=warmup)
    found = [share_now(args, SimpleNamespace(global_step=n, max_steps=6)) for n in range(6)]
    assert found == pytest.approx(shares)


def test_steps_follow_the_schedule(tmp_path: Path) -> None:
    rows = make_rows(8, 0)
    trainer = make(tmp_path, rows=rows, on_policy=1.0, on_policy_warmup=0.5, max_steps=8)
    trainer.args.per_device_train_batch_size = 4
    trainer.train()
    by_step = [sum(w == 0 for w in batch["ce_weight"].tolist()) for batch in trainer.seen]
    assert by_step[0] == 0
    assert by_step[4:] == [4] * 4
    assert 0 < sum(by_step[1:4]) < 12


# ---- Prompts ----


def test_padding_on_the_left_changes_nothing(tmp_path: Path) -> None:
    found = []
    for side in ("right", "left"):
        trainer = make(
            tmp_path, data_collator=Collator(1, 0, padding_side=side), on_policy=0.6, max_steps=2,
            optim="sgd", learning_rate=0.3,
        )  # fmt: skip
        trainer.train()
        found.append(trainer)
    # Without its first token, which nothing predicts: the collator of left-padded rows masks it.
    right, left = (
        [{**row, "labels": [-100, *row["labels"][1:]]} for row in written_rows(trainer.seen)]
        for trainer in found
    )
    assert len(own(found[0])) > 0
    assert right == left
    for name, value in weights(found[0]).items():
        torch.testing.assert_close(weights(found[1])[name], value, rtol=1e-4, atol=1e-6)


def long_rows(lengths: list[int]) -> list[dict[str, Any]]:
    """Rows whose prompt has so many tokens."""
    rows = []
    for length in lengths:
        ids = [2 + (7 * i + length) % 38 for i in range(length)]
        rows.append({"input_ids": [*ids, 5], "labels": [-100] * length + [5]})
    return rows


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_long_prompt_leaves_fewer_new_tokens_to_itself_only(
    architecture: str, tmp_path: Path
) -> None:
    """Also where positions are rotary, so that the model would go on beyond those of its config."""
    shape = {} if architecture == "gpt2" else {"max_position_embeddings": 32}
    model = small_model(0, architecture, **shape)
    model.generation_config.suppress_tokens = [0]  # never ends
    trainer = make(
        tmp_path, model=model, rows=long_rows([30, 5, 31, 8]), on_policy=1.0, max_steps=1
    )
    trainer.train()
    written = [len(row["input_ids"]) - prompt_length(row) for row in own(trainer)]
    assert written == [2, 6, 1, 6]


def test_a_prompt_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    rows = long_rows([5, 31, 8, 9])
    rows[1] = {"input_ids": rows[1]["input_ids"], "labels": [-100] * 32}  # a prompt of 32 tokens
    with pytest.raises(InputError, match="a prompt has 32 tokens, but the student has 32"):
        make(tmp_path, rows=rows, on_policy=1.0, max_steps=1).train()


def test_a_prompt_after_which_nothing_is_written(tmp_path: Path) -> None:
    """The end of text is then the only target, and it is one."""
    model = small_model(0)
    model.generation_config.suppress_tokens = list(range(1, 40))
    trainer = make(tmp_path, model=model, on_policy=1.0, max_steps=1)
    trainer.train()
    rows = own(trainer)
    assert len(rows) == 4
    for row in rows:
        assert row["input_ids"][prompt_length(row) :] == [0]
    assert trainer.state.log_history[0]["written_tokens"] == 1
    assert trainer.state.log_history[0]["written_cut"] == 0


def test_ids_that_the_teacher_lacks_are_not_written(tmp_path: Path) -> None:
    model = small_model(0, vocab_size=48)
    alone = make(tmp_path, model=copy.deepcopy(model), teacher=small_model(1, vocab_size=48),
                 on_policy=1.0, max_steps=2)  # fmt: skip
    alone.train()
    assert max(max(row["input_ids"]) for row in own(alone)) >= 40  # it would write them
    trainer = make(tmp_path, model=model, on_policy=1.0, max_steps=2)
    trainer.train()
    assert max(max(row["input_ids"]) for row in own(trainer)) < 40


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Any:
    made = copy.deepcopy(tiny_tokenizer)
    made.chat_template = CHATML
    return made


def raw(folder: Path, rows: Any, tokenizer: Any, **options: Any) -> Any:
    """A trainer that is given raw rows, without a collator."""
    return Watching(
        small_model(0, vocab_size=300, n_positions=64),
        small_model(1, vocab_size=300, n_positions=64),
        arguments(folder, **({"on_policy": 1.0, "max_steps": 1, "max_new_tokens": 5} | options)),
        train_dataset=rows,
        processing_class=tokenizer,
    )


ASKED = "<|user|>\nTwo?<|endoftext|>\n<|assistant|>\n"


@pytest.mark.parametrize("kind", ["dataset", "stream", "list"])
@pytest.mark.parametrize(
    ("row", "prompt", "options"),
    [
        ({"prompt": "the quick"}, "the quick", {}),
        ({"prompt": [USER]}, ASKED, {}),
        ({"prompt": [USER], "completion": [ANSWER]}, ASKED, {}),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, ASKED, {"assistant_only_loss": True}),
    ],
    ids=["prompts", "chat-prompts", "chat-completion", "messages"],
)
def test_raw_rows(
    row: dict[str, Any], prompt: str, options: Any, kind: str, tmp_path: Path, tokenizer: Any
) -> None:
    listed = [{**row, "id": n} for n in range(8)]
    rows: Any = listed if kind == "list" else Dataset.from_list(listed)
    rows = rows.to_iterable_dataset() if kind == "stream" else rows
    trainer = raw(tmp_path, rows, tokenizer, **options)
    trainer.train()
    found = own(trainer)
    assert len(found) == 4
    for one in found:
        start = prompt_length(one)
        assert tokenizer.decode(one["input_ids"][:start]) == prompt
        assert 1 <= len(one["input_ids"]) - start <= 5


def test_prompts_that_are_too_long_are_dropped_and_counted(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Dataset.from_list([{"prompt": "fox " * (1 + 30 * (n % 2))} for n in range(8)])
    trainer = raw(tmp_path, rows, tokenizer, max_length=16)
    assert "8 prompts tokenized, of at most 15 tokens; 4 longer dropped" in capsys.readouterr().out
    assert len(trainer.train_dataset) == 4
    with pytest.raises(InputError, match="no prompt is shorter than 3 tokens"):
        raw(tmp_path, [{"prompt": "a fox and a dog"}], tokenizer, max_length=3)


def test_ids_of_a_teachers_prompt_beside_raw_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a fox", "teacher_prompt_ids": [3, 4]}] * 8
    with pytest.raises(InputError, match="give 'teacher_prompt' .text or messages. beside"):
        raw(tmp_path, rows, tokenizer)


def test_prompts_without_on_policy_rows_teach_nothing(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="rows need input_ids, or the columns of a known form"):
        raw(tmp_path, Dataset.from_list([{"prompt": "a fox"}] * 8), tokenizer, on_policy=0.0)


# ---- The student while it writes ----


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_cache_is_on_and_its_setting_as_before(checkpointing: bool, tmp_path: Path) -> None:
    trainer = make(
        tmp_path, on_policy=1.0, max_steps=1, activation_checkpointing=checkpointing,
        sampling_temperature=0.0,
    )  # fmt: skip
    trainer.train()
    model = trainer.model.train()
    model.generation_config.suppress_tokens = [0]
    lengths: list[int] = []
    hook = model.transformer.h[0].register_forward_pre_hook(
        lambda _, given: lengths.append(given[0].shape[1])
    )
    before = copy.deepcopy((model.config.to_dict(), model.generation_config.to_dict()))
    rows = long_rows([5, 7])
    trainer._writer.write([trainer.data_collator(rows)])
    hook.remove()
    assert lengths == [7, 1, 1, 1, 1, 1]  # the prompts, then a token at a time
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    assert model.is_activation_checkpointing is checkpointing


# ---- Processes ----

CASES: dict[str, dict[str, Any]] = {
    "mixed": {"on_policy": 0.6},
    # In some steps a process has no row to write.
    "apart": {"on_policy": 0.3, "on_policy_divergence": "reverse_kl", "on_policy_warmup": 2},
    "replay": {"on_policy": 1.0, "replay": 0.5, "keep_rows": True},
    "adapter": {"on_policy": 0.6},
    "teacher": {
        "on_policy": 0.3, "on_policy_divergence": "sequence_reverse_kl", "on_policy_warmup": 2,
        "teacher_placement": "sharded",
    },
}  # fmt: skip


def make_for_processes(folder: Path, case: str, processes: int) -> Any:
    model = small_model(0)
    return make(
        folder, model=with_lora(model) if case == "adapter" else model,
        max_steps=4, per_device_train_batch_size=4 // processes, optim="sgd",
        learning_rate=0.3, lr_scheduler_type="constant", max_grad_norm=0.0, **CASES[case],
    )  # fmt: skip


def with_lora(model: Any) -> Any:
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    return get_peft_model(model, lora)


def check_equal(folder: Path, cases: Sequence[str]) -> None:
    """Weights and logs of two processes in a folder beside those of one."""
    for case in cases:
        alone = make_for_processes(folder / "one", case, processes=1)
        alone.train()
        found = torch.load(folder / f"{case}.pt")
        expected = {name: value for name, value in weights(alone).items() if name in found}
        assert len(expected) > 4
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
        if case == "replay":
            two, one = (
                hf_distill.written_rows(alone_or_not)
                for alone_or_not in (folder / f"{case}-two", folder / "one")
            )
            assert two.to_list() == one.to_list()
        logs = json.loads((folder / f"{case}.json").read_text())
        expected_logs = [log for log in alone.state.log_history if "loss" in log]
        assert len(logs) == len(expected_logs) == 4
        for log, expected_log in zip(logs, expected_logs, strict=True):
            names = {name for name in expected_log if not name.endswith("seconds")}
            assert names & {"loss", "written_tokens", "written_log_prob"} <= set(log)
            names &= set(log)  # a loop without Trainer logs no learning rate
            assert {name: log[name] for name in names} == pytest.approx(
                {name: expected_log[name] for name in names}, rel=1e-3, abs=1e-6
            )


SLOW = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(e, marks=SLOW) for e in ("zero2", "zero3", "fsdp"))]
)
def test_two_processes_write_and_learn_as_one(engine: str, tmp_path: Path) -> None:
    cases = [case for case in CASES if case != "adapter" or engine != "ddp"]
    on_two(tmp_path, engine, "on_policy_worker.py", *cases)
    check_equal(tmp_path, cases)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", [pytest.param("zero3", marks=pytest.mark.slow), "fsdp"])
def test_a_student_in_shards_writes(engine: str, tmp_path: Path) -> None:
    on_two(tmp_path, engine, "on_policy_worker.py", "apart")
    check_equal(tmp_path, ["apart"])
