"""Publishing, with the real client against a Hub on the loopback address."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hub_server import TOKEN, USER, HubServer
from huggingface_hub import constants
from safetensors.torch import load as load_safetensors
from trainer_setup import make_rows, small_model
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_distill import record
from hf_distill.data import Collator
from hf_distill.errors import InputError
from hf_distill.reporting.model_card import CardFacts, write_card
from hf_distill.reporting.publishing import publish, published_files


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HubServer() as server:
        yield server


@pytest.fixture
def student(
    tmp_path: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A saved student with everything that lies around after training."""
    folder = tmp_path / "student"
    tiny_gpt2(seed=3).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    write_card(folder, CardFacts("student", teacher="openai-community/gpt2-large"))
    (folder / "checkpoint-5").mkdir()
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "a.pkl"):
        (folder / name).write_bytes(b"pickled")
        (folder / "checkpoint-5" / name).write_bytes(b"pickled")
    for name in ("trainer_state.json", "log_history.json", ".hidden.json", "checkpoint-5/c.json"):
        (folder / name).write_text("{}")
    return folder


def run_client(script: str, hub: HubServer, home: Path, *arguments: str) -> str:
    """Run a script in a fresh process that knows nothing but this Hub; its standard output."""
    environment = {**os.environ, **hub.environment(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning:transformers", "-c", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import sys
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
name, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, out)
print(tokenizer("return first + second")["input_ids"])
"""


def test_a_published_student_is_loaded_back_equal(
    hub: HubServer,
    student: Path,
    tmp_path: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    url = publish(student, f"{USER}/tiny", token=TOKEN, endpoint=hub.endpoint)
    assert url == f"{hub.endpoint}/{USER}/tiny"
    assert any("/lfs/" in request for request in hub.requests), "weights go the way of large files"

    out = tmp_path / "loaded.safetensors"
    ids = run_client(LOAD, hub, tmp_path / "home", f"{USER}/tiny", str(out))
    assert json.loads(ids) == tiny_tokenizer("return first + second")["input_ids"]
    loaded, original = load_safetensors(out.read_bytes()), tiny_gpt2(seed=3).state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[key], original[key]) for key in original)


def test_only_what_is_needed_to_use_the_student_is_published(hub: HubServer, student: Path) -> None:
    publish(student, "tiny", token=TOKEN, endpoint=hub.endpoint)
    files = hub.repo(f"{USER}/tiny").files()
    assert files is not None
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(files) == set(published_files(student))
    assert b'model_id = "tester/tiny"' in files["README.md"], "the snippet loads what is published"
    assert 'model_id = "."' in (student / "README.md").read_text(), "the folder is untouched"


@pytest.mark.parametrize("private", [True, False])
def test_visibility_is_recorded(hub: HubServer, student: Path, private: bool) -> None:
    publish(student, "tiny", private=private, token=TOKEN, endpoint=hub.endpoint)
    assert hub.repo(f"{USER}/tiny").private is private


def test_a_private_student_never_lands_in_a_public_repository(
    hub: HubServer, student: Path
) -> None:
    publish(student, "tiny", token=TOKEN, endpoint=hub.endpoint)
    commits = len(hub.repo(f"{USER}/tiny").commits)
    with pytest.raises(InputError, match="is public"):
        publish(student, "tiny", private=True, token=TOKEN, endpoint=hub.endpoint)
    assert len(hub.repo(f"{USER}/tiny").commits) == commits


def test_publishing_again_replaces_what_changed(hub: HubServer, student: Path) -> None:
    publish(student, "tiny", private=True, token=TOKEN, endpoint=hub.endpoint)
    (student / "config.json").write_text(
        (student / "config.json").read_text().replace("0.02", "0.03")
    )
    publish(student, "tiny", private=True, token=TOKEN, endpoint=hub.endpoint)
    files = hub.repo(f"{USER}/tiny").files()
    assert files is not None
    assert b"0.03" in files["config.json"]


def test_publishing_again_leaves_no_weights_of_before(hub: HubServer, student: Path) -> None:
    """An adapter that has been merged since would still be what `from_pretrained` loads."""
    left = ["adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"]
    for name in left:
        (student / name).write_text("{}")
    (student / "notes.txt").write_text("the user's own")
    weights = (student / "model.safetensors").read_bytes()
    publish(student, f"{USER}/student", token=TOKEN, endpoint=hub.endpoint)
    for name in [*left, "notes.txt"]:
        (student / name).unlink()
    publish(student, f"{USER}/student", token=TOKEN, endpoint=hub.endpoint)
    files = hub.repos["model", f"{USER}/student"].files("main")
    assert files is not None
    assert not set(left) & files.keys()
    assert files["model.safetensors"] == weights
    assert "notes.txt" in files  # not a student's weights, so not ours to delete


@pytest.mark.parametrize("missing", ["README.md", "model.safetensors", "config.json"])
def test_an_incomplete_folder_is_refused(hub: HubServer, student: Path, missing: str) -> None:
    (student / missing).unlink()
    with pytest.raises(InputError, match=f"has no {missing}"):
        publish(student, "tiny", token=TOKEN, endpoint=hub.endpoint)
    assert hub.requests == [], "nothing half-done"


def test_a_missing_shard_is_named(student: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (student / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"has no model-00001-of-00002\.safetensors,"):
        publish(student, "tiny")


def test_an_adapter_of_a_local_model_is_refused(student: Path, tmp_path: Path) -> None:
    (student / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path)})
    )
    (student / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="adapter for a model in a local folder"):
        publish(student, "tiny")


def test_a_bad_token_is_one_line_and_never_shown(hub: HubServer, student: Path) -> None:
    for secret in ("hf_wrongSecret", "hf_wrong\nSecret"):
        with pytest.raises(InputError) as caught:
            publish(student, "tiny", token=secret, endpoint=hub.endpoint)
        assert "\n" not in str(caught.value)
        assert "Secret" not in str(caught.value)
        assert "Secret" not in repr(caught.value.__cause__)
    assert hub.repos == {}


def test_a_foreign_name_says_what_the_token_may(hub: HubServer, student: Path) -> None:
    with pytest.raises(InputError, match="may not write there"):
        publish(student, "somebody/tiny", token=TOKEN, endpoint=hub.endpoint)


def test_a_malformed_name_is_one_line(hub: HubServer, student: Path) -> None:
    with pytest.raises(InputError, match="'a/b/c'") as caught:
        publish(student, "a/b/c", token=TOKEN, endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_one_line(hub: HubServer, student: Path) -> None:
    with HubServer() as closed:
        gone = closed.endpoint
    with pytest.raises(InputError, match="the Hub cannot be reached") as caught:
        publish(student, "tiny", token=TOKEN, endpoint=gone)
    assert "\n" not in str(caught.value)


def test_offline_mode_is_one_line(student: Path) -> None:
    with pytest.raises(InputError, match="the Hub cannot be reached") as caught:
        publish(student, "tiny", token=TOKEN)
    assert "\n" not in str(caught.value)


PUSH = """
import sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
source, out, repo = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source)
rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 2, "labels": [[1, 2, 3, 4]] * 2})
args = TrainingArguments(
    out, push_to_hub=True, hub_model_id=repo, hub_private_repo=True, max_steps=2, save_steps=1,
    use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2,
)
trainer = Trainer(
    model, args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(source)
)
trainer.train()
print(trainer.push_to_hub().oid)
again = AutoModelForCausalLM.from_pretrained(repo, force_download=True).state_dict()
assert all(torch.equal(v, again[k]) for k, v in trainer.model.state_dict().items())
"""


def test_trainers_own_push_works_against_this_hub(
    hub: HubServer, student: Path, tmp_path: Path
) -> None:
    name = f"{USER}/pushed"
    out = run_client(PUSH, hub, tmp_path / "home", str(student), str(tmp_path / "out"), name)
    repo = hub.repo(name)
    assert repo.private is True
    assert out.split()[-1] == repo.branches["main"]
    files = repo.files()
    assert files is not None
    assert {"README.md", "model.safetensors", "tokenizer.json", "config.json"} <= set(files)


PUSH_RECORDING = """
import sys
from hf_distill import load_recording
load_recording(sys.argv[1]).push_to_hub(sys.argv[2], private=True)
"""

LOAD_RECORDING = """
import hashlib, sys
from hf_distill import load_recording
rows = load_recording(sys.argv[1])
print(len(rows), hashlib.sha256(b"".join(rows[:]["recording"])).hexdigest())
"""


def test_a_pushed_recording_is_loaded_back_equal(hub: HubServer, tmp_path: Path) -> None:
    """As Parquet, with the clients that people have; and trains."""
    rows = Dataset.from_list(make_rows(12, 0))
    made = record(rows, small_model(1), tmp_path / "r", k=6, data_collator=Collator(1, 0))
    name = f"{USER}/said"
    run_client(PUSH_RECORDING, hub, tmp_path / "home", str(tmp_path / "r"), name)
    assert hub.repos["dataset", name].private
    files = hub.repos["dataset", name].files("main") or {}
    assert any(path.endswith(".parquet") for path in files)
    told = run_client(LOAD_RECORDING, hub, tmp_path / "other", name)
    digest = hashlib.sha256(b"".join(made[:]["recording"])).hexdigest()
    assert told.split() == ["12", digest]
