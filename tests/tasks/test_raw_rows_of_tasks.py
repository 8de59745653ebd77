"""The trainer takes the rows of every task as people have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from task_models import make_model
from task_text import CLASSES, RAW, word_pieces
from trainer_setup import arguments
from transformers import AutoTokenizer
from writing_setup import tokenizer as byte_level
from writing_setup import writer

from hf_distill import DistillationTrainer, InputError
from hf_distill.data import tokenize_questions
from hf_distill.data.task_rows import read_questions

CLASSIFY, TAG = "sequence-classification", "token-classification"
READ = {CLASSIFY: "6 rows of text + label tokenized", TAG: "6 rows of tokens + tags tokenized"}
SEVERAL = {"problem_type": "multi_label_classification"}


def model(task: str, seed: int = 0, **config: Any) -> Any:
    if task == "seq2seq-lm":
        return writer("t5", seed, **config)
    named = {"id2label": dict(enumerate(CLASSES))} if task in (CLASSIFY, TAG) else {}
    return make_model("Bert", task, seed, **(named | config))


def make(
    tmp_path: Path, task: str, rows: Any, config: Any = None, **options: Any
) -> DistillationTrainer:
    given = {k: options.pop(k) for k in ("eval_dataset", "data_collator") if k in options}
    tokenizer = byte_level() if task == "seq2seq-lm" else word_pieces()
    return DistillationTrainer(
        model(task, 0, **(config or {})),
        model(task, 1, **(config or {})),
        arguments(tmp_path, **({"max_steps": 2} | options)),
        train_dataset=rows,
        processing_class=tokenizer,
        **given,
    )


@pytest.mark.parametrize("kind", ["dataset", "list"])
@pytest.mark.parametrize("task", RAW)
def test_raw_rows_train(
    task: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: Any = RAW[task] if kind == "list" else Dataset.from_list(RAW[task])
    trainer = make(tmp_path, task, rows, eval_dataset={"held": rows}, seed=5)
    told = [line for line in capsys.readouterr().out.splitlines() if "_dataset" in line]
    assert [line.partition(":")[0] for line in told] == ["train_dataset", "eval_dataset['held']"]
    assert READ.get(task, "6 rows tokenized") in told[0]
    assert "at most 40 tokens a row" in told[0]
    trainer.train()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_held_loss"] > 0
    assert first["eval_held_loss"] == second["eval_held_loss"]  # the same masks
    later = trainer.evaluate({"held": rows})  # type: ignore[arg-type]
    assert later["eval_held_loss"] == first["eval_held_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == first["eval_held_loss"]
    predicted = trainer.predict(rows)  # type: ignore[arg-type]
    assert predicted.metrics
    assert predicted.metrics["test_loss"] == first["eval_held_loss"]
    assert f"test_dataset: {READ.get(task, '6 rows tokenized')}" in capsys.readouterr().out


def test_a_model_that_is_made_later_decides_what_rows_are(tmp_path: Path) -> None:
    """Text and label would else become rows of a language model."""
    trainer = DistillationTrainer(
        None,
        model(CLASSIFY, 1),
        arguments(tmp_path, max_steps=1),
        model_init=lambda: model(CLASSIFY, 0),
        train_dataset=Dataset.from_list(RAW[CLASSIFY]),
        processing_class=word_pieces(),
    )
    trainer.train()
    assert next(iter(trainer.get_train_dataloader()))["labels"].dim() == 1


def test_a_student_from_a_checkpoint_without_its_head(tmp_path: Path) -> None:
    """It gets the teacher's task and classes, and not those of a language model."""
    language_model, teacher = model("masked-lm"), model(CLASSIFY, 1)
    language_model.base_model.save_pretrained(tmp_path / "headless")
    language_model.save_pretrained(tmp_path / "masked")
    teacher.save_pretrained(tmp_path / "teacher")

    def student(name: str, teacher: Any, **options: Any) -> Any:
        return DistillationTrainer(
            str(tmp_path / name), teacher, arguments(tmp_path, alpha=0.5 if teacher else 0.0),
            train_dataset=RAW[CLASSIFY], processing_class=word_pieces(), **options,
        ).model  # fmt: skip

    for found in (
        student("headless", teacher),
        student("headless", str(tmp_path / "teacher")),
        student("masked", teacher, task=CLASSIFY),
    ):
        assert type(found).__name__ == "BertForSequenceClassification"
        assert found.config.id2label == dict(enumerate(CLASSES))
    with pytest.raises(InputError, match="without the head of a task, and no teacher .* task="):
        student("headless", None)


def test_windows_keep_their_answer_masks(tmp_path: Path) -> None:
    task = "question-answering"
    trainer = make(tmp_path, task, Dataset.from_list(RAW[task]), max_length=24, doc_stride=6)
    expected, _ = tokenize_questions(
        read_questions(Dataset.from_list(RAW[task])), word_pieces(), max_length=24, stride=6
    )
    found: Any = trainer.train_dataset
    assert found.to_list() == expected.to_list()
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["answer_mask"].shape == batch["input_ids"].shape
    assert 0 < int(batch["answer_mask"].sum()) < int(batch["attention_mask"].sum())


def test_settings_of_sources_and_targets(tmp_path: Path) -> None:
    rows = [{"translation": {"en": "the dog " * 9, "es": "fox " * 9}}] * 4
    languages = {"source_lang": "en_XX", "target_lang": "es"}
    trainer = make(
        tmp_path, "seq2seq-lm", rows, **languages, source_prefix="say: ", max_length=20,
        max_target_length=8,
    )  # fmt: skip
    row, tokenizer = trainer.train_dataset[0], byte_level()
    assert tokenizer.decode(row["input_ids"]).startswith("say: the dog")
    assert tokenizer.decode(row["labels"]).startswith("fox")
    assert (len(row["input_ids"]), len(row["labels"])) == (20, 8)
    with pytest.raises(InputError, match="translation holds en, es: set source_lang"):
        make(tmp_path, "seq2seq-lm", rows)
    with pytest.raises(InputError, match="holds en, es, but no 'fr'"):
        make(tmp_path, "seq2seq-lm", rows, source_lang="en", target_lang="fr")


# ---- Labels ----


def labels(tmp_path: Path, rows: Any, config: Any = None, task: str = CLASSIFY) -> Any:
    trainer = make(tmp_path, task, rows, config)
    trainer.train()
    return trainer.train_dataset["labels"]


def test_classes_are_those_of_the_model(tmp_path: Path) -> None:
    def rows(feature: Any, given: list[Any]) -> Dataset:
        columns = {"text": ["the cat"] * len(given), "label": given}
        return Dataset.from_dict(columns, Features({"text": Value("string"), "label": feature}))

    def found(*arguments: Any, config: Any = None) -> list[Any]:
        return labels(tmp_path, rows(*arguments), config)

    assert found(Value("string"), ["cow", "ant"]) == [2, 0]
    assert found(Value("int64"), [4, 1]) == [4, 1]
    assert found(ClassLabel(names=["COW", "bee"]), [0, 1]) == [2, 1]  # by name
    assert found(ClassLabel(names=["x", "y"]), [0, 1]) == [0, 1]
    assert found(List(Value("string")), [["cow"], ["ant", "eel"]], config=SEVERAL) == [
        [0, 0, 1, 0, 0], [1, 0, 0, 0, 1],
    ]  # fmt: skip
    one = {"num_labels": 1, "id2label": {0: "LABEL_0"}}
    assert found(Value("int64"), [3, 1], config=one) == [3.0, 1.0]


def test_rows_without_a_label_are_for_the_teacher_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["the cat", "the dog", "the fox"]
    for given, config, expected in (
        (["cow", None, "ant"], None, [2, -100, 0]),
        ([1, -100, 2], None, [1, -100, 2]),
        ([["cow"], None, []], SEVERAL, [[0, 0, 1, 0, 0], [-100] * 5, [0] * 5]),
    ):
        rows = Dataset.from_dict({"text": texts, "label": given})
        assert labels(tmp_path, rows, config) == expected
        assert "1 without a label, for the divergence only" in capsys.readouterr().out
    rows = Dataset.from_dict({"text": texts, "label": [0.5, None, 2.0]})
    found = labels(tmp_path, rows, {"num_labels": 1, "id2label": {0: "LABEL_0"}})
    assert torch.tensor(found).isnan().tolist() == [False, True, False]


def test_labels_that_are_all_unknown(tmp_path: Path) -> None:
    given = [{"text": "the dog", "label": None}] * 4
    assert labels(tmp_path, Dataset.from_list(given)) == [-100] * 4
    with pytest.raises(InputError, match="no row of train_dataset has a label, and with alpha=0"):
        make(tmp_path, CLASSIFY, Dataset.from_list(given), alpha=0.0)


@pytest.mark.parametrize("task", [CLASSIFY, "question-answering"])
def test_rows_to_predict_need_no_labels(task: str, tmp_path: Path) -> None:
    column = {CLASSIFY: "label", "question-answering": "answers"}[task]
    trainer = make(tmp_path, task, RAW[task])
    known = trainer.predict(Dataset.from_list(RAW[task]))  # type: ignore[arg-type]
    listed = [{k: v for k, v in row.items() if k != column} for row in RAW[task]]
    for rows in (Dataset.from_list(listed), listed):
        found = trainer.predict(rows)  # type: ignore[arg-type]
        assert np.array_equal(np.asarray(found.predictions), np.asarray(known.predictions))
        with pytest.raises(InputError, match="eval_dataset has the columns"):
            trainer.evaluate(rows)  # type: ignore[arg-type]


def test_a_byte_level_tokenizer_is_saved_with_its_spaces(tmp_path: Path) -> None:
    rows = [{"tokens": ["the", "dog"], "tags": [0, 1]}] * 2
    trainer = DistillationTrainer(
        make_model("Bert", TAG, 0, vocab_size=300), None, arguments(tmp_path, alpha=0.0),
        train_dataset=Dataset.from_list(rows), processing_class=byte_level(ends=False),
    )  # fmt: skip
    trainer.save_model(str(tmp_path / "student"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert saved("the dog")["input_ids"] == trainer.train_dataset[0]["input_ids"]


def test_a_student_without_class_names_gets_its_teachers(tmp_path: Path) -> None:
    names = {i: f"LABEL_{i}" for i in range(len(CLASSES))}
    student = model(CLASSIFY, 0, id2label=names)
    trainer = DistillationTrainer(
        student, model(CLASSIFY, 1), arguments(tmp_path), train_dataset=RAW[CLASSIFY],
        processing_class=word_pieces(),
    )  # fmt: skip
    assert trainer.model.config.id2label == dict(enumerate(CLASSES))


@pytest.mark.parametrize("given", ["words", "another order"])
def test_names_in_rows_are_those_that_the_teacher_gives(given: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": "the dog", "label": name} for name in CLASSES])
    if given == "another order":
        rows = rows.cast_column("label", ClassLabel(names=list(reversed(CLASSES))))
    student = model(CLASSIFY, 0, id2label={i: f"LABEL_{i}" for i in range(len(CLASSES))})
    trainer = DistillationTrainer(
        student, model(CLASSIFY, 1), arguments(tmp_path), train_dataset=rows,
        processing_class=word_pieces(),
    )  # fmt: skip
    assert trainer.train_dataset["labels"] == list(range(len(CLASSES)))


def test_weights_come_along(tmp_path: Path) -> None:
    for task, expected in ((CLASSIFY, 6), ("question-answering", 9)):
        rows = [{**row, "ce_weight": float(n)} for n, row in enumerate(RAW[task])]
        trainer = make(tmp_path, task, rows, max_length=30)
        found = trainer.train_dataset["ce_weight"]
        assert len(found) >= expected  # a question may have several windows
        assert sorted(set(found)) == list(map(float, range(6)))
        trainer.train()


# ---- Rows that have token ids ----


def test_rows_with_ids_get_the_collator_of_their_task(tmp_path: Path) -> None:
    rows = [{"input_ids": [2, 5 + n, 3][: 2 + n % 2], "label": n % 5} for n in range(8)]
    dataset = Dataset.from_list(rows)
    trainer = make(tmp_path, CLASSIFY, dataset, eval_dataset=dataset)
    assert trainer.train_dataset is dataset
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_masks_of_training_follow_the_seed(tmp_path: Path) -> None:
    rows = [{"input_ids": [2, *range(5, 20), 3]} for _ in range(4)]

    def batch(seed: int) -> Any:
        made = make(tmp_path, "masked-lm", rows, seed=seed, mlm_probability=0.4)
        return made.data_collator(rows)["labels"]

    assert torch.equal(batch(1), batch(1))
    assert not torch.equal(batch(1), batch(2))


# ---- One clear line ----

CAUSAL_IDS = [{"input_ids": [5, 6]}]
REFUSED: list[tuple[str, Any, Any, dict[str, Any], str]] = [
    ("seq2seq-lm", CAUSAL_IDS, {}, {}, "as for a causal model, but the student is an encoder-dec"),
    ("seq2seq-lm", [{"text": "the dog"}], {}, {}, "has the columns text: rows need input_ids, or"),
    ("seq2seq-lm", RAW["seq2seq-lm"], {}, {"packing": True}, "packing is True, but train_dataset"),
    (CLASSIFY, [{"text": "a", "label": 5}], {}, {}, "row 0: the label 5 is none of the 5 classes"),
    (CLASSIFY, [{"text": "a", "label": "owl"}], {}, {}, r"label 'owl' is none of .* \(ant, bee"),
    (CLASSIFY, [{"text": "a", "label": ["ant", "bee"]}], {}, {}, "several labels a row, but the"),
    (CLASSIFY, [{"text": "a", "label": "ant"}], SEVERAL, {}, "one label a row, but the student g"),
    (CLASSIFY, [{"text": "a", "label": 0.5}], {}, {}, "holds fractions, but the student has 5 cl"),
    (CLASSIFY, [{"text": " ", "label": 1}], {}, {}, "train_dataset: row 0: 'text' is empty"),
    (CLASSIFY, RAW[CLASSIFY], {}, {"max_length": 41}, "max_length is 41, but the student takes 40"),
    (CLASSIFY, [{"text": "a", "label": "ant"}], {"num_labels": 1, "id2label": {0: "LABEL_0"}}, {},
     "holds string, but the student predicts a number"),
    (TAG, [{"tokens": ["a"], "tags": [7]}], {}, {}, "the label 7 is none of the 5 classes"),
    ("question-answering", [{"question": "a", "context": "b", "answers": "c"}], {}, {},
     "the context does not contain the answer 'c'"),
    ("masked-lm", [{"text": "a", "ce_weight": 1.0}], {}, {}, "which cannot be kept"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["dataset", "list"])
@pytest.mark.parametrize(
    ("task", "rows", "config", "options", "message"), REFUSED, ids=[case[-1] for case in REFUSED]
)
def test_refused(
    task: str, rows: Any, config: Any, options: Any, message: str, kind: str, tmp_path: Path
) -> None:
    given = Dataset.from_list(rows) if kind == "dataset" else rows
    with pytest.raises(InputError, match=message) as error:
        make(tmp_path, task, given, config, **options)
    assert "\n" not in str(error.value)


def test_streams_of_raw_rows(tmp_path: Path) -> None:
    stream = Dataset.from_list(RAW[CLASSIFY]).to_iterable_dataset()
    with pytest.raises(InputError, match="is a stream of raw rows for sequence classification"):
        make(tmp_path, CLASSIFY, stream)


def test_a_longer_source_than_the_model_is_cut_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "the cat sat . " * 20, "label": 1}, {"text": "the cat", "label": 1}]
    trainer = make(tmp_path, CLASSIFY, rows)
    assert "2 rows of text + label tokenized; 1 cut at 40 tokens" in capsys.readouterr().out
    assert max(map(len, trainer.train_dataset["input_ids"])) == 40


def test_the_columns_that_were_read_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that a misspelt second text does not go unnoticed."""
    for names, said in (
        (("premise", "hypothesis", "label"), "premise + hypothesis + label"),
        (("sentence", "sentense2", "labels"), "sentence + labels"),
    ):
        values = ["the cat", "the dog", 1]
        make(tmp_path, CLASSIFY, [dict(zip(names, values, strict=True))] * 2)
        assert f"train_dataset: 2 rows of {said} tokenized, at m" in capsys.readouterr().out
    trainer = make(tmp_path, CLASSIFY, RAW[CLASSIFY])
    trainer.predict([{"content": "the dog"}])  # type: ignore[arg-type]
    assert "test_dataset: 1 row of content tokenized; 1 without a l" in capsys.readouterr().out


def test_figures_of_labels_need_labels(tmp_path: Path) -> None:
    """A cross-entropy of 0.0 would look like a perfect result."""
    trainer = make(tmp_path, CLASSIFY, RAW[CLASSIFY])
    found = trainer.evaluate([{"text": "the dog", "label": None}] * 3)  # type: ignore[arg-type]
    assert not {"eval_ce", "eval_teacher_ce"} & set(found)
    assert found["eval_loss"] > 0
    assert found["eval_loss"] == pytest.approx(
        trainer.args.alpha * trainer.args.temperature**2 * found["eval_forward_kl"]
    )
    assert 0 <= found["eval_top1_agreement"] <= 1
    assert {"eval_ce", "eval_teacher_ce"} <= set(trainer.evaluate(RAW[CLASSIFY]))  # type: ignore[arg-type]


def test_an_own_collator_gets_rows_as_they_are(tmp_path: Path) -> None:
    seen: list[Any] = []

    def collate(rows: list[Any]) -> Any:
        seen.extend(rows)
        ids = word_pieces()([row["text"] for row in rows], padding=True, return_tensors="pt")
        return {**ids, "labels": torch.tensor([row["label"] for row in rows])}

    rows = Dataset.from_list(RAW[CLASSIFY])
    make(tmp_path, CLASSIFY, rows, data_collator=collate, remove_unused_columns=False).train()
    assert seen[0].keys() == {"text", "label"}
