"""Raw rows in Python: every form, flags, streams, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from hf_distill.data import DataConfig, clean_rows, is_raw, tokenize_raw_rows
from hf_distill.data.sources import delimiter_of
from hf_distill.errors import InputError

EOS = 0
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Four."}
MORE = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Six."}]
TURNS = [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Four."}]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Any:
    made = copy.deepcopy(tiny_tokenizer)
    made.chat_template = CHATML
    return made


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chat(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return ids(tokenizer, text)


def masked(prompt: list[int], learnt: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + learnt, "labels": [-100] * len(prompt) + learnt}


def by_hand(tokenizer: Any) -> list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Name, row, options, and ids and labels made without the library."""

    def t(text: str) -> list[int]:
        return ids(tokenizer, text)

    text = [*t("a dog"), EOS]
    plain = masked(t("the quick"), [*t(" brown fox"), EOS])
    conversation = [USER, ANSWER, *MORE]
    prompt = chat(tokenizer, [USER], add_generation_prompt=True)
    whole = chat(tokenizer, [USER, ANSWER])
    return [
        ("text", {"text": "a dog"}, {}, {"input_ids": text, "labels": text}),
        ("completion", {"prompt": "the quick", "completion": " brown fox"}, {}, plain),
        (
            "both",
            {"prompt": "the quick", "completion": " brown fox"},
            {"completion_only_loss": False},
            {"input_ids": plain["input_ids"], "labels": plain["input_ids"]},
        ),
        (
            "alpaca",
            {"instruction": "the quick", "input": "dog", "output": "fox"},
            {},
            masked(t("the quick\n\ndog\n"), [*t("fox"), EOS]),
        ),
        (
            "alpaca without input",
            {"instruction": "the quick", "input": "", "output": "fox"},
            {},
            masked(t("the quick\n"), [*t("fox"), EOS]),
        ),
        (
            "question",
            {"question": "the quick", "answer": "fox"},
            {},
            masked(t("the quick\n"), [*t("fox"), EOS]),
        ),
        (
            "query",
            {"query": "the quick", "response": "fox"},
            {},
            masked(t("the quick\n"), [*t("fox"), EOS]),
        ),
        (
            "messages",
            {"messages": conversation},
            {},
            {"input_ids": chat(tokenizer, conversation), "labels": chat(tokenizer, conversation)},
        ),
        (
            "assistant",
            {"messages": [USER, ANSWER]},
            {"assistant_only_loss": True},
            masked(prompt, whole[len(prompt) :]),
        ),
        ("sharegpt", {"conversations": TURNS}, {}, {"input_ids": whole, "labels": whole}),
        (
            "conversational",
            {"prompt": [USER], "completion": [ANSWER]},
            {},
            masked(prompt, whole[len(prompt) :]),
        ),
    ]


CASES = ["text", "completion", "both", "alpaca", "alpaca without input", "question", "query",
         "messages", "assistant", "sharegpt", "conversational"]  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize("case", CASES)
def test_ids_and_labels(case: str, streamed: bool, tokenizer: Any) -> None:
    row, options, expected = next(c[1:] for c in by_hand(tokenizer) if c[0] == case)
    rows: Any = Dataset.from_list([{**row, "id": n} for n in range(3)])
    assert is_raw(rows)
    if streamed:
        rows = rows.to_iterable_dataset()
    found, line = tokenize_raw_rows(rows, tokenizer, max_length=200, **options)
    assert isinstance(found, IterableDataset) is streamed
    assert [dict(row) for row in found] == [expected] * 3
    assert line.startswith("a stream of" if streamed else "3 rows of")


def test_a_stream_that_does_not_know_its_columns(tokenizer: Any) -> None:
    rows = IterableDataset.from_generator(lambda: iter([{"text": "a dog"}, {"text": "a fox"}]))
    assert rows.column_names is None
    assert is_raw(rows)
    found, _ = tokenize_raw_rows(rows, tokenizer, max_length=20)
    assert len(list(found)) == 2


def test_what_was_read_is_told(tokenizer: Any) -> None:
    rows = Dataset.from_list([{"instruction": "the quick", "output": "fox jumps " * 20}] * 4)
    _, line = tokenize_raw_rows(rows, tokenizer, max_length=30)
    assert line == (
        "4 rows of prompt/completion (instruction + input -> prompt, output -> completion) "
        "tokenized, at most 30 tokens a row, loss on completions; 4 cut"
    )
    rows = Dataset.from_list([{"text": "a dog " * 30}] * 2)
    found, line = tokenize_raw_rows(rows, tokenizer, max_length=30)
    assert max(map(len, found["input_ids"])) == 30
    assert sum(map(len, found["input_ids"])) == 2 * len(ids(tokenizer, "a dog " * 30)) + 2
    assert "windows of longer rows" in line


@pytest.mark.parametrize("case", ["text", "completion", "messages"])
def test_packing_loses_nothing(case: str, tokenizer: Any) -> None:
    row, options, _ = next(c[1:] for c in by_hand(tokenizer) if c[0] == case)
    rows = Dataset.from_list([row] * 20)
    alone, _ = tokenize_raw_rows(rows, tokenizer, max_length=100, **options)
    tokens = sum(map(len, alone["input_ids"]))
    for form in (rows, rows.to_iterable_dataset()):
        packed, line = tokenize_raw_rows(form, tokenizer, max_length=100, packing=True, **options)
        found = list(packed)
        assert sum(len(row["input_ids"]) for row in found) == tokens
        assert max(len(row["input_ids"]) for row in found) <= 100
        assert ("position_ids" in found[0]) == (case != "text")
        assert "packed" in line


def test_weights_are_kept(tokenizer: Any) -> None:
    rows = Dataset.from_list(
        [{"text": "a dog " * 30, "ce_weight": 0.5}, {"text": "a", "ce_weight": 2.0}]
    )
    for form in (rows, rows.to_iterable_dataset()):
        found, _ = tokenize_raw_rows(form, tokenizer, max_length=30, keep=["ce_weight", "other"])
        weights = [row["ce_weight"] for row in found]
        assert weights[-1] == 2.0
        assert set(weights[:-1]) == {0.5}
    with pytest.raises(InputError, match="cannot keep 'ce_weight'"):
        tokenize_raw_rows(rows, tokenizer, max_length=30, keep=["ce_weight"], packing=True)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"text": "a"},
            {"completion_only_loss": True},
            "completion_only_loss is True, but",
        ),
        ({"text": "a"}, {"assistant_only_loss": True}, "assistant_only_loss is True, but"),
        ({"prompt": "a b c", "completion": "d"}, {"max_length": 2}, "no row has anything to learn"),
        ({"text": "a"}, {"max_length": 10**6}, "max_length is 1000000, but the tokenizer's model"),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            {},
            "a turn of 'conversations' is from 'narrator'",
        ),
        ({"body": "a"}, {}, "rows with the columns body are of no known raw form"),
    ],
)
def test_refused(
    row: dict[str, Any], options: dict[str, Any], message: str, tokenizer: Any
) -> None:
    limited = copy.deepcopy(tokenizer)
    limited.model_max_length = 1000
    with pytest.raises(InputError, match=message):
        tokenize_raw_rows(Dataset.from_list([row]), limited, **({"max_length": 50} | options))


def test_rows_with_ids_are_not_raw() -> None:
    assert not is_raw(Dataset.from_list([{"input_ids": [1, 2], "text": "a"}]))
    assert not is_raw(Dataset.from_list([{"body": "a"}]))


# ---- The same forms in files ----


@pytest.mark.parametrize(
    ("line", "columns", "mapping"),
    [
        (
            '{"instruction": "Name %d things", "input": "of wood", "output": "a tree %d"}',
            {"prompt", "completion"},
            "instruction + input -> prompt",
        ),
        ('{"question": "what is %d?", "answer": "it is %d"}', {"prompt", "completion"}, "question"),
        (
            '{"conversations": [{"from": "human", "value": "say %d"}, '
            '{"from": "gpt", "value": "it is %d"}]}',
            {"messages"},
            "conversations",
        ),
    ],
)
def test_files(line: str, columns: set[str], mapping: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(line % (n, n * n) for n in range(40)))
    config = DataConfig(train=str(file), eval_fraction=0.2)
    rows, table = clean_rows(config, seed=0, work_dir=tmp_path / "work")
    assert set(rows["train"].column_names) == columns
    assert mapping in next(iter(table.steps[0].changed))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_a_csv_is_found(delimiter: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    lines = [delimiter.join(["prompt", "completion"])]
    lines += [delimiter.join([f"say {n}", f'"it is {n}, or {n}; or so"']) for n in range(30)]
    file.write_text("\n".join(lines))
    assert delimiter_of(file) == delimiter
    config = DataConfig(train=str(file), eval_fraction=0.2)
    rows, _ = clean_rows(config, seed=0, work_dir=tmp_path / "work")
    assert set(rows["train"].column_names) == {"prompt", "completion"}


@pytest.mark.parametrize("text", ["text\na, b\nc\n", "text\none; two\nthree\n", "text\n"])
def test_one_column_has_no_delimiter(text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(text)
    assert delimiter_of(file) == ","


def test_a_single_document_is_held_out_whole(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("It was the best of times.\n\nIt was the worst of times.\n")
    config = DataConfig(train=str(file), rows="document")
    with pytest.raises(
        InputError, match=r"a single row, which was held out .*data\.eval.*data\.rows"
    ):
        clean_rows(config, seed=0, work_dir=tmp_path / "work")
