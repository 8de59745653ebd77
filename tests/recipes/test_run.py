"""A whole run on the command line: small, but every stage is real."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from gguf_setup import FILE, TEMPLATE, write_gguf
from hub_server import USER, HubServer
from peft import AutoPeftModelForCausalLM
from run_setup import (
    ROLES,
    ROOT,
    environment,
    invoke,
    launch,
    metrics,
    quality,
    run,
    start,
    write_recipe,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_distill.recipes import load_recipe
from hf_distill.recipes.planning.trial import _configs

STAGES = (
    "prepare", "teacher", "annotate", "record", "student", "baseline", "off_policy", "train",
    "evaluate",
    "report",
)  # fmt: skip
ABSENT = ("annotate", "record", "off_policy")  # from the tiny recipe

# What leaves nothing but the order of sums between one process and two.
EXACT = ("global_batch_size=8", "bf16=false")
NO_DROPOUT = ("resid_pdrop=0.0", "embd_pdrop=0.0", "attn_pdrop=0.0")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    """The run folder of an uninterrupted run."""
    done = run(recipe)
    assert done.exit_code == 0, done.output
    return recipe.parent / "runs" / "tiny"


def skipped(output: str) -> list[str]:
    return [line.split(":")[0] for line in output.splitlines() if line.endswith("skipped")]


def test_everything_is_there(finished: Path) -> None:
    found = metrics(finished)
    assert found["teacher"]["kl_to_teacher"] == 0
    assert found["teacher"]["perplexity"] < found["initial"]["perplexity"]
    assert found["student"]["kl_to_teacher"] < found["baseline"]["kl_to_teacher"]
    assert found["student"]["parameters"] < found["teacher"]["parameters"]
    assert min(found[role]["train_seconds"] for role in ("baseline", "student")) > 0
    assert "train_seconds" not in found["teacher"]
    assert [set(row) for row in found["continuations"]] == [
        {"prompt", "teacher", "baseline", "student"}
    ] * 2
    assert found["seed"] == 0
    assert {"retention", "gap_closed"} <= found["comparison"].keys()
    assert "<html" in (finished / "report.html").read_text()
    assert "forward_kl" in (finished / "student" / "README.md").read_text()
    for role in ("teacher", "student_initial", "baseline", "student"):
        AutoTokenizer.from_pretrained(finished / role)
        model = AutoModelForCausalLM.from_pretrained(finished / role)
        assert model.generation_config.eos_token_id == 0
        assert (finished / role / "model.safetensors").exists()
    for pickled in ("*.bin", "*.pt", "*.pth", "*.pkl"):
        assert not list(finished.rglob(pickled))
    left = {path.name for path in (finished / "work").iterdir()}
    assert left == {f"{stage}.json" for stage in STAGES if stage not in ABSENT} | {"run.json"}


def test_a_student_of_the_most_influential_layers(recipe: Path, finished: Path) -> None:
    text = recipe.read_text()
    begin, end = text.index("student:"), text.index("train: {alpha")
    other = recipe.with_name("influence.yaml")
    other.write_text(
        f"{text[:begin]}student: {{layers: influence, num_layers: 1}}\n{text[end:]}".replace(
            text[text.index("teacher:") : begin], f"teacher: {finished / 'teacher'}\n"
        ).replace("tokenizer: {vocab_size: 300}\n", "baseline: false\n")
    )
    done = run(other)
    assert done.exit_code == 0, done.output
    made = recipe.parent / "runs" / "influence" / "student_initial"
    report = json.loads((made / "from_teacher.json").read_text())
    ((stack, scores),) = report["influence"].items()
    assert report["removed_layers"] == {stack: [scores.index(min(scores))]}
    assert report["initial_perplexity"] > report["teacher_perplexity"] > 1
    assert AutoModelForCausalLM.from_pretrained(made).config.n_layer == 1
    assert "block influence in transformer.h" in done.output


def test_a_teacher_from_a_gguf_file(recipe: Path) -> None:
    """Recorded, taught from, and cut to students that are ordinary checkpoints."""
    folder = recipe.with_name("gguf")
    texts = [path.read_text() for path in sorted(recipe.with_name("text").iterdir())]
    original, _ = write_gguf(folder, texts)
    other = recipe.with_name("from_gguf.yaml")
    data = recipe.read_text().partition("data: ")[2].partition("\n")[0]
    other.write_text(
        f"""
seed: 0
data: {data}
teacher: {{model: {folder}, model_kwargs: {{gguf_file: {FILE}}}}}
record: {{k: 8}}
student: {{layers: influence, num_layers: 2, ffn: 0.5, heads: 2}}
baseline: false
train: {{alpha: 0.9, max_steps: 4, learning_rate: 1e-3, bf16: false}}
evaluate: {{prompts: 1, max_new_tokens: 4, speed: false}}
"""
    )
    done = run(other)
    assert done.exit_code == 0, done.output
    made = recipe.parent / "runs" / "from_gguf"
    found = metrics(made)
    assert found["teacher"]["parameters"] == original.num_parameters()
    assert found["student"]["kl_to_teacher"] < found["initial"]["kl_to_teacher"]
    for role in ("student_initial", "student"):
        assert "gguf" not in (made / role / "config.json").read_text()
        saved = AutoModelForCausalLM.from_pretrained(made / role).config
        assert (saved.num_hidden_layers, saved.intermediate_size) == (2, 12)
        assert AutoTokenizer.from_pretrained(made / role).chat_template == TEMPLATE
    planned, teacher = _configs(load_recipe(other))
    assert (planned.num_hidden_layers, teacher.num_hidden_layers) == (2, 3)
    assert (planned.intermediate_size, planned.num_attention_heads) == (12, 2)


def test_both_trainings_begin_alike_and_differ_in_the_objective(finished: Path) -> None:
    logs = {
        role: json.loads((finished / role / "log_history.json").read_text())
        for role in ("baseline", "student")
    }
    first = {role: next(entry for entry in log if "ce" in entry) for role, log in logs.items()}
    # The same rows and initial weights: the same cross-entropy before the first update.
    assert first["baseline"]["ce"] == pytest.approx(first["student"]["ce"], rel=1e-6)
    assert first["baseline"]["loss"] == pytest.approx(first["baseline"]["ce"], rel=1e-3)
    assert first["student"]["loss"] < 0.5 * first["student"]["ce"]
    assert first["baseline"]["learning_rate"] == first["student"]["learning_rate"]
    for log in logs.values():  # the divergence's curve is there for both
        assert [entry["step"] for entry in log if "eval_forward_kl" in entry] == [3, 6, 9, 12]


def test_again_skips_all_and_a_change_only_redoes_what_it_touches(finished: Path) -> None:
    recipe = finished.parent.parent / "tiny.yaml"
    before = quality(finished)
    again = run(recipe)
    assert skipped(again.output) == list(STAGES)
    assert "record: not in this recipe" in again.output
    changed = run(recipe, "train.alpha=0.5")
    assert changed.exit_code == 0, changed.output
    assert skipped(changed.output) == [*STAGES[:7]]
    assert quality(finished)["student"] != before["student"]
    assert quality(finished)["baseline"] == before["baseline"]
    assert skipped(run(recipe, "evaluate.prompts=1", "train.alpha=0.5").output) == list(STAGES[:-2])
    without = run(recipe, "baseline=false")
    assert "baseline" not in metrics(finished)
    assert "baseline" not in metrics(finished)["comparison"].get("gap_closed", {})
    assert without.exit_code == 0, without.output
    assert run(recipe).exit_code == 0
    assert quality(finished) == before  # the way back


def test_evaluate_again(finished: Path) -> None:
    recipe = finished.parent.parent / "tiny.yaml"
    options = ["--set", f"output_dir={finished.parent}"]
    before = quality(finished)
    done = invoke("evaluate", recipe, *options, "--set", "evaluate.batch_size=3")
    assert done.exit_code == 0, done.output
    for role, figures in quality(finished).items():
        assert figures == pytest.approx(before[role], rel=1e-4)
    assert "report: done" in done.output  # or it would tell the speed of before
    told = (finished / "recipe.yaml").read_text()
    stale = invoke("evaluate", recipe, *options, "--set", "train.alpha=0.1")
    assert stale.exit_code == 2
    assert (finished / "recipe.yaml").read_text() == told  # of the results that are there
    assert "is not up to date with the recipe (stage train)" in stale.output
    assert run(recipe).exit_code == 0


def test_the_student_goes_to_the_hub(finished: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "hf_distill.cli",
        "publish",
        str(finished),
        f"{USER}/tiny",
    ]
    with HubServer() as hub:
        done = subprocess.run(
            [*command, "--public"],
            env=environment() | hub.environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        files = set(hub.repo(f"{USER}/tiny").files() or ())
    weights = {"model.safetensors", "config.json", "generation_config.json"}
    tokens = {"tokenizer.json", "tokenizer_config.json"}
    assert files - {".gitattributes"} == weights | tokens | {"README.md"}


def test_a_lora_student(recipe: Path) -> None:
    done = run(recipe, "name=lora", "student.lora.r=2", "train.learning_rate=0.1")
    assert done.exit_code == 0, done.output
    folder = recipe.parent / "runs" / "lora"
    assert (folder / "student" / "adapter_model.safetensors").exists()
    assert not (folder / "student" / "model.safetensors").exists()
    found = quality(folder)
    assert found["student"]["kl_to_teacher"] < found["initial"]["kl_to_teacher"]
    # The adapters' random weights do not depend on what was done before in the same process.
    shutil.rmtree(folder / "student")
    (folder / "metrics.json").unlink()
    torch.rand(1)
    again = run(recipe, "name=lora", "student.lora.r=2", "train.learning_rate=0.1")
    assert {"train", "evaluate"}.isdisjoint(skipped(again.output))
    assert quality(folder) == found


def test_a_student_of_the_teachers_layers(recipe: Path) -> None:
    done = run(recipe, "name=layers", "student={layers: [1]}", "baseline=false")
    assert done.exit_code == 0, done.output
    folder = recipe.parent / "runs" / "layers"
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder / name)
        for name in ("teacher", "student_initial")
    )
    assert student.config.n_layer == 1
    weights = [block.mlp.c_fc.weight for block in (*teacher.transformer.h, *student.transformer.h)]
    assert torch.equal(weights[1], weights[2])


# ---- Interruptions ----

MOMENTS = ("work/prepare/arrow", "work/teacher/checkpoints/checkpoint-3", "work/train/checkpoints")


def test_a_killed_run_ends_with_the_metrics_of_an_uninterrupted_one(
    finished: Path, tmp_path: Path
) -> None:
    recipe = finished.parent.parent / "killed.yaml"
    recipe.write_text((finished.parent.parent / "tiny.yaml").read_text())
    folder = recipe.parent / "runs" / "killed"
    for moment in MOMENTS:
        process = start(recipe)
        _wait_for(folder / moment, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (folder / "metrics.json").exists()
    done = run(recipe)
    assert done.exit_code == 0, done.output
    assert "teacher" in skipped(done.output)
    assert quality(folder) == quality(finished)


def _wait_for(path: Path, process: BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.is_alive(), f"ended before {path} appeared"
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ---- Several processes ----


def test_two_processes_share_a_global_batch(recipe: Path) -> None:
    """And end where one process ends, which takes the same eight rows a step."""
    alike = [f"{section}.{key}" for section in ("teacher.train", "train") for key in EXACT]
    alike += [f"{role}.config.{key}" for role in ("teacher", "student") for key in NO_DROPOUT]
    done = run(recipe, "name=one", *alike)
    assert done.exit_code == 0, done.output
    done = launch(recipe, "cpu2.yaml", "name=two", *alike)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.endswith(" s")] != []
    assert done.stdout.count("evaluate: done") == 1
    folder = recipe.parent / "runs" / "two"
    assert metrics(folder)["machine"]["processes"] == 2
    assert (
        json.loads((folder / "student" / "training_results.json").read_text())["engine"]
        == "MULTI_CPU"
    )
    one = folder.with_name("one")
    for role in ("teacher", "baseline", "student"):
        assert losses(folder / role) == pytest.approx(losses(one / role), rel=1e-4), role
        found, expected = (quality(path)[role]["perplexity"] for path in (folder, one))
        assert found == pytest.approx(expected, rel=1e-3), role


def losses(model: Path) -> list[float]:
    log = json.loads((model / "log_history.json").read_text())
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.slow
@pytest.mark.distributed
def test_an_error_on_two_processes_is_told_once(recipe: Path) -> None:
    done = launch(recipe, "cpu2.yaml", "name=bad", "data.train=nothing/*.txt")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert errors == [
        "error: 'nothing/*.txt' matches no file: check the pattern, the folder and data.exclude"
    ]
    assert not (recipe.parent / "runs" / "bad").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("lora", [False, True])
def test_deepspeed_on_two_processes(recipe: Path, lora: bool) -> None:
    name = f"zero{lora:d}"
    overrides = ["train.gradient_accumulation_steps=2"]
    overrides += ["student.lora.r=2", "train.learning_rate=0.1"] if lora else []
    done = launch(recipe, "zero2_cpu.yaml", f"name={name}", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = recipe.parent / "runs" / name
    for role in ("teacher", "baseline", "student"):
        training = json.loads((folder / role / "training_results.json").read_text())
        assert training["engine"] == "DEEPSPEED"
    found = quality(folder)
    assert found["student"]["kl_to_teacher"] < found["initial"]["kl_to_teacher"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("config", ["cpu2.yaml", "zero3_cpu.yaml"])
def test_a_sharded_teacher_in_every_stage(recipe: Path, config: str, recorded: bool) -> None:
    """It trains, is recorded by processes with unequal numbers of shards, evaluated, and writes."""
    name = f"sharded-{config[:4]}-{recorded:d}"
    overrides = ["teacher.placement=sharded", "evaluate.speed=true"]
    overrides += ["record.k=8", "record.shard_rows=7"] if recorded else ["student.lora.merge=true"]
    done = launch(recipe, config, f"name={name}", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "teacher: teacher, sharded over 2 devices" in done.stdout
    folder = recipe.parent / "runs" / name
    found = metrics(folder)
    # What is in shards has no speed of its own to compare; everything else is measured.
    assert "decode_tokens_per_s" not in found["teacher"]
    assert found["student"]["decode_tokens_per_s"] > 0
    assert set(found["continuations"][0]) == {"prompt", "teacher", "baseline", "student"}
    assert found["student"]["kl_to_teacher"] < found["initial"]["kl_to_teacher"]
    assert (folder / "student" / "model.safetensors").exists()


# ---- The shipped recipe for models on the Hub ----


def test_gpt2_without_the_hub(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = invoke("run", ROOT / "recipes/gpt2.yaml", "--set", f"output_dir={tmp_path}")
    assert time.monotonic() - begin < 10
    assert done.exit_code == 2
    assert done.stderr.startswith("error: teacher 'openai-community/gpt2-large' cannot be reached")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_gpt2_with_local_folders(finished: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished / "teacher")
    tokenizer.model_max_length = 1024
    for name, layers in (("teacher", 2), ("student", 1)):
        shape = {"n_layer": layers, "n_embd": 16, "n_head": 2, "n_positions": 1024}
        config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **shape)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    overrides = {
        "output_dir": tmp_path / "runs",
        "teacher.model": tmp_path / "teacher",
        "student.model": tmp_path / "student",
        "data.train": finished.parent.parent / "text",
        "student.lora.r": 2,
        "train.max_steps": 2,
        "train.per_device_train_batch_size": 1,
        "evaluate.speed": "false",
    }
    options = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    done = invoke("run", ROOT / "recipes/gpt2.yaml", *options)
    assert done.exit_code == 0, done.output
    assert "teacher: not in this recipe, skipped" in done.output
    assert metrics(tmp_path / "runs" / "gpt2")["student"]["perplexity"] > 1
    # The adapter names the model that it was given, not a copy in the run folder.
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "runs" / "gpt2" / "student")
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "student")


def test_a_recorded_recipe_trains_without_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full recording ends where the live teacher ends; trainings never load the teacher."""

    def refuse(teacher: object, *_: object, **__: object) -> None:
        assert teacher is None, "the teacher was loaded for a training"

    recipe = write_recipe(tmp_path)
    live = run(recipe)
    assert live.exit_code == 0, live.output
    monkeypatch.setattr("hf_distill.training.setup.as_teacher", refuse)
    estimated = invoke(
        "record", recipe, "--estimate", "--set", f"output_dir={tmp_path / 'r'}",
        "--set", "record.kind=full",
    )  # fmt: skip
    assert estimated.exit_code == 0, estimated.output
    assert "bytes a target" in estimated.output
    nothing = invoke("record", recipe, "--set", f"output_dir={tmp_path / 'n'}")
    assert nothing.exit_code == 2
    assert "there is nothing to record" in nothing.stderr
    told = run(recipe, f"output_dir={tmp_path / 'r'}", "record.kind=full", "record.shard_rows=5")
    assert told.exit_code == 0, told.output
    ours, theirs = quality(tmp_path / "r" / "tiny"), quality(tmp_path / "runs" / "tiny")
    for role in ROLES:
        assert ours[role] == pytest.approx(theirs[role], rel=1e-3)
    again = run(recipe, f"output_dir={tmp_path / 'r'}", "record.kind=top_k", "record.k=8")
    assert again.exit_code == 0, again.output
    assert {"prepare", "teacher", "annotate", "student"} == set(skipped(again.output)[:4])
    assert quality(tmp_path / "r" / "tiny")["student"] != ours["student"]


def test_a_recording_killed_at_some_instant_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Under SIGKILL, the real command: the second run goes on and differs in no byte."""
    recipe = write_recipe(tmp_path)
    settings = ("record.k=8", "record.shard_rows=2", "record.batch_size=1")
    whole = run(recipe, f"output_dir={tmp_path / 'whole'}", *settings)
    assert whole.exit_code == 0, whole.output
    process = start(recipe, *settings)
    work = tmp_path / "runs" / "tiny" / "work" / "record" / "train"
    _wait_for(work / "shard-000002.arrow", process)
    process.kill()
    process.join()
    kept = len(list(work.glob("*.arrow")))
    again = run(recipe, *settings)
    assert again.exit_code == 0, again.output
    ours, theirs = (tmp_path / name / "tiny" / "recording" for name in ("runs", "whole"))
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file())
    assert len(files) > kept
    for file in files:
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
