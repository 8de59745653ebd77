"""Targets that the teacher writes in a recipe: who learns them, resume, forms of rows, errors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk
from run_setup import invoke, metrics, start
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_distill.errors import InputError
from hf_distill.recipes import parse_recipe

WORDS = ("stone", "river", "cloud", "field", "light", "water")
QUIET = "eval_strategy: 'no', save_strategy: 'no'"
T5 = "model_type: t5, d_model: 32, num_heads: 2, d_kv: 16, d_ff: 48, num_layers: 1"
GPT2 = "model_type: gpt2, n_layer: 2, n_embd: 16, n_head: 2, n_positions: 64"
RECIPE = """
name: {name}
seed: 0
output_dir: {folder}/runs
task: {task}
data: {{train: {folder}/{rows}.jsonl, max_length: 64, eval_fraction: 0.25{data}}}
tokenizer: {{vocab_size: 280}}
teacher: {{config: {{{config}}}, train: {{max_steps: 60, learning_rate: 1e-2, {quiet}}}}}
annotate: {{max_new_tokens: 6, shard_rows: 7}}
student: {{layers: [0]}}
train: {{max_steps: 2, global_batch_size: 4, {quiet}}}
evaluate: {{prompts: 2, speed: false, max_new_tokens: 4, batch_size: 32}}
"""


def rows_of(form: str) -> list[dict[str, Any]]:
    rows = []
    for number in range(32):
        source, target = f"{WORDS[number % 6]} {WORDS[number % 5]} {number}", WORDS[number % 6]
        rows.append(
            {
                "summaries": {"document": source, "summary": target},
                "prompts": {"prompt": source, "completion": target},
                "texts": {"text": f"{source} and {target}"},
            }[form]
        )
    return rows


def recipe(folder: Path, form: str = "summaries", name: str = "written") -> Path:
    """A recipe file and its rows."""
    (folder / f"{form}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows_of(form)))
    seq2seq = form == "summaries"
    text = RECIPE.format(
        name=name,
        folder=folder,
        rows=form,
        task="seq2seq-lm" if seq2seq else "causal-lm",
        config=T5 if seq2seq else GPT2,
        data=", max_target_length: 8" if seq2seq else ", packing: false",
        quiet=QUIET,
    )
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def run(path: Path, *overrides: str) -> Path:
    """The folder of a run."""
    done = invoke("run", path, *(word for one in overrides for word in ("--set", one)))
    assert done.exit_code == 0, done.output
    name = next((o[5:] for o in overrides if o.startswith("name=")), path.stem)
    return path.parent / "runs" / name


def texts(rows: Any, column: str, folder: Path) -> list[str]:
    """What a column of ids spells."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "tokenizer")
    ids = [[token for token in row if token != -100] for row in rows[column]]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def written(folder: Path) -> Dataset:
    shards = sorted((folder / "annotation" / "written").glob("*.arrow"))
    assert len(shards) > 1
    return Dataset.from_list([r for shard in shards for r in Dataset.from_file(str(shard))])


# ---- Who learns what ----


@pytest.fixture(scope="module")
def summaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(recipe(tmp_path_factory.mktemp("annotate")))


def test_the_student_learns_what_the_teacher_writes(summaries: Path) -> None:
    tokens = load_from_disk(str(summaries / "annotation" / "train"))
    original = load_from_disk(str(summaries / "data" / "train"))
    teacher = AutoModelForSeq2SeqLM.from_pretrained(summaries / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(summaries / "teacher")
    expected = {}
    for source in load_from_disk(str(summaries / "data" / "text" / "train"))["source"]:
        ids = teacher.generate(
            **tokenizer(source, return_tensors="pt"), max_new_tokens=6, do_sample=False
        )
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        if text.strip():
            expected[source] = text
    sources = texts(tokens, "input_ids", summaries)
    assert dict(zip(sources, texts(tokens, "labels", summaries), strict=True)) == expected
    assert tokens["labels"] != original["labels"]
    assert set(tokens.features) == set(original.features)
    kept = texts(original, "labels", summaries)
    assert set(kept) <= set(WORDS)  # what the baseline learns


def test_report_and_card_say_who_learnt_what(summaries: Path) -> None:
    page = (summaries / "report.html").read_text()
    card = (summaries / "student" / "README.md").read_text()
    sentence = (
        "The student was trained on targets that the teacher wrote (found with 1 beam); the "
        "baseline was trained on the original targets."
    )
    assert sentence in page
    assert sentence in card
    assert "the same rows" not in " ".join(page.split())
    assert "same rows" not in card
    assert ">annotate</th>" in page


def test_only_the_student_depends_on_what_was_written(summaries: Path) -> None:
    """Other settings of the texts repeat neither the teacher nor the baseline."""
    path = summaries.parent.parent / "written.yaml"
    before = (summaries / "baseline" / "model.safetensors").read_bytes()
    student = (summaries / "student" / "model.safetensors").read_bytes()
    done = invoke("run", path, "--set", "name=written", "--set", "annotate.num_beams=2",
                  "--set", "annotate.n=2", "--set", "annotate.keep_original=true")  # fmt: skip
    assert done.exit_code == 0, done.output
    for stage in ("prepare", "teacher", "student", "baseline"):
        assert f"{stage}: unchanged, skipped" in done.output
    assert (summaries / "baseline" / "model.safetensors").read_bytes() == before
    assert (summaries / "student" / "model.safetensors").read_bytes() != student
    tokens = load_from_disk(str(summaries / "annotation" / "train"))
    original = load_from_disk(str(summaries / "data" / "train"))
    there = written(summaries)
    assert len(there) == 2 * len(original)
    blank = sum(not text.strip() for text in there["target"])
    assert len(tokens) == 3 * len(original) - blank
    assert tokens[: len(original)] == original[:]
    assert (
        "The student was trained on targets that the teacher wrote (found with 2 beams, 2 for each "
        in (summaries / "report.html").read_text()
    )


def test_the_baseline_is_that_of_a_recipe_without_annotate(summaries: Path) -> None:
    plain = run(summaries.parent.parent / "written.yaml", "name=plain", "annotate=null")
    ours, theirs = (folder / "baseline" / "model.safetensors" for folder in (summaries, plain))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not (plain / "annotation").exists()


# ---- Causal language models ----


def test_prompts_are_answered_and_recorded(tmp_path: Path) -> None:
    """The student's rows are recorded, the baseline's are not."""
    folder = run(recipe(tmp_path, "prompts"), "record.kind=full", "annotate.max_new_tokens=null")
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    tokens = load_from_disk(str(folder / "annotation" / "train"))
    answers = written(folder)
    kept = [row for row in answers if row["completion"].strip()]
    assert len(kept) == len(tokens) > 0
    for row, ids in zip(kept, tokens, strict=True):
        asked = tokenizer(f"{row['prompt']}\n", return_tensors="pt")
        start = asked.input_ids.shape[1]
        assert ids["labels"][:start] == [-100] * start
        assert ids["input_ids"][:start] == asked.input_ids[0].tolist()
        said = teacher.generate(**asked, max_new_tokens=32, do_sample=False)[0, start:]
        text = tokenizer.decode(said, skip_special_tokens=True)
        assert text == row["completion"]
        assert tokenizer.decode(ids["labels"][start:], skip_special_tokens=True) == text
    recorded = folder / "recording" / "train" / "recording.json"
    assert json.loads(recorded.read_text())["rows"] == len(tokens)
    assert metrics(folder)["baseline"]["perplexity"] > 1


# ---- Interruptions ----


@pytest.mark.slow
def test_a_killed_annotation_goes_on(tmp_path: Path) -> None:
    """After SIGKILL within the stage, finished shards are kept and the result is the same."""
    path = recipe(tmp_path)
    drawn = ("annotate.do_sample=true", "annotate.shard_rows=2", "annotate.batch_size=1")
    whole = run(path, *drawn, f"output_dir={tmp_path / 'whole'}")
    whole = tmp_path / "whole" / whole.name
    process = start(path, *drawn)
    shard = tmp_path / "runs" / "written" / "work" / "annotate" / "written" / "shard-000002.arrow"
    deadline = time.monotonic() + 120
    while not shard.exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    kept = shard.with_name("shard-000000.arrow").stat().st_mtime_ns
    process.kill()
    process.join()
    folder = run(path, *drawn)
    assert (folder / "annotation/written/shard-000000.arrow").stat().st_mtime_ns == kept
    ours, theirs = written(folder), written(whole)
    assert ours.to_list() == theirs.to_list()
    tokens = [load_from_disk(str(f / "annotation" / "train")).to_list() for f in (folder, whole)]
    assert tokens[0] == tokens[1]


# ---- What is refused ----

REFUSED = {
    "annotate: {n: 2}": "annotate asks for 2 texts of a row, but 1 beam finds 1: set num_beams or",
    "annotate: {num_beams: 2, do_sample: true}": "texts are either drawn or searched",
    "annotate: {temperature: 0.5}": "has 'temperature', which is for draws: set do_sample to true",
    "annotate: {keep_original: true}\ntrain: {num_train_epochs: 1}": "gives the student more rows",
    "annotate: {}\ntask: masked-lm": "has 'annotate' for the task masked-lm, whose models",
    "annotate: {max_new_tokens: 512}": "prompt and text together have data.max_length, 512 tokens",
    "annotate: {}\nrecord: {max_rows: 3}": "has 'annotate' and record.max_rows, which would give",
    "annotate: {num_beam: 2}": "unknown key 'annotate.num_beam'; did you mean 'annotate.num_beams'",
}


@pytest.mark.parametrize("section", REFUSED)
def test_what_does_not_fit(section: str) -> None:
    text = "name: a\ndata: {train: a.txt}\nteacher: b\nstudent: c\n"
    with pytest.raises(InputError) as raised:
        parse_recipe(f"{text}{section}\n")
    assert REFUSED[section] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_plain_text_has_no_prompts(tmp_path: Path) -> None:
    done = invoke("run", recipe(tmp_path, "texts"))
    assert done.exit_code == 2
    assert "annotate lets the teacher answer prompts, but the rows are plain text" in done.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
