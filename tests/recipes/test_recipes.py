"""Recipes: what is read is what was written, and what is wrong is said in one line."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from hf_distill.errors import InputError
from hf_distill.recipes import arguments, dump_recipe, keys, load_recipe, parse_recipe
from hf_distill.recipes.train_sections import RESERVED, TRAIN_DEFAULTS
from hf_distill.training.arguments import DistillationArguments

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL = """
data: {train: text.txt}
teacher: openai-community/gpt2-large
student: {layers: every_other}
train: {learning_rate: 1e-4}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as raised:
        load_recipe(path, overrides)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- What is read ----


def test_a_minimal_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.teacher.model == "openai-community/gpt2-large"
    assert recipe.data.max_length == 512
    assert recipe.baseline
    own = {"alpha": 0.5, "temperature": 1.0, "divergence": "forward_kl", "beta": 0.5, "skew": 0.1}
    own |= {"fused_head": True, "mixed_recordings": False, "on_policy": 0.0, "prompt_tokens": 32}
    own |= {"on_policy_warmup": 0.0, "on_policy_raise": 0.0, "replay": 0.0, "keep_rows": False}
    own |= {"teacher_mix": 0.0}
    own |= {"sample_steps": 50, "writing_backend": "generate", "vllm_memory": 0.3}
    own |= {"sampling_temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 128}
    assert arguments(recipe.train) == TRAIN_DEFAULTS | own | {"learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("5E3", 5e3), ("1.5e-4", 1.5e-4), (".5e1", 5.0), ("0.25", 0.25), ("1", 1.0)],
)
def test_numbers_are_read_as_people_write_them(path: Path, text: str, value: float) -> None:
    recipe = load_recipe(path, [f"train.learning_rate={text}"])
    assert arguments(recipe.train)["learning_rate"] == value


def test_overrides_replace_create_and_open(path: Path) -> None:
    recipe = load_recipe(
        path,
        [
            "train.alpha=0.1",
            "train.alpha=0.9",
            "student.lora.target_modules=[c_attn, c_proj]",
            "teacher.model_kwargs.dtype=bfloat16",  # below a string that stands for a model
            "train.optim_args=a=b",
            "data.clean={near_duplicates: null}",
        ],
    )
    assert arguments(recipe.train)["alpha"] == 0.9
    assert recipe.student.lora is not None
    assert recipe.student.lora.target_modules == ["c_attn", "c_proj"]
    assert recipe.teacher.model == "openai-community/gpt2-large"
    assert recipe.teacher.model_kwargs == {"dtype": "bfloat16"}
    assert arguments(recipe.train)["optim_args"] == "a=b"
    assert recipe.data.clean.near_duplicates is None


def test_an_unquoted_no_is_a_strategy(path: Path) -> None:
    recipe = load_recipe(path, ["train.eval_strategy=no", "train.bf16=no"])
    assert arguments(recipe.train)["eval_strategy"] == "no"
    assert arguments(recipe.train)["bf16"] is False


def test_a_section_without_anything_in_it_is_its_default(path: Path) -> None:
    plain = load_recipe(path)
    path.write_text(MINIMAL + "evaluate:\n")
    assert load_recipe(path, ["tokenizer=null"]) == plain


def test_other_data_leave_behind_what_described_the_first(path: Path) -> None:
    path.write_text(
        MINIMAL.replace("text.txt", "a/b, subset: c, eval_split: validation, rows: line")
    )
    assert load_recipe(path, ["data.max_length=8"]).data.eval_split == "validation"
    data = load_recipe(path, ["data.train=x.txt"]).data
    assert (data.subset, data.eval_split, data.rows) == (None, None, "line")
    assert load_recipe(path, ["data.eval_split=test", "data.train=d/e"]).data.eval_split == "test"


def test_resolved_says_everything_and_is_read_back(path: Path) -> None:
    recipe = load_recipe(path, ["teacher={config: {model_type: gpt2}}", "tokenizer.vocab_size=300"])
    resolved = recipe.resolved()
    assert resolved["train"]["temperature"] == 1.0  # a default of this library
    assert resolved["teacher"]["train"]["save_total_limit"] == 1
    assert resolved["data"]["clean"]["near_duplicates"] == 0.8
    again = parse_recipe(dump_recipe(recipe))
    assert again.resolved() == resolved
    assert dump_recipe(again) == dump_recipe(recipe)


# ---- What is refused ----

UNKNOWN = {
    "trian.alpha": "train.alpha",
    "train.alpah": "train.alpha",
    "alpha": "train.alpha",
    "data.clean.near_duplicate": "data.clean.near_duplicates",
    "student.lora.rank": None,
    "teacher.train.learning_rates": "teacher.train.learning_rate",
    "tokeniser.vocab_size": "tokenizer.vocab_size",
    "evaluate.batchsize": "evaluate.batch_size",
    "xyzzy": None,
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_unknown_keys_name_the_nearest(path: Path, key: str) -> None:
    nearest = UNKNOWN[key]
    expected = f"unknown key {key!r}" + (f"; did you mean {nearest!r}?" if nearest else "")
    said = message(path, f"{key}=1")
    assert said == expected if nearest else said.startswith(expected)


def test_unknown_keys_in_the_file(path: Path) -> None:
    path.write_text(MINIMAL.replace("learning_rate", "learning_rte"))
    expected = "unknown key 'train.learning_rte'; did you mean 'train.learning_rate'?"
    assert message(path) == f"{path}: {expected}"


WRONG = {
    "train.alpha='0.5'": "train.alpha is '0.5', but must be a valid number",
    "train.max_steps=[1, 2]": "train.max_steps is [1, 2], but must be a valid integer",
    "train.max_steps=1.5": "train.max_steps is 1.5, but must be a valid integer",
    "train.bf16=perhaps": "but must be a valid boolean or 'auto'",
    "baseline=1": "baseline is 1, but must be a valid boolean",
    "data.max_length=true": "data.max_length is True, but must be a valid integer",
    "data.train=3": "data.train is 3, but must be",
    "data.eval_fraction=1.0": "data.eval_fraction is 1.0, but must be less than 1",
    "student.layers={a: 1}": "student.layers is {'a': 1}, but must be",
    "evaluate.batch_size=0": "evaluate.batch_size is 0, but must be greater than or equal to 1",
    "train={global_batch_size: 8, gradient_accumulation_steps: 2}": "leave the second out",
    "train={global_batch_size: 8, auto_find_batch_size: true}": "leave the second out",
    "train.per_device_train_batch_size=-3": "-3, but must be greater than or equal to 1",
    "train=5": "train is 5, but must be a section with keys of its own, as train.global_batch_size",
    "student.lora=true": "student.lora is True, but must be a section with keys of its own, as",
    "name=a/b": "name is 'a/b', but must be",
    "seed=-1": "seed is -1, but must be greater than or equal to 0",
    "data={}": "key 'data.train' is missing",
    "student.model=gpt2": "student has 'model' and 'layers', but needs one of",
    "student={model: m, ffn: 8}": "student has a width",
    "student={num_layers: 2}": "student has 'num_layers', which is for",
    "student={layers: every_other, num_layers: 2}": "is refused, since num_layers=2 has no",
    "student=null": "key 'student' is missing",
    "teacher={}": "teacher has none, but needs one of 'model', 'config'",
    "tokenizer.vocab_size=300": "a new tokenizer does not fit a model that exists",
    "teacher={config: {model_type: gpt2}}": "neither a model nor a tokenizer",
    "train.seed=1": "key 'train.seed' cannot be set in a recipe: the recipe's own 'seed' sets it",
    "train.deepspeed=x.json": "use `accelerate launch --config_file`",
    "train.on_policy=0.5": "train.on_policy, which needs one document a row: set data.packing to",
    "train={on_policy: 0.5}": "has train.on_policy, which needs one document a row",
    "alpha": "--set 'alpha' is not of the form key=value",
    "train.alpha=[": "--set train.alpha: line 1: not valid YAML",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_values_name_key_and_value(path: Path, override: str) -> None:
    assert WRONG[override] in message(path, override)


def test_one_temperature_for_a_sparse_recording(path: Path) -> None:
    sections = ("record={kind: top_k}", "off_policy={max_steps: 2, temperature: 2.0}")
    expected = "has off_policy.temperature 2.0 and train.temperature 1.0, but a recording of the"
    assert expected in message(path, *sections)
    load_recipe(path, [sections[0].replace("top_k", "full"), sections[1]])


FILES = {
    "": "a recipe is a mapping of keys to values, but this is empty",
    "- a\n": "but this is a list",
    "seed: 1\nseed: 2\n": "line 2: key 'seed' is given twice",
    "data:\n  a: [\n": "not valid YAML",
    "data: !!python/object/apply:os.system [true]\n": "not valid YAML",
    "1: 2\n": "line 1: key 1 is a int, not a word",
    "a: *b\n": "line 1: not valid YAML",
}


@pytest.mark.parametrize("text", FILES)
def test_files_that_are_no_recipe(path: Path, text: str) -> None:
    path.write_text(text)
    said = message(path)
    assert said.startswith(str(path))
    assert FILES[text] in said


def test_files_that_cannot_be_read(path: Path, tmp_path: Path) -> None:
    assert "cannot be read: No such file" in message(tmp_path / "none.yaml")
    assert "cannot be read: Is a directory" in message(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "not a UTF-8 text file" in message(path)


def test_only_causal_models_continue_prompts(path: Path) -> None:
    said = message(path, "task=seq2seq-lm", "evaluate.written=8")
    assert "has evaluate.written for the task seq2seq-lm" in said


# ---- What is shipped and documented ----


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_and_the_commands_in_their_headers(shipped: Path) -> None:
    recipe = load_recipe(shipped)
    assert parse_recipe(dump_recipe(recipe)).resolved() == recipe.resolved()
    header = [line[1:] for line in shipped.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header).replace("\\\n", " ")
    commands = [line for line in text.splitlines() if f"recipes/{shipped.name}" in line]
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[0] in ("hf-distill", "accelerate")
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        load_recipe(shipped, overrides)


@pytest.mark.parametrize(
    "shipped", sorted((ROOT / "recipes/accelerate").glob("*.yaml")), ids=lambda path: path.name
)
def test_shipped_accelerate_configurations(shipped: Path) -> None:
    assert f"--config_file recipes/accelerate/{shipped.name}" in shipped.read_text()
    assert yaml.safe_load(shipped.read_text())["num_processes"] > 1


def test_reserved_keys_are_fields_of_the_arguments() -> None:
    names = {field.name for field in dataclasses.fields(DistillationArguments)}
    assert RESERVED.keys() <= names
    assert TRAIN_DEFAULTS.keys() <= names


def documented() -> dict[str, str]:
    """The rows of the key tables in docs/recipes.md: key -> the rest of its line."""
    _, _, text = (ROOT / "docs" / "recipes.md").read_text().partition("## Keys")
    return dict(re.findall(r"^\| `([a-z0-9_.]+)` \| (.*) \|$", text, re.MULTILINE))


def test_the_documentation_has_every_key_with_its_description_and_default() -> None:
    trainer = {field.name for field in dataclasses.fields(DistillationArguments)}
    rows: dict[str, str] = {}
    for key, field in keys():
        section, _, name = key.rpartition(".")
        if key.startswith(("teacher.train.", "off_policy.")):
            continue  # the same fields as those of train
        if key.startswith("teacher.adapt.") and key != "teacher.adapt.lora":
            continue  # the same, and those of student.lora
        if section == "train" and name in trainer and name not in shown_in_train():
            continue
        rows[key] = f"{shown(field)} | {' '.join((field.description or '').split())}"
    assert documented() == rows


def shown_in_train() -> set[str]:
    own = {field.name for field in dataclasses.fields(DistillationArguments)}
    base = {field.name for field in dataclasses.fields(TrainingArguments)}
    return own - base | TRAIN_DEFAULTS.keys()


def shown(field: Any) -> str:
    if field.is_required():
        # What a file's own name stands in for is required of Python alone.
        return "" if "by default" in field.description else "required"
    default = field.get_default(call_default_factory=True)
    if default is None or not isinstance(default, str | int | float | bool):
        return ""
    text = str(default).lower() if isinstance(default, bool) else str(default)
    text = text.replace("\n", "\\n")
    return f"`{text}`" if text else ""
