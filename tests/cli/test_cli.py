"""The command line: help worth reading, and one line with exit code 2 for what is bad."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_setup import invoke, run, write_recipe
from transformers import (
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

from hf_distill import __version__
from hf_distill.cli import exit_codes
from hf_distill.training.trainer import DistillationTrainer

COMMANDS = ("run", "evaluate", "report", "publish")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("cli"))


def refused(recipe: Path, *overrides: str) -> str:
    """The one line that a bad recipe ends with; nothing is left of its run."""
    done = run(recipe, "name=bad", *overrides)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.exit_code == 2, done.output
    assert len(errors) == 1
    assert "Traceback" not in done.output
    assert not (recipe.parent / "runs" / "bad").exists()
    return errors[0].removeprefix("error: ")


def test_version_and_help() -> None:
    assert invoke("--version").output == f"hf-distill {__version__}\n"
    shown = invoke("--help").output
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]", shown, re.MULTILINE)
        text = invoke(name, "--help").output
        assert f"hf-distill {name} " in text  # an example
        assert "--debug" in text


BAD = {
    "trian.alpha=0.5": "unknown key 'trian.alpha'; did you mean 'train.alpha'?",
    "train.max_steps=soon": "train.max_steps is 'soon', but must be a valid integer",
    "train.alpha=1.5": "train: alpha is 1.5, but must be between 0 and 1",
    "train.temperature=0": "train: temperature is 0.0, but must be above 0",
    "train.beta=1.0": "train: beta is 1.0, but must be strictly between 0 and 1",
    "data.train=nothing/*.txt": "'nothing/*.txt' matches no file",
    "data.train={stdlib}/*.py": "a value that begins with a brace has to be quoted",
    "data.train=nothing.txt": "'nothing.txt' does not exist",
    "data.max_length=64": "max_length=64 is beyond the 32 positions",
    "teacher.config.n_positions=16": "max_length=32 is beyond the 16 positions",
    "teacher.config.n_lair=3": "n_layer",
    "tokenizer.vocab_size=100000": "the corpus is too small for a vocabulary of 100000 tokens",
    "data.clean={min_characters: 100000}": "min_characters",
    "data.eval=empty.txt": "empty.txt",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_values(recipe: Path, override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    Path("empty.txt").touch()
    expected = BAD[override]
    if "min_characters" in expected:
        expected = "no row is left after cleaning"
    assert expected in refused(recipe, override)


def test_files_that_are_not_text(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(
        "caf\xe9 au lait, s'il vous pla\xeet\n".encode("latin-1") * 99
    )
    assert "latin.txt" in refused(recipe, f"data.train={tmp_path / 'latin.txt'}")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": \n')
    assert "rows.jsonl" in refused(recipe, f"data.train={tmp_path / 'rows.jsonl'}")
    if os.geteuid():  # root reads everything
        (tmp_path / "shut.txt").touch(0o000)
        assert "shut.txt" in refused(recipe, f"data.train={tmp_path / 'shut.txt'}")


@pytest.fixture
def saved(
    tmp_path: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    tiny_gpt2().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def with_models(teacher: Path | str, student: Path | str) -> list[str]:
    return ["tokenizer=null", f"teacher={{model: {teacher}}}", f"student={{model: {student}}}"]


def test_models_that_do_not_fit(recipe: Path, saved: Path, tmp_path: Path) -> None:
    assert "cannot be reached on the Hub" in refused(recipe, *with_models("no/such", saved))
    other = AutoTokenizer.from_pretrained(saved)
    text = other.backend_tokenizer.to_str().replace('"<pad>"', '"<fill>"')
    GPT2LMHeadModel.from_pretrained(saved).save_pretrained(tmp_path / "other")
    PreTrainedTokenizerFast(
        tokenizer_object=type(other.backend_tokenizer).from_str(text), eos_token="<|endoftext|>"
    ).save_pretrained(tmp_path / "other")
    said = refused(recipe, *with_models(saved, tmp_path / "other"))
    assert "different tokenizers: id 1 is '<fill>' for the student and '<pad>'" in said


def test_teachers_without_a_head(
    recipe: Path, saved: Path, tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    for name in ("other", "body"):
        tokenizer.save_pretrained(tmp_path / name)
    T5Config(vocab_size=300).save_pretrained(tmp_path / "other")
    said = refused(recipe, *with_models(tmp_path / "other", saved))
    assert "is a t5, which has no language-model head" in said
    tiny_llama(tie_word_embeddings=False).model.save_pretrained(tmp_path / "body")
    said = refused(recipe, *with_models(tmp_path / "body", saved))
    assert "was saved as a LlamaModel, without a language-model head" in said
    # A config that does not say what it was saved as is found out when its weights are loaded.
    config = json.loads((tmp_path / "body" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "body" / "config.json").write_text(json.dumps(config))
    done = run(recipe, "name=body", *with_models(tmp_path / "body", saved))
    assert done.exit_code == 2
    assert "was saved without a language-model head" in done.stderr


def test_too_few_rows_for_a_batch(recipe: Path) -> None:
    done = run(recipe, "name=few", "teacher.train.per_device_train_batch_size=100000")
    assert done.exit_code == 2
    assert "the corpus is too small for one batch" in done.stderr
    folder = recipe.parent / "runs" / "few"
    assert (folder / "data").exists()  # this stage is whole; the teacher is not there
    assert not (folder / "teacher").exists()


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = DistillationTrainer.training_step

    def step(self: DistillationTrainer, model: torch.nn.Module, *args: object) -> torch.Tensor:
        if self.state.global_step == 7:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        return plain(self, model, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", step)
        done = run(recipe, "name=nan")
    assert done.exit_code == 2, done.output
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "the loss is not finite at step 8" in error
    kept = recipe.parent / "runs/nan/work/teacher/checkpoints/checkpoint-6"
    assert f"last good checkpoint: {kept}" in error
    again = run(recipe, "name=nan")
    assert again.exit_code == 0, again.output
    assert "resuming from checkpoint-6" in again.output


def test_other_errors_are_one_line_too(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("hf_distill.recipes.load_recipe", fail)
    done = invoke("run", recipe)
    assert (done.exit_code, done.stderr) == (
        1,
        "error: RuntimeError: first second (--debug shows where)\n",
    )
    shown = invoke("run", recipe, "--debug")
    assert isinstance(shown.exception, RuntimeError)


def test_interrupted(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_distill.recipes.load_recipe", stop)
    done = invoke("run", recipe)
    assert done.exit_code == 130
    assert "run the same command again" in done.stderr


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    waited: list[float] = []
    monkeypatch.setattr(exit_codes.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    done = invoke("run", recipe, "--set", "x=1")
    assert waited == [5]  # in which the launcher ends it, if the first process fails as well
    assert done.stderr.startswith("error (process 1): unknown key 'x'")


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    for command in ("report", "publish"):
        done = invoke(command, tmp_path / "none")
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith("error: ")


def test_publish_finds_where_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, str, bool]] = []

    def push(folder: Path, repo_id: str, *, private: bool) -> str:
        calls.append((folder, repo_id, private))
        return "http://hub/me/mine"

    monkeypatch.setattr("hf_distill.reporting.publishing.publish", push)
    (tmp_path / "student").mkdir()
    text = "name: r\ndata: {train: a}\nteacher: t\nstudent: s\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert "set publish.repo_id in the recipe" in invoke("publish", tmp_path).stderr
    assert invoke("publish", tmp_path, "me/mine", "--public").output == "http://hub/me/mine\n"
    (tmp_path / "recipe.yaml").write_text(text + "publish: {repo_id: me/theirs}\n")
    invoke("publish", tmp_path)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_text("{}")
    invoke("publish", tmp_path / "alone", "me/alone")
    assert calls == [
        (tmp_path / "student", "me/mine", False),
        (tmp_path / "student", "me/theirs", True),
        (tmp_path / "alone", "me/alone", True),
    ]
