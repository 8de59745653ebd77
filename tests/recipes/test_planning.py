"""`hf-distill plan`: the arithmetic by hand, and trials of real steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_setup import invoke, write_recipe
from transformers import GPT2Config, GPT2LMHeadModel

from hf_distill import InputError
from hf_distill.recipes import load_recipe, parse_recipe
from hf_distill.recipes.planning import Plan, make_plan, memory_bytes
from hf_distill.recipes.planning import trial as trials
from hf_distill.recipes.planning.arithmetic import (
    CONFIGURATIONS,
    Measures,
    extrapolated,
    parts,
    possible,
)
from hf_distill.training.on_policy import OnPolicy

# A student of 1B and a teacher of 7B parameters, bfloat16 beside float32 and AdamW.
MEASURES = Measures(
    libraries=1e9,
    weights=4e9,
    gradients=4e9,
    optimizer=8e9,
    trained=1e9,
    student_dtype=4,
    engine_dtype=4,
    teacher=14e9,
    teacher_ends=1e9,
    teacher_layer=0.4e9,
    activations=5e9,
    head=0.5e9,
    seconds=2.0,
    tokens=4096,
    accumulation=4,
)
HOW = {how.name: how for how in CONFIGURATIONS}


@pytest.fixture(autouse=True)
def _in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials without a process of their own, whose imports take most of their time."""
    if "command_line" not in request.node.name:
        monkeypatch.setattr(trials, "_run", trials._trial)


def total(name: str, devices: int, measures: Measures = MEASURES) -> float:
    return sum(parts(measures, HOW[name], devices, cpu=False).values())


def test_parts_by_hand() -> None:
    rest = 1e9 + 5e9 + 0.5e9
    assert total("one device", 1) == 4e9 + 4e9 + 8e9 + 14e9 + rest
    assert total("one device, recorded teacher", 1) == 4e9 + 4e9 + 8e9 + rest
    assert total("one device, teacher on the CPU", 1) == 4e9 + 4e9 + 8e9 + 1.4e9 + rest
    assert total("DDP", 8) == 4e9 + 2 * 4e9 + 8e9 + 14e9 + rest
    # DeepSpeed keeps a float32 copy of what is trained, and gathers gradients in buckets of 2 GB.
    shared = (8e9 + 4e9) / 8 + 4e9 / 8 + 2e9
    assert total("ZeRO-2", 8) == 4e9 + shared + 14e9 + rest
    sharded = 14e9 / 8 + 1e9 + 0.8e9
    assert total("ZeRO-2, teacher sharded", 8) == 4e9 + shared + sharded + rest
    # ZeRO-3 lets 4 GB of gathered weights lie: for a student of this size, all of them.
    assert total("ZeRO-3, teacher sharded", 8) == 4e9 / 8 + 4e9 + shared + sharded + rest


def test_deepspeed_holds_a_bfloat16_student_by_itself() -> None:
    """Weights and gradients in half the bytes, buckets of 1 GB; the moments stay as they are."""
    mixed, rest = replace(MEASURES, engine_dtype=2), 14e9 + 1e9 + 5e9 + 0.5e9
    assert total("ZeRO-2", 8, mixed) == 2e9 + (8e9 + 4e9) / 8 + 2e9 / 8 + 1e9 + rest
    assert total("DDP", 8, mixed) == total("DDP", 8)


def test_a_model_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x.gguf").touch()
    of = {"name": "tiny", "data": {"train": "a.txt"}, "student": {"layers": "every_other"}}
    for model, message in {"model": "set gguf_file", "none": "does not exist"}.items():
        recipe = parse_recipe(yaml.safe_dump(of | {"teacher": str(tmp_path / model)}))
        with pytest.raises(InputError, match=f"^teacher .*{message}"):
            make_plan(recipe, 1, 5e9)


@pytest.mark.parametrize(("bits", "each"), [(8, 1.0), (4, 0.5 + 4 / 64)])
def test_quantised_layers_are_planned_at_their_size(tmp_path: Path, bits: int, each: float) -> None:
    quantised = f"teacher.model_kwargs={{quantization_config: {{load_in_{bits}bit: true}}}}"
    shape = {"vocab_size": 300, "n_positions": 32, "n_head": 2, "n_embd": 32}
    teacher = GPT2LMHeadModel(GPT2Config(n_layer=2, **shape))
    layers = sum(p.numel() for p in teacher.transformer.h.parameters())
    found = make_plan(load_recipe(write_recipe(tmp_path), [quantised]), 1, 8e9).measures
    assert found.teacher == 4 * (teacher.num_parameters() - layers) + each * layers


def test_a_plan_recommends_the_first_that_fits() -> None:
    def plan(devices: int, memory: float) -> Plan:
        ways = {how: parts(MEASURES, how, devices, cpu=False) for how in possible(devices)}
        return Plan(MEASURES, devices, memory, ways, 1000, 5000, True, 512, 115.0)

    def name(devices: int, memory: float) -> str | None:
        how = plan(devices, memory).recommended
        return how.name if how else None

    assert name(1, 80e9) == "one device"
    assert name(1, 30e9) == "one device, teacher on the CPU"
    assert name(8, 80e9) == "DDP"
    assert name(8, 30e9) == "ZeRO-2"
    assert name(8, 20e9) == "ZeRO-2, teacher sharded"
    assert name(8, 5e9) is None
    # 1000 steps of four micro-batches of 2 s; 8 devices of 4096 tokens in 2 s.
    assert plan(8, 80e9).hours == pytest.approx(8000 / 3600)
    assert plan(8, 80e9).tokens_per_second == 8 * 4096 / 2
    told = "\n".join(plan(8, 80e9).lines("r.yaml"))
    repeated = plan(8, 80e9).lines("r.yaml", ["data.train=my *.txt"])[-1]
    assert "r.yaml --set 'data.train=my *.txt' --set teacher.placement=replicated" in repeated
    assert "0.29 GB for 5,000 rows" in told  # 5000 * 512 * 115
    assert plan(8, 5e9).advice.startswith("none of these fits into 5.0 GB; the least takes")
    assert "use devices with more memory" in plan(8, 0.5e9).advice


def test_a_recipe_that_records_is_planned_without_its_teacher(tmp_path: Path) -> None:
    recorded = possible(8, recorded=True)
    engines = ["DDP", "ZeRO-2", "ZeRO-3", "ZeRO-3 offloaded"]
    assert [how.name for how in recorded] == [f"{name}, recorded teacher" for name in engines]
    for how in (*recorded, *possible(1, recorded=True)):
        assert parts(MEASURES, how, 8, cpu=False)["teacher"] == 0
    assert all(not how.offload for how in possible(8, recorded=True, cpu=True))
    recipe = load_recipe(write_recipe(tmp_path), ["record.k=8", "record.max_rows=3"])
    found = make_plan(recipe, 1, 8e9)
    assert found.measures.teacher == 0
    assert found.recommended is not None
    assert found.lines("r.yaml")[-1].endswith("recorded teacher: hf-distill run r.yaml")


def test_a_device_is_planned_with_its_share_of_a_global_batch(tmp_path: Path) -> None:
    sizes = ["train.global_batch_size=8", "train.per_device_train_batch_size=3"]
    recipe = load_recipe(write_recipe(tmp_path), sizes)
    found = make_plan(recipe, 2, 8e9).measures
    assert (found.tokens, found.accumulation) == (2 * recipe.data.max_length, 2)
    with pytest.raises(InputError, match="3 processes cannot share evenly"):
        make_plan(recipe, 3, 8e9)


def test_layers_are_linear() -> None:
    one = replace(MEASURES, seconds=1.0, activations=10.0)
    two = replace(one, seconds=1.5, activations=14.0)
    other = replace(one, seconds=1.2)
    found = extrapolated(one, two, other, student=12, teacher=24)
    assert found.seconds == pytest.approx(1.0 + 11 * 0.5 + 23 * 0.2)
    assert found.activations == pytest.approx(10 + 11 * 4)


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80e9), ("512 mb", 512e6), ("1.5TB", 1.5e12)]
)
def test_memory_sizes(text: str, expected: float) -> None:
    assert memory_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "0GB", "80 G", "80"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="must be a size such as 80GB"):
        memory_bytes(text)


def test_trials_know_the_whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole models, and of models with one and two layers: the same sizes, counted by hand."""
    recipe = load_recipe(write_recipe(tmp_path))
    shape = {"vocab_size": 300, "n_positions": 32, "n_head": 2}
    student = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, **shape)).num_parameters()
    teacher = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, **shape)).num_parameters()
    for operations in (trials.OPERATIONS, 0):
        monkeypatch.setattr(trials, "OPERATIONS", operations)
        found = make_plan(recipe, 1, 8e9).measures
        assert found.trained == student
        assert found.weights == found.gradients == 4 * student
        assert found.optimizer == pytest.approx(8 * student, rel=0.01)  # and a few counters
        assert found.teacher == 4 * teacher
        assert found.tokens == 8 * 32
        assert 100e6 < found.libraries < 3e9
        assert found.seconds > 0


def test_on_the_command_line(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    done = invoke("plan", recipe, "--devices", "2", "--memory", "8GB")
    assert done.exit_code == 0, done.output
    assert "DDP: accelerate launch --config_file recipes/accelerate/cpu2.yaml" in done.output
    assert "12 steps in" in done.output
    assert not (tmp_path / "runs").exists()
    assert "processing_class" not in done.output + done.stderr
    done = invoke("plan", recipe, "--memory", "1MB")
    assert done.exit_code == 2
    assert "none of these fits into 1 MB" in done.stderr
    done = invoke("plan", recipe, "--memory", "80 apples")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: memory is '80 apples'")


def test_a_plan_tells_of_steps_that_differ() -> None:
    ways = {HOW["one device"]: parts(MEASURES, HOW["one device"], 1, cpu=False)}

    def told(spread: float) -> str:
        measures = replace(MEASURES, spread=spread)
        settings = {"steps": 10, "rows": None, "baseline": False, "length": 8}
        plan = Plan(measures, 1, 80e9, ways, bytes_per_target=1.0, **settings)
        return "\n".join(plan.lines("a.yaml"))

    assert "the trial's steps differ by up to 21% of their median" in told(0.21)
    assert "steps differ" not in told(0.2)


# ---- Students that write ----


def test_the_time_of_writing_is_counted(tmp_path: Path) -> None:
    options = ["data.packing=false", "train.on_policy=0.5", "train.max_new_tokens=24"]
    options += ["train.gradient_accumulation_steps=2", "train.max_steps=100"]
    plan = make_plan(load_recipe(write_recipe(tmp_path), options), 1, 8e9)
    found = plan.measures
    # 24 forwards of single tokens take longer than one forward and backward.
    assert found.writing > found.seconds / 2 > 0
    assert plan.hours == pytest.approx(100 * 2 * (found.seconds + found.writing) / 3600)
    assert any(line.startswith("writing: ") for line in plan.lines("r.yaml"))
    silent = make_plan(load_recipe(write_recipe(tmp_path)), 1, 8e9)
    assert silent.measures.writing == 0
    assert not any(line.startswith("writing: ") for line in silent.lines("r.yaml"))


def test_texts_of_a_trial_are_as_long_as_they_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def spied(self: OnPolicy, rows: list[Any]) -> Any:
        texts = written(self, rows)
        seen.extend((len(text.prompt), len(text.completion)) for text in texts)
        return texts

    written = OnPolicy._write
    monkeypatch.setattr(OnPolicy, "_write", spied)
    options = ["data.packing=false", "train.on_policy_raise=0.1", "train.max_new_tokens=24"]
    recipe = load_recipe(write_recipe(tmp_path), options)
    trials._trial(recipe, None, None)
    assert set(seen) == {(8, 24)}  # data.max_length is 32
    assert len(seen) == trials.STEPS * 8  # all rows of each step


def test_a_student_that_writes_is_whole_and_its_teacher_live(tmp_path: Path) -> None:
    names = [how.name for how in possible(8, writes=True, recorded=True)]
    assert names == ["DDP", "ZeRO-2", "ZeRO-2, teacher sharded"]
    options = ["data.packing=false", "record.k=8", "train.on_policy=0.5"]
    plan = make_plan(load_recipe(write_recipe(tmp_path), options), 1, 8e9)
    assert plan.measures.teacher > 0
    assert all(of["teacher"] > 0 for of in plan.ways.values())


def test_the_time_of_writing_grows_with_the_students_layers() -> None:
    one, two = replace(MEASURES, writing=2.0), replace(MEASURES, writing=2.5)
    assert extrapolated(one, two, one, student=12, teacher=24).writing == 2.0 + 11 * 0.5
