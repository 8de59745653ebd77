"""The trainer takes rows as people have them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel
from trainer_setup import arguments, make_rows, small_model
from transformers import GenerationConfig

from hf_distill import DistillationTrainer, InputError, student_from_teacher

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Four."}
FORMS: dict[str, dict[str, Any]] = {
    "text": {"text": "a dog and a fox"},
    "prompt_completion": {"prompt": "the quick", "completion": " brown fox"},
    "conversational": {"prompt": [USER], "completion": [ANSWER]},
    "messages": {"messages": [USER, ANSWER]},
    "alpaca": {"instruction": "say", "input": "dog", "output": "a dog"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Any:
    made = copy.deepcopy(tiny_tokenizer)
    made.chat_template = CHATML
    return made


def make(tmp_path: Path, rows: Any, tokenizer: Any, **options: Any) -> DistillationTrainer:
    given = ("eval_dataset", "peft_config", "data_collator")
    extra = {k: options.pop(k) for k in given if k in options}
    return DistillationTrainer(
        options.pop("model", None) or small_model(0, vocab_size=300, n_positions=64),
        teacher=small_model(1, vocab_size=300, n_positions=64),
        args=arguments(tmp_path, **({"max_steps": 2} | options)),
        train_dataset=rows,
        processing_class=tokenizer,
        **extra,
    )


@pytest.mark.parametrize("kind", ["dataset", "stream", "list", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains(
    form: str, kind: str, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = [{**FORMS[form], "id": n} for n in range(12)]
    rows: Any = listed if kind == "list" else Dataset.from_list(listed)
    rows = rows.to_iterable_dataset() if kind == "stream" else rows
    trainer = make(tmp_path, rows, tokenizer, packing=kind == "packed", eval_dataset=listed[:4])
    told = [line for line in capsys.readouterr().out.splitlines() if "_dataset:" in line]
    assert len(told) == 2  # a line a data set
    assert "tokenized, at most 64 tokens a row" in told[0]
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(listed[:4])["eval_loss"] == found > 0  # type: ignore[arg-type]


def test_from_folders(tmp_path: Path, tokenizer: Any) -> None:
    """A student's own tokenizer is found beside it."""
    for name, seed in (("student", 0), ("teacher", 1)):
        small_model(seed, vocab_size=300, n_positions=64).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    trainer = DistillationTrainer(
        str(tmp_path / "student"),
        teacher=str(tmp_path / "teacher"),
        args=arguments(tmp_path / "out", max_steps=1),
        train_dataset=Dataset.from_list([FORMS["text"]] * 8),
    )
    trainer.train()
    assert trainer.processing_class is not None


def test_rows_with_ids_pass_untouched(tmp_path: Path, tokenizer: Any) -> None:
    rows = Dataset.from_list(make_rows(8, seed=1))
    assert make(tmp_path, rows, tokenizer).train_dataset is rows


def test_flags_decide_what_is_learnt(tmp_path: Path, tokenizer: Any) -> None:
    def targets(form: str, **options: Any) -> int:
        trainer = make(tmp_path, [FORMS[form]] * 4, tokenizer, **options)
        return sum(label != -100 for label in trainer.train_dataset[0]["labels"])

    assert targets("prompt_completion", completion_only_loss=False) > targets("prompt_completion")
    assert targets("messages") > targets("messages", assistant_only_loss=True)
    longest = make(tmp_path, [{"text": "a dog " * 50}], tokenizer, max_length=10).train_dataset
    assert max(map(len, longest["input_ids"])) == 10


def test_weights_of_raw_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**FORMS["text"], "ce_weight": float(n % 2)} for n in range(8)]
    trainer = make(tmp_path, rows, tokenizer)
    assert trainer.train_dataset["ce_weight"][:2] == [0.0, 1.0]
    trainer.train()


def test_a_student_of_the_teachers_layers_has_its_tokens(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = small_model(1, vocab_size=300, n_positions=64)  # the one of `make`
    for student, warns in ((student_from_teacher(teacher, [0]), False), (None, True)):
        caplog.clear()
        make(tmp_path, [FORMS["text"]], tokenizer, model=student)
        assert ("tokens of student and teacher were not compared" in caplog.text) == warns


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_config(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = make(tmp_path, [FORMS["text"]] * 8, tokenizer, peft_config=config)
    assert isinstance(trainer.model, PeftModel)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    trainer.train()
    warning = "The base of the student's adapter was made in memory"
    assert caplog.text.count(warning) == 1
    caplog.clear()
    base = small_model(0, vocab_size=300, n_positions=64)
    base.save_pretrained(tmp_path / "base")
    loaded = type(base).from_pretrained(tmp_path / "base")
    make(tmp_path, [FORMS["text"]] * 8, tokenizer, model=loaded, peft_config=config)
    assert warning not in caplog.text
    with pytest.raises(InputError, match="the student has an adapter already"):
        make(tmp_path, [FORMS["text"]], tokenizer, model=trainer.model, peft_config=config)


@pytest.mark.parametrize(
    ("rows", "tokenized", "message"),
    [
        (DatasetDict(train=Dataset.from_list([FORMS["text"]])), True, r"dataset\['train'\]"),
        (Dataset.from_list([{"body": "a"}]), True, "train_dataset has the columns body: rows need"),
        (Dataset.from_list([FORMS["text"]]), False, "holds raw rows, but the trainer has no token"),
    ],
)
def test_refused(rows: Any, tokenized: bool, message: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=message):
        make(tmp_path, rows, tokenizer if tokenized else None)


@pytest.mark.parametrize("kind", ["dataset", "list"])
@pytest.mark.parametrize("columns", ["txt", "prompt, complation", "document, summary"])
def test_unknown_columns_are_refused(
    columns: str, kind: str, tmp_path: Path, tokenizer: Any
) -> None:
    """Rows in a list too, in which the collator would miss only the ids."""
    listed = [dict.fromkeys(columns.split(", "), "a dog")] * 4
    rows: Any = listed if kind == "list" else Dataset.from_list(listed)
    with pytest.raises(InputError, match=f"train_dataset has the columns {columns}: rows need"):
        make(tmp_path, rows, tokenizer)
    with pytest.raises(InputError, match=f"eval_dataset has the columns {columns}: rows need"):
        make(tmp_path, [FORMS["text"]] * 4, tokenizer, eval_dataset=rows)
    trainer = make(tmp_path, [FORMS["text"]] * 4, tokenizer)
    with pytest.raises(InputError, match=f"eval_dataset has the columns {columns}: rows need"):
        trainer.evaluate(rows)


def test_lists_that_need_no_tokenizing(tmp_path: Path, tokenizer: Any) -> None:
    """Rows of ids, those that an own collator reads, and torch data sets stay what they are."""

    class Torch(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            return {"input_ids": [5, 6, 7]}

    def collate(rows: list[Any]) -> Any:
        ids = tokenizer([row["txt"] for row in rows], return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "labels": ids}

    for rows, more in (
        ([{"input_ids": [5, 6, 7]}] * 8, {}),
        (Torch(), {}),
        ([{"txt": "a dog"}] * 8, {"data_collator": collate, "remove_unused_columns": False}),
    ):
        trainer = make(tmp_path, rows, tokenizer, eval_dataset=rows, **more)
        assert trainer.train_dataset is rows
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0


def test_a_base_student_ends_its_texts_where_a_turn_ends(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = CHATML.replace("<|endoftext|>", "<pad>")
    chats, texts = [FORMS["messages"]] * 4, [FORMS["text"]] * 4
    assert make(tmp_path, chats, tokenizer).model.generation_config.eos_token_id == 0
    assert make(tmp_path, texts, other).model.generation_config.eos_token_id == 0
    assert "the end of a turn" not in capsys.readouterr().out
    trainer = make(tmp_path, chats, other)
    assert trainer.model.generation_config.eos_token_id == [0, 1]
    assert "the student's texts also end at '<pad>', the end of a turn" in capsys.readouterr().out
    trainer.save_model(str(tmp_path / "student"))
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [0, 1]
