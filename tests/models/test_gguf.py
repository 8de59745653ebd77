"""Teachers and students from a GGUF file are ordinary models, with its tokenizer and template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_setup import FILE, TEMPLATE, write_gguf
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_distill.errors import InputError
from hf_distill.models import loading
from hf_distill.models.from_teacher import student_from_teacher
from hf_distill.models.loading import load_config, load_model, load_tokenizer, local_tokenizer
from hf_distill.teachers.placement import load_placed, size_of

TEXTS = ["a rose grows by the ivy", "the fern and the moss", "ivy by the rose"] * 9
IDS = torch.tensor([[5, 60, 70, 279, 4]])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder, and the model and tokenizer that its file holds."""
    folder = tmp_path_factory.mktemp("gguf")
    return folder, *write_gguf(folder, TEXTS)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_plain_model(written: Any, role: str, tmp_path: Path) -> None:
    folder, original, _ = written
    model = load_model(folder, role, gguf_file=FILE)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not [key for key in config if "gguf" in str(config[key]) or "quant" in key]
    assert "A tiny Llama" not in config.values()
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(original.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_precision_that_is_asked_for(written: Any) -> None:
    model = load_model(written[0], "teacher", gguf_file=FILE, dtype=torch.bfloat16)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_students_are_plain(written: Any, tmp_path: Path) -> None:
    folder, original, tokenizer = written
    teacher = load_model(folder, "teacher", gguf_file=FILE)
    student = student_from_teacher(
        teacher, "influence", num_layers=2, rows=TEXTS[:3], tokenizer=tokenizer
    )
    theirs = student_from_teacher(
        original, "influence", num_layers=2, rows=TEXTS[:3], tokenizer=tokenizer
    )
    student.save_pretrained(tmp_path)
    again = load_model(tmp_path, "student")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits)
    assert again.generate(IDS, max_new_tokens=3).shape[1] > IDS.shape[1]


def test_the_tokenizer_and_its_template(written: Any) -> None:
    folder, _, tokenizer = written
    by_option = load_tokenizer(folder, "teacher", gguf_file=FILE)
    by_model = local_tokenizer(load_model(folder, "teacher", gguf_file=FILE).config.name_or_path)
    for found in (by_option, by_model):
        assert found is not None
        for text in (*TEXTS, "unseen words: 12"):
            assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert found.chat_template == TEMPLATE
        assert (found.eos_token_id, found.pad_token_id) == (0, 1)


def test_size_and_placement(written: Any) -> None:
    folder, original, _ = written
    parameters = sum(value.numel() for value in original.parameters())
    assert size_of(folder, gguf_file=FILE) == 4 * parameters
    model, placement = load_placed(folder, "auto", gguf_file=FILE)
    assert placement == "auto"
    assert not getattr(model, "is_quantized", False)


def test_without_the_package(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=r"needs the package gguf: run `pip install") as caught:
            load(written[0], "teacher", gguf_file=FILE)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_config, load_tokenizer])
def test_a_folder_of_gguf_files_only(load: Any, tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf", "README.md"):
        (tmp_path / name).touch()
    with pytest.raises(InputError) as caught:
        load(tmp_path, "teacher")
    assert "cannot be loaded: its weights are GGUF files (a.gguf, b.gguf)" in str(caught.value)
    assert "set gguf_file (model_kwargs: {gguf_file: a.gguf} in a recipe" in str(caught.value)
    (tmp_path / "model.safetensors").touch()  # then something else is wrong
    with pytest.raises(InputError, match=r"cannot be loaded \("):
        load(tmp_path, "teacher")


def test_a_file_that_is_missing_or_broken(written: Any, tmp_path: Path) -> None:
    missing = f"cannot be loaded: it has no file 'other.gguf', only {FILE}: check gguf_file"
    for load in (load_model, load_config, load_tokenizer):
        with pytest.raises(InputError, match=missing):
            load(written[0], "teacher", gguf_file="other.gguf")
    with pytest.raises(InputError, match="no file 'tiny.gguf', and no other GGUF file"):
        load_model(tmp_path, "teacher", gguf_file=FILE)
    (tmp_path / FILE).write_bytes((written[0] / FILE).read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot be loaded \("):
        load_model(tmp_path, "teacher", gguf_file=FILE)
    (tmp_path / FILE).write_bytes(b"no such thing")
    with pytest.raises(InputError, match=r"cannot be loaded \("):
        load_model(tmp_path, "teacher", gguf_file=FILE)
