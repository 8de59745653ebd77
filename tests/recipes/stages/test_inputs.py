"""What a recipe takes from outside is checked early, quickly and in one line."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_distill.data import DataConfig
from hf_distill.errors import InputError
from hf_distill.models import precision
from hf_distill.models.precision import bf16_is_fast
from hf_distill.recipes import Recipe, parse_recipe
from hf_distill.recipes.stages import inputs
from hf_distill.recipes.stages.inputs import (
    check_arguments,
    check_sources,
    check_tokens,
    data_stamp,
    micro_batches,
    model_stamp,
    tokenizer_source,
    training_arguments,
)


def recipe(text: str = "") -> Recipe:
    keys = {"name": "tiny", "teacher": "{model: none/such}", "student": "{layers: every_other}"}
    keys |= {"data": "{train: a.txt, max_length: 32}"}
    keys |= dict(line.split(": ", 1) for line in text.splitlines())
    return parse_recipe("\n".join(f"{key}: {value}" for key, value in keys.items()))


@pytest.fixture
def saved(
    tmp_path: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    tiny_gpt2().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@given(st.integers(1, 100), st.integers(1, 12), st.none() | st.integers(1, 40))
def test_devices_share_a_global_batch(share: int, devices: int, most: int | None) -> None:
    at_a_time, steps = micro_batches(share * devices, devices, most)
    assert at_a_time * steps == share
    assert at_a_time <= (most or share)
    assert not [
        n for n in range(at_a_time + 1, (most or share) + 1) if share % n == 0 and n <= share
    ]
    if devices > 1:
        with pytest.raises(InputError, match="cannot share evenly"):
            micro_batches(share * devices + 1, devices, most)


OUT_OF_RANGE = {
    "alpha: 1.5": "train: alpha is 1.5, but must be between 0 and 1",
    "alpha: .nan": "train: alpha is nan, but must be between 0 and 1",
    "temperature: 0.0": "train: temperature is 0.0, but must be above 0",
    "divergence: kl": "train: divergence is 'kl', but must be one of",
    "divergence: jsd, beta: 1.0": "train: beta is 1.0, but must be strictly between 0 and 1",
    "max_steps: -5": "train: max_steps is -5, but must be -1 (by epochs) or positive",
    "label_smoothing_factor: 0.1": "train: label_smoothing_factor is 0.1",
    "lr_scheduler_type: cosin": "train: cosin is not a valid SchedulerType",
    "optim: adamm": "train: adamm is not a valid OptimizerNames",
    "save_strategy: never": "train: never is not a valid SaveStrategy",
}


@pytest.mark.parametrize("values", OUT_OF_RANGE)
def test_values_that_no_training_takes(values: str) -> None:
    with pytest.raises(InputError) as raised:
        check_arguments(recipe(f"train: {{{values}}}"))
    assert str(raised.value).startswith(OUT_OF_RANGE[values])
    assert "\n" not in str(raised.value)


def test_teacher_training_is_checked_too() -> None:
    text = (
        "teacher: {config: {model_type: gpt2}, train: {optim: adamm}}\ntokenizer: {vocab_size: 300}"
    )
    with pytest.raises(InputError, match=r"^teacher\.train: adamm is not"):
        check_arguments(recipe(text))


def test_steps_are_checked_in_every_training() -> None:
    sections = {"teacher.train": "teacher: {model: none/such, train: {max_steps: -5}}"}
    sections["teacher.adapt"] = sections["teacher.train"].replace("train:", "adapt:")
    sections["off_policy"] = "off_policy: {max_steps: -5}"
    for name, text in sections.items():
        with pytest.raises(InputError, match=f"^{name}: max_steps is -5, but must be -1"):
            check_arguments(recipe(text))
    check_arguments(recipe("train: {max_steps: -1}"))


def test_seed_and_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in (False, True):
        monkeypatch.setattr(inputs, "bf16_is_fast", lambda cpu, fast=fast: fast)
        args = training_arguments(recipe("seed: 7"), {"bf16": "auto"}, tmp_path)
        assert (args.bf16, args.seed, args.data_seed) == (fast, 7, 7)
    assert not training_arguments(recipe(), {"bf16": False}, tmp_path).bf16


def test_bf16_is_asked_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not bf16_is_fast(cpu=True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert bf16_is_fast(cpu=True)


def test_weights_that_the_processor_is_slow_with_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32), (False, torch.bfloat16)):
        monkeypatch.setattr(precision, "bf16_is_fast", lambda cpu, fast=fast: fast)
        assert "many times slower" not in caplog.text
        precision.warn_of_slow_weights(torch.nn.Linear(2, 2, dtype=dtype), f"teacher {fast}")
    assert "teacher False has bfloat16 weights" in caplog.text


# ---- The Hub ----


@pytest.mark.parametrize("offline", [True, False])
def test_without_the_hub_it_stops_at_once(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    with pytest.raises(InputError) as raised:
        check_sources(recipe())
    assert time.monotonic() - start < 2
    said = str(raised.value)
    assert said.startswith("teacher 'none/such' cannot be reached on the Hub (")
    assert said.endswith("check the id and the connection, or give a local folder")


def test_data_and_tokenizer_are_looked_for_too(saved: Path) -> None:
    with pytest.raises(InputError, match="data set 'some/corpus' cannot be reached"):
        check_sources(recipe(f"teacher: {saved}\ndata: {{train: some/corpus, max_length: 8}}"))
    with pytest.raises(InputError, match="data set 'some/valid' cannot be reached"):
        check_sources(
            recipe(f"teacher: {saved}\ndata: {{train: a.txt, eval: some/valid, max_length: 8}}")
        )
    with pytest.raises(InputError, match="tokenizer 'some/tokens' cannot be reached"):
        check_sources(
            recipe(
                f"teacher: {saved}\ntokenizer: some/tokens\ndata: {{train: a.txt, max_length: 8}}"
            )
        )


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="teacher .* cannot be loaded"):
        check_sources(recipe(f"teacher: {tmp_path}"))


@pytest.mark.parametrize("name", ["./nope", "/nope/x", "nope/x/y"])
@pytest.mark.parametrize("role", ["teacher", "student", "tokenizer"])
def test_a_folder_that_does_not_exist(saved: Path, role: str, name: str) -> None:
    with pytest.raises(InputError) as raised:
        check_sources(recipe(f"teacher: {saved}\n{role}: {name}"))
    message = f"{role} {name!r} is a folder that does not exist: check the path"
    assert str(raised.value) == message


def test_a_name_that_is_no_id() -> None:
    with pytest.raises(InputError, match=r"teacher 'a b' cannot be loaded \(Repo id must"):
        check_sources(recipe("teacher: a b"))


def test_rows_longer_than_a_model(saved: Path) -> None:
    check_sources(recipe(f"teacher: {saved}\ndata: {{train: a.txt, max_length: 64}}"))
    text = f"teacher: {saved}\ndata: {{train: a.txt, max_length: 65}}"
    with pytest.raises(
        InputError, match=r"max_length is 65, but the teacher '.*' has 64 positions"
    ):
        check_sources(recipe(text))


# ---- Tokens ----


def test_whose_tokenizer() -> None:
    assert tokenizer_source(recipe()) == ("none/such", {})
    student = "student: {model: mine, model_kwargs: {revision: v2}}"
    assert tokenizer_source(recipe(student)) == ("mine", {"revision": "v2"})
    assert tokenizer_source(recipe(f"{student}\ntokenizer: other")) == ("other", {})


def test_another_tokenizer_than_the_teachers(
    saved: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    check_tokens(recipe(f"teacher: {saved}"), tiny_tokenizer)
    other = PreTrainedTokenizerFast.from_pretrained(saved)
    text = other.backend_tokenizer.to_str().replace('"<pad>"', '"<fill>"')
    other = PreTrainedTokenizerFast(tokenizer_object=type(other.backend_tokenizer).from_str(text))
    with pytest.raises(InputError, match=r"different tokenizers: id 1 is '<fill>' for the student"):
        check_tokens(recipe(f"teacher: {saved}"), other)


def test_models_from_a_config_are_tried_before_the_rows_are_tokenized(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = (
        "tokenizer: {vocab_size: 300}\nteacher: {config: {model_type: gpt2, n_head: 2, n_embd: 8}}"
    )
    check_tokens(recipe(f"{text}\nstudent: {{layers: every_other}}"), tiny_tokenizer)
    for wrong in ("n_positions: 16", "n_lair: 2"):
        student = f"student: {{config: {{model_type: gpt2, n_head: 2, n_embd: 8, {wrong}}}}}"
        with pytest.raises(InputError):
            check_tokens(recipe(f"{text}\n{student}"), tiny_tokenizer)


# ---- Stamps ----


def test_stamps_change_with_the_files(tmp_path: Path, saved: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one\n")
    config = DataConfig(train=str(tmp_path / "*.txt"))
    stamps = [data_stamp(config), model_stamp(str(saved))]
    assert stamps == [data_stamp(config), model_stamp(str(saved))]
    text.write_text("two\n")
    os.utime(text, ns=(1, 1))  # the same size, another time
    (saved / "extra.json").write_text("{}")
    changed: list[Any] = [data_stamp(config), model_stamp(str(saved))]
    assert all(before != after for before, after in zip(stamps, changed, strict=True))
    (tmp_path / "b.txt").write_text("more\n")
    assert data_stamp(config) != changed[0]
    assert model_stamp("some/id") == "some/id"
    assert data_stamp(DataConfig(train="some/id")) == []
