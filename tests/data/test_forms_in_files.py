"""Files of the forms that people have: what they are read as, and what is learnt of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hf_distill.data import DataConfig, clean_rows, tokenize_rows
from hf_distill.data.collect import collect
from hf_distill.data.sources import delimiter_of
from hf_distill.errors import InputError

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def read(file: Path, **options: Any) -> list[dict[str, Any]]:
    config = DataConfig(train=str(file), **options)
    return list(collect(config, config.train, "train", file.parent / "cache")[0])


def rows_of(folder: Path, text: str, encoding: str = "utf-8") -> list[dict[str, Any]]:
    file = folder / "rows.csv"
    file.write_bytes(text.encode(encoding))
    return read(file)


def lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


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


@pytest.mark.parametrize(
    "text", ["text\na, b\nc\n", "text\none; two\nthree\n", 'text\n"a, b; c"\n']
)
def test_a_csv_of_one_column_is_not_split(text: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, text)
    assert rows == [{"text": line.strip('"')} for line in text.splitlines()[1:]]


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_csv_with_long_quoted_values(delimiter: str, tmp_path: Path) -> None:
    """The values have line ends and the other delimiter, and are longer than what is looked at."""
    long = "one, two; three\n" * 10_000
    lines = [delimiter.join(["prompt", "completion"])]
    lines += [delimiter.join([f'"{n} {long}"', str(n) + "!"]) for n in range(9)]
    rows = rows_of(tmp_path, "\n".join(lines))
    assert [row["completion"] for row in rows] == [f"{n}!" for n in range(9)]
    assert rows[8]["prompt"] == f"8 {long}"


def test_csv_rows_that_do_not_fit_the_header(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "prompt;completion\na, b;c;\nd;e;\n")
    assert rows == [{"prompt": "a, b", "completion": "c"}, {"prompt": "d", "completion": "e"}]
    rows = rows_of(tmp_path, "\ufeffprompt;completion\r\na;b\r\n")
    assert rows == [{"prompt": "a", "completion": "b"}]
    with pytest.raises(InputError, match="row 3 has 3 values, but the header has 2"):
        rows_of(tmp_path, "prompt,completion\na,b\nc, d,e\n")
    with pytest.raises(InputError, match="rows.csv is not UTF-8 text"):
        rows_of(tmp_path, "text\ncafé\n", encoding="latin-1")
    (tmp_path / "rows.csv.gz").write_text("text\nnot compressed\n")
    with pytest.raises(InputError, match=r"rows\.csv\.gz cannot be read as csv"):
        read(tmp_path / "rows.csv.gz")


def test_a_single_document_is_held_out_whole(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("It was the best of times.\n\nIt was the worst of times.\n")
    config = DataConfig(train=str(file), rows="document")
    with pytest.raises(
        InputError, match=r"a single row, which was held out .*data\.eval.*data\.rows: paragraph or"
    ):
        clean_rows(config, seed=0, work_dir=tmp_path / "work")


# ---- Which form a file has ----


def test_columns_beside_a_known_form(tmp_path: Path) -> None:
    """As in tatsu-lab/alpaca, whose text column holds prompt and answer in one."""
    file = tmp_path / "rows.jsonl"
    row = {"instruction": "add", "input": "", "output": "two", "text": "add two", "id": 3}
    file.write_text(lines([row]))
    assert read(file) == [{"prompt": "add", "completion": "two"}]
    assert read(file, format="text") == [{"text": "add two"}]
    assert read(file, text_column="instruction") == [{"text": "add"}]
    with pytest.raises(InputError, match=r"id but not body, which data names: correct data\."):
        read(file, text_column="body")
    with pytest.raises(InputError, match=r"but not those of a known form \(messages, conv"):
        read(file, format="chat")


def test_cells_that_are_not_text_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for row, message in (
        ({"question": "a", "answer": 4}, r"rows\.jsonl: column 'answer' holds int, not text"),
        ({"conversations": [{"from": "he", "value": "a"}]}, r"rows\.jsonl: a message is from 'he'"),
        ({"messages": [{"role": "user", "content": 4}]}, "messages must have text as content"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}, "'completion' holds"),
    ):
        file.write_text(lines([row]))
        with pytest.raises(InputError, match=message):
            read(file)


def test_only_the_messages_of_the_completion_are_learnt(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    file = tmp_path / "rows.jsonl"
    prompt = [turn("user", "hello"), turn("assistant", "old")]
    file.write_text(
        lines(
            [
                {"prompt": [*prompt, turn("user", w)], "completion": [turn("assistant", w * 2)]}
                for w in WORDS
            ]
            + [{"prompt": prompt, "completion": []}]
        )
    )
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHATML
    config = DataConfig(train=str(file), eval_fraction=0.2, packing=False, max_length=200)
    rows, table = clean_rows(config, seed=0, work_dir=tmp_path / "work")
    assert table.steps[1].removed == {"nothing to learn": 1}
    tokens, _ = tokenize_rows(rows, tokenizer, config, table)
    assert len(tokens["train"]) + len(tokens["eval"]) == len(WORDS)
    for row, given in zip(tokens["train"], rows["train"], strict=True):
        word = given["prompt"][-1]["content"]
        learnt = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert learnt == f"{word * 2}<|endoftext|>\n"
        whole = tokenizer.apply_chat_template(given["prompt"] + given["completion"], tokenize=False)
        assert tokenizer.decode(row["input_ids"]) == whole


def test_prompts_and_completions_as_turns_of_a_chat(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "who?", "answer": "he"}\n{"question": "what?", "answer": "it"}\n')
    config = DataConfig(train=str(path), prompts_as_chat=True)
    rows, name, mapping = collect(config, str(path), "train", tmp_path / "work")
    assert name == "chat_completion"
    assert mapping == "question -> prompt, answer -> completion; turns of a chat"
    assert rows[1] == {
        "prompt": [{"role": "user", "content": "what?"}],
        "completion": [{"role": "assistant", "content": "it"}],
    }


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_words_that_pandas_takes_for_missing_values(delimiter: str, tmp_path: Path) -> None:
    words = ["null", "NA", "None", "nan", "n/a"]
    lines = [delimiter.join(["prompt", "completion"])]
    lines += [delimiter.join([word, f"{word}!"]) for word in words]
    rows = rows_of(tmp_path, "\n".join(lines))
    assert rows == [{"prompt": word, "completion": f"{word}!"} for word in words]
