"""What the configs of teacher and student refuse, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from run_setup import run, write_recipe
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel

from hf_distill.errors import InputError
from hf_distill.recipes import Recipe, parse_recipe
from hf_distill.recipes.stages.given_models import check_student

LLAMA = "model_type: llama, hidden_size: 16, num_attention_heads: 2, intermediate_size: 24"
GPT2 = "model_type: gpt2, n_layer: 3, n_embd: 16, n_head: 2"


def recipe(teacher: str, student: str, train: str = "{}", **more: str) -> Recipe:
    keys = {"name": "tiny", "data": "{train: a.txt, max_length: 32}", **more}
    keys |= {"teacher": teacher, "student": student, "train": train}
    return parse_recipe("\n".join(f"{key}: {value}" for key, value in keys.items()))


@pytest.fixture
def saved(
    tmp_path: Path, tiny_gpt2: Callable[..., GPT2LMHeadModel], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A teacher of three layers, of which only the config is there."""
    tiny_gpt2(n_layer=3).config.save_pretrained(tmp_path / "model")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    return tmp_path / "model"


LAYERS = "layers=[0, 99] does not select layers of the teacher's transformer.h: give different"
FEATURE = "features: hidden_mse names layer 99 of the"
WRONG = [
    ("{layers: [0, 99]}", "{}", LAYERS),
    ("{layers: first_and_last, num_layers: 4}", "{}", "num_layers=4 cannot include the first"),
    ("{layers: influence, num_layers: 4}", "{}", "num_layers=4 cannot be taken from the 3 layers"),
    ("{layers: every_othr}", "{}", "layers='every_othr' is not a selection"),
    ("{layers: {encoder: [0]}}", "{}", "layers names 'encoder', but this teacher has"),
    ("{heads: 3}", "{}", "heads=3 is no part of the teacher's 2"),
    ("{layers: [0, 2]}", "{features: {hidden_mse: {layers: [[0, 99]]}}}", f"{FEATURE} teacher"),
    ("{layers: [0, 2]}", "{features: {hidden_mse: {layers: [[99, 0]]}}}", f"{FEATURE} student"),
    (f"{{config: {{{GPT2}}}}}", "{features: {hidden_mse: {layers: [[99, 0]]}}}", FEATURE),
    (
        "{layers: influence}",
        "{features: {hidden_mse: {layers: [[2, 0]]}}}",
        "has the layers 0 to 1",
    ),
]


@pytest.mark.parametrize(("student", "train", "message"), WRONG)
def test_layers_that_are_not_there(student: str, train: str, message: str, saved: Path) -> None:
    with pytest.raises(InputError) as raised:
        check_student(recipe(f"{{model: {saved}}}", student, train))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("student", "train"),
    [
        ("{layers: [0, 2]}", "{features: {hidden_mse: {layers: [[1, 2]]}, relations: 1.0}}"),
        ("{layers: influence, num_layers: 1, ffn: 0.5}", "{}"),
        (f"{{config: {{{GPT2}}}}}", "{features: {hidden_cosine: 1.0}}"),
    ],
)
def test_what_fits_passes(student: str, train: str, saved: Path) -> None:
    check_student(recipe(f"{{model: {saved}}}", student, train))


def test_a_teacher_from_a_config(tmp_path: Path) -> None:
    teacher = f"{{config: {{{LLAMA}, num_hidden_layers: 2}}}}"
    with pytest.raises(InputError, match="give different indices from 0 to 1"):
        check_student(recipe(teacher, "{layers: [0, 2]}", tokenizer="{vocab_size: 300}"))
    with pytest.raises(InputError, match="cannot be cut to hidden=11: The hidden size .* is not"):
        check_student(recipe(teacher, "{hidden: 11}", tokenizer="{vocab_size: 300}"))
    done = run(write_recipe(tmp_path), "student={layers: [0, 99]}")
    assert done.exit_code == 2
    assert "layers=[0, 99] does not select layers" in done.stderr
    assert "teacher: " not in done.output
    assert not (tmp_path / "runs" / "tiny").exists()
