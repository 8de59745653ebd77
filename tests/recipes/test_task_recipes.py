"""The shipped recipes of other tasks than causal language modelling, on small local files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, load_from_disk
from peft import AutoPeftModelForSequenceClassification
from run_setup import ROOT, invoke, launch, metrics
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
)

from hf_distill.data import DataConfig, read_task_rows
from hf_distill.data.task_rows import without_blanks
from hf_distill.errors import InputError
from hf_distill.models.from_scratch import train_tokenizer
from hf_distill.recipes import load_recipe

PLANTS = ("rose", "iris", "fern")
WORDS = ("stone", "river", "cloud", "field", "light", "water")
BERT = "model_type: bert, hidden_size: 16, num_attention_heads: 2, intermediate_size: 24"
T5 = "model_type: t5, d_model: 16, num_heads: 2, d_kv: 8, d_ff: 24, num_layers: 2"
QUIET = "eval_strategy: 'no', save_strategy: 'no'"
TEACHERS = {
    "bert": f"{{config: {{{BERT}, num_hidden_layers: 2}}, train: {{max_steps: 3, {QUIET}}}}}",
    "t5": f"{{config: {{{T5}, num_decoder_layers: 2}}, train: {{max_steps: 3, {QUIET}}}}}",
}
CLASSES = ("accuracy", "macro_f1", "ce", "kl_to_teacher", "top1_agreement", "calibration_error")


def rows_of(task: str) -> list[dict[str, Any]]:
    """Forty rows of a task, no two of them equal."""
    draw, rows = random.Random(0), []
    for number in range(40):
        words = draw.choices(WORDS, k=4)
        text, plant = " ".join(words), PLANTS[number % 3]
        answer = str(1900 + number)
        rows.append(
            {
                "classification": {"text": f"{text} {plant} {number}", "label": plant},
                "tagging": {"tokens": [*words, plant], "tags": ["O"] * 4 + ["B-PLANT"]},
                "question_answering": {
                    "question": "which year ?",
                    "context": f"{text} in {answer} .",
                    "answers": {"text": [answer], "answer_start": [len(text) + 4]},
                },
                "summarization": {"document": f"{text} {number}", "summary": words[0]},
                "translation": {"translation": {"en": f"{text} {number}", "es": text[::-1]}},
                "masked_lm": {"text": f"{text} {plant} {number} grows by {draw.choice(WORDS)}"},
            }[task]
        )
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(folder: Path, name: str, /, **more: Any) -> list[str]:
    """`--set` options that make a shipped recipe small and local."""
    architecture = "t5" if name in ("summarization", "translation") else "bert"
    keys = {
        "output_dir": folder / "runs",
        "data.train": write(folder / f"{name}.jsonl", rows_of(name)),
        "data.max_length": 32,
        "data.eval_fraction": 0.25,
        "tokenizer.vocab_size": 280,
        "teacher": TEACHERS[architecture],
        "student.layers": "[0]",
        "train.max_steps": 2,
        "train.eval_strategy": "'no'",
        "train.save_strategy": "'no'",
        "train.global_batch_size": 8,
        "evaluate.prompts": 3,
        "evaluate.num_beams": 1,
        "evaluate.speed": "false",
    }
    # Keys of a section that is replaced come after it; None leaves one out.
    keys |= {key.replace("__", "."): value for key, value in more.items()}
    given = {key: value for key, value in keys.items() if value is not None}
    return [word for key, value in given.items() for word in ("--set", f"{key}={value}")]


def run(folder: Path, name: str, /, **more: Any) -> Any:
    return invoke("run", ROOT / "recipes" / f"{name}.yaml", *options(folder, name, **more))


def message(folder: Path, name: str, /, **more: Any) -> str:
    """The error of a run that is refused, which is one line."""
    done = run(folder, name, **more)
    assert done.exit_code == 2, done.output
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr


# ---- Whole runs ----

SHIPPED = {
    "classification": ({}, CLASSES, "AutoModelForSequenceClassification"),
    "question_answering": ({"data__stride": 4}, ("exact_match", "f1"), "ForQuestionAnswering"),
    "masked_lm": ({}, ("perplexity", "accuracy", "kl_to_teacher"), "AutoModelForMaskedLM"),
    "summarization": (
        {"student__layers": "{decoder: [1]}", "data__max_target_length": 8},
        ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "perplexity"),
        "AutoModelForSeq2SeqLM",
    ),
    "translation": ({"data__max_target_length": 16}, ("bleu", "chrf"), "AutoModelForSeq2SeqLM"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_from_rows_to_report(name: str, tmp_path: Path) -> None:
    more, keys, loader = SHIPPED[name]
    done = run(tmp_path, name, **more)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / name
    found = metrics(folder)
    for role in ("teacher", "initial", "baseline", "student"):
        assert set(keys) <= found[role].keys(), role
        assert found[role]["parameters"] > 0
    assert found["student"]["parameters"] < found["teacher"]["parameters"]
    assert found["teacher"].get("top1_agreement") == 1.0
    assert found["teacher"].get("kl_to_teacher", 0.0) == 0.0
    assert len(found["examples"]) == 3
    roles = {"prompt", "reference", "teacher", "baseline", "student"}
    assert all(set(example) == roles for example in found["examples"])
    page = (folder / "report.html").read_text()
    assert "those that the student gets wrong first" in page
    card = (folder / "student" / "README.md").read_text()
    assert loader in card
    assert "## Examples" in card
    assert "of the sets" not in page + card  # there is one set, without a name


def test_a_recorded_classifier_and_tags(tmp_path: Path) -> None:
    both = {"record__kind": "full", "train__features": "{hidden_mse: 1.0}"}
    assert "a recording has no inner states" in message(tmp_path, "classification", **both)
    recorded = run(tmp_path, "classification", record__kind="full", name="recorded")
    assert recorded.exit_code == 0, recorded.output
    assert (tmp_path / "runs" / "recorded" / "recording" / "train").exists()
    tags = {"name": "tags", "task": "token-classification", "train__features": "{hidden_mse: 2}"}
    file = write(tmp_path / "tags.jsonl", rows_of("tagging"))
    done = run(tmp_path, "classification", data__train=file, **tags)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "tags"
    assert "hidden_mse x 2 (layers uniform)" in (folder / "student" / "README.md").read_text()
    logs = [
        json.loads((folder / m / "log_history.json").read_text()) for m in ("student", "baseline")
    ]
    assert ["hidden_mse" in str(log) for log in logs] == [True, False]
    student = metrics(folder)["student"]
    assert {"accuracy", "macro_f1", "entity_f1"} <= student.keys()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder without a head, and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    texts = [row["text"] for row in rows_of("classification")] * 2
    tokenizer = train_tokenizer(texts, 300, model_max_length=32, task="sequence-classification")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=300, intermediate_size=48, pad_token_id=1, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_is_fine_tuned_and_its_figures_are_those_of_the_saved_models(
    encoder: Path, tmp_path: Path
) -> None:
    done = run(
        tmp_path,
        "classification",
        teacher=f"{{model: {encoder}, train: {{max_steps: 80, learning_rate: 3e-3, {QUIET}}}}}",
        tokenizer__vocab_size=None,
        train__max_steps=20,
        train__learning_rate="5e-3",
    )
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "classification"
    found = metrics(folder)
    assert found["teacher"]["accuracy"] == 1.0
    held = load_from_disk(str(folder / "data" / "text" / "eval"))
    for role in ("teacher", "baseline", "student"):
        model = AutoModelForSequenceClassification.from_pretrained(folder / role)
        assert [model.config.id2label[i] for i in range(3)] == sorted(PLANTS)
        tokenizer = AutoTokenizer.from_pretrained(folder / role)
        right = 0
        for row in held:
            said = int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax())
            right += said == row["label"]
        assert found[role]["accuracy"] == pytest.approx(right / len(held))


# ---- Adapters, several processes ----


@pytest.mark.slow
def test_an_adapter_classifies(tmp_path: Path) -> None:
    """The head is trained beside the adapters, saved with them, and found again."""
    lora = {"student__lora": "{r: 4}", "train__learning_rate": 0.005, "train__max_steps": 60}
    teacher = f"{{config: {{{BERT}, num_hidden_layers: 2}}, "
    teacher += f"train: {{max_steps: 60, learning_rate: 1e-2, {QUIET}}}}}"
    done = run(tmp_path, "classification", teacher=teacher, train__alpha=1.0, **lora)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "classification"
    found = metrics(folder)
    card = (folder / "student" / "README.md").read_text()
    assert "from peft import AutoPeftModelForSequenceClassification" in card
    assert not (folder / "student" / "model.safetensors").exists()
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder / "student", num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    held = load_from_disk(str(folder / "data" / "text" / "eval"))
    with torch.no_grad():
        said = [
            int(model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits.argmax())
            for row in held
        ]
    accuracy = sum(a == b for a, b in zip(said, held["label"], strict=True)) / len(held)
    assert found["student"]["accuracy"] == pytest.approx(accuracy)
    assert found["student"]["kl_to_teacher"] < found["initial"]["kl_to_teacher"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["question_answering", "summarization"])
def test_two_processes_end_where_one_does(name: str, tmp_path: Path) -> None:
    """With windows and written texts gathered from both, and targets that both let write."""
    exact = {"train__bf16": "false", "evaluate__batch_size": 3}
    config, train = "", f"max_steps: 3, bf16: false, global_batch_size: 8, {QUIET}"
    if name == "summarization":
        exact |= {"data__max_target_length": 8, "student__layers": "{decoder: [1]}"}
        exact |= {"annotate__shard_rows": 4, "train__alpha": 0.5}
        config = f"{T5}, num_decoder_layers: 2, dropout_rate: 0.0"
    else:
        exact |= {"data__stride": 4}
        config = f"{BERT}, num_hidden_layers: 2, hidden_dropout_prob: 0.0"
        config += ", attention_probs_dropout_prob: 0.0"
    exact["teacher"] = f"{{config: {{{config}}}, train: {{{train}}}}}"
    done = run(tmp_path, name, name="one", **exact)
    assert done.exit_code == 0, done.output
    words = options(tmp_path, name, name="two", **exact)
    recipe = ROOT / "recipes" / f"{name}.yaml"
    launched = launch(recipe, "cpu2.yaml", *words[1::2], cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr[-3000:]
    one, two = (metrics(tmp_path / "runs" / folder) for folder in ("one", "two"))
    assert two["machine"]["processes"] == 2
    for role in ("teacher", "initial", "baseline", "student"):
        for key in set(one[role]) - {"train_seconds"}:
            assert two[role][key] == pytest.approx(one[role][key], rel=2e-3, abs=1e-3), (role, key)
    assert two["examples"] == one["examples"]


# ---- Rows without labels ----


def unlabelled(folder: Path) -> Path:
    """Six new rows, one of them twice, and a row that the labelled ones have too."""
    known = rows_of("classification")[0]["text"]
    texts = [f"a {plant} of {number}" for number in range(2) for plant in PLANTS]
    return write(folder / "more.jsonl", [{"text": one} for one in (*texts, texts[0], known)])


def test_rows_without_labels_are_for_the_student_alone(tmp_path: Path) -> None:
    plain = run(tmp_path, "classification", name="plain")
    assert plain.exit_code == 0, plain.output
    done = run(tmp_path, "classification", name="more", data__unlabelled=unlabelled(tmp_path))
    assert done.exit_code == 0, done.output
    folder, without = (tmp_path / "runs" / name for name in ("more", "plain"))
    tokens = load_from_disk(str(folder / "data" / "unlabelled"))
    assert list(tokens["labels"]) == [-100] * 6
    texts = AutoTokenizer.from_pretrained(folder / "student").batch_decode(
        tokens[:]["input_ids"], skip_special_tokens=True
    )
    assert sorted(texts) == sorted(f"a {p} of {n}" for n in range(2) for p in PLANTS)
    labelled = load_from_disk(str(folder / "data" / "train"))
    assert f", {len(labelled) + 6} rows, 8 a step" in done.output
    weights = {
        (name, role): (path / role / "model.safetensors").read_bytes()
        for name, path in (("more", folder), ("plain", without))
        for role in ("teacher", "baseline", "student")
    }
    for role in ("teacher", "baseline"):
        assert weights["more", role] == weights["plain", role]
    assert weights["more", "student"] != weights["plain", "student"]
    sentence = "The student was also trained on rows without labels, by the divergence alone; the"
    assert sentence in (folder / "report.html").read_text()
    assert sentence in (folder / "student" / "README.md").read_text()
    table = json.loads((folder / "data" / "preparation.json").read_text())["steps"]
    (step,) = (step for step in table if step["name"] == "unlabelled")
    removed = {**step["removed"]}
    assert removed.pop("equal to an earlier row") == 1
    assert removed in (
        {"with the text of an evaluation row": 1}, {"with the text of a row with a label": 1},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["several", "regression"])
def test_no_label_of_other_problems(kind: str, tmp_path: Path) -> None:
    rows = [
        {**row, "label": [row["label"]] if kind == "several" else number / 8}
        for number, row in enumerate(rows_of("classification"))
    ]
    done = run(
        tmp_path,
        "classification",
        data__train=write(tmp_path / "rows.jsonl", rows),
        data__unlabelled=unlabelled(tmp_path),
        train__divergence="forward_kl",
    )
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "classification"
    for row in load_from_disk(str(folder / "data" / "unlabelled")):
        given = row["labels"]
        assert given == [-100.0] * 3 if kind == "several" else given != given
    figures = metrics(folder)["student"]
    assert ("micro_f1" if kind == "several" else "mse_to_teacher") in figures


def test_rows_without_labels_that_do_not_fit(tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [{"premise": "a rose", "hypothesis": "a plant"}])
    said = message(tmp_path, "classification", data__unlabelled=pairs)
    assert "the rows without labels are pairs of texts, the others single texts" in said
    known = write(tmp_path / "known.jsonl", rows_of("classification"))
    said = message(tmp_path, "classification", data__unlabelled=known)
    assert "no row without a label is left, all are rows of other splits" in said
    other = write(tmp_path / "other.jsonl", [{"body": "a rose"}])
    said = message(tmp_path, "classification", data__unlabelled=other)
    assert "other.jsonl: the columns body hold no text: name it by" in said
    given = {"data__unlabelled": known}
    said = message(tmp_path, "classification", **given, train__alpha=0)
    assert "rows without labels count in the divergence only: raise train.alpha" in said
    said = message(tmp_path, "classification", **given, train__max_steps=-1)
    assert "has data.unlabelled, which gives the student more rows than the baseline" in said
    said = message(tmp_path, "masked_lm", **given)
    assert "sets data.unlabelled, which the task masked-lm does not use" in said


# ---- What is refused ----

REFUSED = {
    "data.stride=3": "sets data.stride, which the task sequence-classification does not use (it",
    "data.packing=false": "sets data.packing, which the task sequence-classification does not use",
    "data.format=questions": "data.format questions, but that task takes labelled",
    "task=classification": "task is 'classification', but must be 'causal-lm', 'seq2seq-lm'",
    "data.columns={text: 3}": "data.columns.text is 3, but must be a valid string",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_does_not_fit_the_task(override: str) -> None:
    with pytest.raises(InputError) as raised:
        load_recipe(ROOT / "recipes" / "classification.yaml", [override])
    assert REFUSED[override] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_column_of_masked_language_models() -> None:
    with pytest.raises(InputError, match=r"sets data.columns, .*: use data.text_column instead"):
        load_recipe(ROOT / "recipes" / "masked_lm.yaml", ["data.columns={text: body}"])


def test_masks_and_answers_are_not_recorded() -> None:
    for name in ("masked_lm", "question_answering"):
        with pytest.raises(InputError, match="whose teacher cannot be recorded, since"):
            load_recipe(ROOT / "recipes" / f"{name}.yaml", ["record.k=4"])


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{"text": "a rose", "label": "tree"}])
    said = message(tmp_path, "classification", data__eval=other)
    assert "other.jsonl: row 0: the label 'tree' is none of the 3 classes" in said
    named = message(tmp_path, "classification", data__columns="{text: body}")
    assert "columns names 'body', but there is only text, label" in named
    empty = write(tmp_path / "empty.jsonl", [{"document": " ", "summary": "x"}])
    assert "row 0: 'document' is empty" in message(
        tmp_path, "summarization", data__eval=empty, data__train=empty
    )
    assert not (tmp_path / "runs" / "classification").exists()


def test_blank_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    good = [{"document": f"the dog {n}", "summary": f"dog {n}"} for n in range(9)]
    bad = [{"document": " ", "summary": "x"}, {"document": "y", "summary": None}]
    config = DataConfig(train=str(write(tmp_path / "rows.jsonl", [*bad, *good])), eval_fraction=0.2)
    found = read_task_rows(config, "seq2seq-lm", seed=0, work_dir=tmp_path / "work")
    assert sum(map(len, found.rows.values())) == 9
    assert found.table.steps[0].removed == {"blank": 2}
    labels = ClassLabel(names=["a", "b"])
    texts = Dataset.from_dict({"text": ["a rose", "", "z"], "label": [0, 1, -1]})
    texts = texts.cast_column("label", labels)
    kept, removed = without_blanks(texts, "sequence-classification", None)
    assert kept["text"] == ["a rose"]
    assert removed == {"without a label": 1, "blank": 1}


def test_masked_language_models_take_the_text_beside_other_columns(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {n}", "output": f"{n}", "text": f"all {n}"} for n in range(9)]
    config = DataConfig(train=str(write(tmp_path / "rows.jsonl", rows)), eval_fraction=0.2)
    found = read_task_rows(config, "masked-lm", seed=0, work_dir=tmp_path / "work").rows
    assert found["train"].column_names == ["text"]


def test_models_that_do_not_fit(encoder: Path, tmp_path: Path) -> None:
    given = {"teacher": f"{{model: {encoder}}}", "tokenizer__vocab_size": None}
    said = message(tmp_path, "classification", **given)
    assert "was saved as a BertModel, without a head for sequence-classification, so that" in said
    said = message(tmp_path, "translation", **given, data__max_target_length=16)
    assert "the task is seq2seq-lm, but teacher" in said
    assert "is a bert, which has no head for it: give a model for seq2seq-lm" in said
    gpt2 = "{config: {model_type: gpt3}}"
    said = message(tmp_path, "classification", teacher=gpt2)
    assert "is no model for sequence-classification that transformers knows" in said
    planned = invoke(
        "plan", ROOT / "recipes" / "classification.yaml", *options(tmp_path, "classification")
    )
    assert planned.exit_code == 2
    assert "a plan is made for causal language models only" in planned.stderr


# ---- Rows ----


def test_contexts_stay_together_and_out_of_the_other_split(tmp_path: Path) -> None:
    rows = [
        {"question": f"what {i}", "context": f"{i // 4} is here", "answers": "here"}
        for i in range(80)
    ]
    file = write(tmp_path / "rows.jsonl", [*rows, rows[0]])
    config = DataConfig(train=str(file), eval_fraction=0.3)
    found = read_task_rows(config, "question-answering", seed=1, work_dir=tmp_path / "arrow").rows
    contexts = {split: set(found[split]["context"]) for split in ("train", "eval")}
    assert not contexts["train"] & contexts["eval"]
    assert len(found["train"]) + len(found["eval"]) == 80  # the repeated row is gone
    assert len(contexts["eval"]) == 6
    given = DataConfig(train=str(file), eval=str(write(tmp_path / "e.jsonl", rows[:2])))
    found = read_task_rows(given, "question-answering", seed=1, work_dir=tmp_path / "arrow").rows
    assert len(found["train"]) == 76
    small = given.model_copy(update={"max_train_rows": 5})
    sampled = read_task_rows(small, "question-answering", seed=1, work_dir=tmp_path / "arrow")
    assert len(sampled.rows["train"]) == 5
    assert set(sampled.rows["train"]["id"]) <= set(found["train"]["id"])


# ---- Predictions ----


def test_answers_of_a_trained_reader_are_texts_of_the_context(tmp_path: Path) -> None:
    """A teacher that answers perfectly has exact match 100, whatever the windows."""
    teacher = f"{{config: {{{BERT}, num_hidden_layers: 2, hidden_dropout_prob: 0.0}}"
    teacher += ", train: {max_steps: 100, learning_rate: 1e-2, " + QUIET + "}}"
    done = run(
        tmp_path,
        "question_answering",
        teacher=teacher,
        data__stride=4,
        baseline="false",
    )
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "question_answering"
    found = metrics(folder)
    held = {row["context"]: row for row in load_from_disk(str(folder / "data/text/eval"))}
    for example in found["examples"]:
        row = held[example["prompt"].split("\n\n")[1]]
        assert example["teacher"] in row["context"]
        assert example["reference"] == row["answers"]["text"][0]
    assert found["teacher"]["exact_match"] > 50
    assert (
        BertForQuestionAnswering.from_pretrained(folder / "student").config.num_hidden_layers == 1
    )
