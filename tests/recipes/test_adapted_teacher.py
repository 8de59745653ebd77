"""`teacher.adapt`: a teacher is trained on the rows first, whole or by LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from run_setup import QUALITY, metrics, run, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_distill import evaluate_student
from hf_distill.errors import InputError
from hf_distill.models.from_scratch import train_tokenizer
from hf_distill.recipes import dump_recipe, load_recipe, parse_recipe

# peft 0.21 asks for a property that transformers 5.23 has renamed.
PEFT_LAGS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
ADAPT = "{max_steps: 8, learning_rate: 1e-2, bf16: false, save_steps: 4}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose teacher is a folder with random weights, and whose student has its layer."""
    path = write_recipe(tmp_path_factory.mktemp("adapted"))
    texts = [file.read_text() for file in sorted(path.with_name("text").iterdir())]
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(0)
    size = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 300}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0, pad_token_id=1))
    for thing in (model, tokenizer):
        thing.save_pretrained(path.with_name("given"))
    data = next(line for line in path.read_text().splitlines() if line.startswith("data:"))
    path.write_text(
        f"""
seed: 0
{data}
teacher: {{model: {path.with_name("given")}, adapt: {ADAPT}}}
student: {{layers: [1]}}
train: {{max_steps: 4, learning_rate: 1e-3, bf16: false}}
evaluate: {{prompts: 1, max_new_tokens: 4, speed: false}}
"""
    )
    return path


def test_figures_before_and_after(recipe: Path) -> None:
    done = run(recipe)
    assert done.exit_code == 0, done.output
    folder = recipe.parent / "runs" / "tiny"
    found = metrics(folder)
    assert list(found)[:5] == ["unadapted", "teacher", "initial", "baseline", "student"]
    assert found["teacher"]["perplexity"] < 0.9 * found["unadapted"]["perplexity"]
    assert found["teacher"]["kl_to_teacher"] == 0
    assert found["teacher"]["train_seconds"] > 0
    given, adapted, student = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in (recipe.with_name("given"), folder / "teacher", folder / "student_initial")
    )
    rows = load_from_disk(str(folder / "data" / "eval"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    before = evaluate_student(given, adapted, rows, tokenizer, speed=False)
    assert {key: before[key] for key in QUALITY} == pytest.approx(
        {key: found["unadapted"][key] for key in QUALITY}, rel=1e-5
    )
    # The student is made of the adapted teacher.
    layers = [model.transformer.h[-1].mlp.c_fc.weight for model in (given, adapted, student)]
    assert torch.equal(layers[1], layers[2])
    assert not torch.equal(layers[0], layers[1])
    assert "Unadapted" in (folder / "report.html").read_text()
    assert "| unadapted |" in (folder / "student" / "README.md").read_text()
    # What does not decide the teacher leaves it as it is.
    again = run(recipe, "train.alpha=0.5")
    assert "teacher: unchanged, skipped" in again.output
    assert again.exit_code == 0, again.output


@PEFT_LAGS
def test_adapters_are_merged_and_the_teacher_is_recorded(recipe: Path) -> None:
    done = run(
        recipe, "name=lora", "teacher.adapt.lora={r: 2, target_modules: [c_attn]}", "record.k=8",
        "teacher.model_kwargs.dtype=bfloat16", "baseline=false",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    folder = recipe.parent / "runs" / "lora"
    assert not list((folder / "teacher").glob("adapter*"))
    given, adapted = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in (recipe.with_name("given"), folder / "teacher")
    )
    assert adapted.dtype == torch.float32  # trained so, though it teaches in bfloat16
    blocks: Any = zip(given.transformer.h, adapted.transformer.h, strict=True)
    for before, after in blocks:
        change = after.attn.c_attn.weight - before.attn.c_attn.weight
        assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2
        assert torch.equal(before.mlp.c_fc.weight, after.mlp.c_fc.weight)
    found = metrics(folder)
    assert found["teacher"]["ce"] < found["unadapted"]["ce"]
    assert found["teacher"]["size_mb"] == 2 * found["teacher"]["parameters"] / 1e6


WRONG = {
    "teacher.train={max_steps: 1}": "teacher has 'train' and 'adapt'",
    "teacher={config: {model_type: gpt2}, adapt: {max_steps: 1}}": "a teacher from 'model'",
    "task=seq2seq-lm": "is for causal-lm: use 'teacher.train'",
    "teacher.adapt.seed=1": "'teacher.adapt.seed' cannot be set in a recipe",
    "teacher.adapt.stepz=1": "unknown key 'teacher.adapt.stepz'",
    "teacher.model_kwargs.quantization_config={load_in_4bit: true}": "cannot be trained",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_cannot_be_adapted(recipe: Path, override: str) -> None:
    with pytest.raises(InputError, match=WRONG[override]):
        load_recipe(recipe, [override])


def test_the_recipe_of_a_run_folder_is_the_same(recipe: Path) -> None:
    read = load_recipe(recipe, ["teacher.adapt.lora.r=4"])
    again = parse_recipe(dump_recipe(read))
    assert again == read
    assert again.resolved()["teacher"]["adapt"]["lora"]["r"] == 4
