"""Raw rows in Python: every form, flags, streams, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from hf_distill.data import is_raw, tokenize_raw_rows
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
            "conversations of roles",
            {"conversations": [USER, ANSWER]},
            {},
            {"input_ids": whole, "labels": whole},
        ),
        *conversational(tokenizer),
    ]


def conversational(
    tokenizer: Any,
) -> list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """A prompt with an earlier answer, and a completion that goes on after its answer."""
    row = {"prompt": [USER, ANSWER, MORE[0]], "completion": [MORE[1], USER]}
    everything = chat(tokenizer, [*row["prompt"], *row["completion"]])
    prompt = len(chat(tokenizer, row["prompt"], add_generation_prompt=True))
    old = slice(
        len(chat(tokenizer, [USER], add_generation_prompt=True)),
        len(chat(tokenizer, [USER, ANSWER])),
    )
    new = slice(prompt, len(chat(tokenizer, [*row["prompt"], MORE[1]])))

    def learnt(*parts: slice) -> dict[str, list[int]]:
        labels = [-100] * len(everything)
        for part in parts:
            labels[part] = everything[part]
        return {"input_ids": everything, "labels": labels}

    turns, both = {"assistant_only_loss": True}, {"completion_only_loss": False}
    return [
        ("conversational", row, {}, learnt(slice(prompt, None))),
        ("conversational, all", row, both, learnt(slice(None))),
        ("conversational, turns of completion", row, turns, learnt(new)),
        ("conversational, turns", row, turns | both, learnt(old, new)),
    ]


CASES = ["text", "completion", "both", "alpaca", "alpaca without input", "question", "query",
         "messages", "assistant", "sharegpt", "conversations of roles", "conversational",
         "conversational, all", "conversational, turns of completion",
         "conversational, turns"]  # fmt: skip


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
    listed = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": "c", "output": "b"},
    ]
    rows = IterableDataset.from_generator(lambda: iter([*listed, {**listed[1], "id": 3}]))
    found, line = tokenize_raw_rows(rows, tokenizer, max_length=50)
    assert [set(row) for row in found] == [{"input_ids", "labels"}] * 3
    assert [tokenizer.decode(row["input_ids"]) for row in found][1] == "a\n\nc\nb<|endoftext|>"
    assert "instruction + input -> prompt" in line


MIXED = {
    "text": [{"text": t} for t in ("a dog", None, "the fox " * 30, "", "a")],
    "prompt_completion": [
        {"prompt": p, "completion": c}
        for p, c in (("the", " fox"), (None, "a"), ("a", None), ("fox " * 60, "a"), ("", "x " * 60))
    ],
    "chat": [
        {"messages": m}
        for m in ([USER, ANSWER], None, [], [USER], [ANSWER, *MORE], [USER, ANSWER, *MORE] * 9)
    ],
    "chat_completion": [
        {"prompt": p, "completion": c}
        for p, c in (([USER], [ANSWER]), ([USER], None), ([USER], []), ([USER] * 20, [ANSWER]))
    ],
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", MIXED)
def test_stream_and_processes_give_the_rows_of_a_dataset(
    name: str, packing: bool, tokenizer: Any
) -> None:
    rows = Dataset.from_list(MIXED[name])
    options: dict[str, Any] = {"max_length": 60, "packing": packing}
    options["assistant_only_loss"] = name == "chat"
    found, line = tokenize_raw_rows(rows, tokenizer, **options)
    listed = [dict(row) for row in found]
    assert "without a target dropped" in line
    assert all(any(label != -100 for label in row["labels"][1:]) for row in listed)
    streamed, _ = tokenize_raw_rows(rows.to_iterable_dataset(), tokenizer, **options)
    assert [dict(row) for row in streamed] == listed
    shared, _ = tokenize_raw_rows(rows, tokenizer, **options, num_proc=2)
    assert [dict(row) for row in shared] == listed
    again, _ = tokenize_raw_rows(rows, tokenizer, **options)
    assert again._fingerprint == found._fingerprint  # the cache is found


def test_null_fields_of_messages_are_left_out(tokenizer: Any) -> None:
    """Arrow gives every message the fields of all others, null where they are not set."""
    answer = {"role": "assistant", "content": None, "name": None}
    asked = copy.deepcopy(tokenizer)
    asked.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ 'name' in m }}{{ m.content }};{% endfor %}"
    )
    rows = Dataset.from_list([{"messages": [{**USER, "name": "x"}, answer]}])
    found, _ = tokenize_raw_rows(rows, asked, max_length=60)
    assert tokenizer.decode(found[0]["input_ids"]) == "userTrueTwo?;assistantFalse;"


def test_what_was_read_is_told(tokenizer: Any) -> None:
    rows = Dataset.from_list([{"instruction": "the quick", "output": "fox jumps " * 20}] * 4)
    _, line = tokenize_raw_rows(rows, tokenizer, max_length=30)
    assert line == (
        "4 rows of prompt/completion (instruction -> prompt, output -> completion) "
        "tokenized, at most 30 tokens a row, loss on completions; 4 cut"
    )
    rows = Dataset.from_list([{"text": "a dog " * 30}] * 2)
    found, line = tokenize_raw_rows(rows, tokenizer, max_length=30)
    assert max(map(len, found["input_ids"])) == 30
    assert sum(map(len, found["input_ids"])) == 2 * len(ids(tokenizer, "a dog " * 30)) + 2
    assert "windows of longer rows" in line


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streamed", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize("case", ["text", "completion", "messages"])
def test_the_format_of_the_cells_does_not_matter(
    case: str, streamed: bool, packing: bool, tokenizer: Any
) -> None:
    """Arrays of numpy, tensors or Arrow tables give the rows that lists give."""
    row, options, _ = next(c[1:] for c in by_hand(tokenizer) if c[0] == case)
    rows: Any = Dataset.from_list([row] * 5)
    rows = rows.to_iterable_dataset() if streamed else rows
    options = {"max_length": 40, "packing": packing, **options}
    listed = [dict(row) for row in tokenize_raw_rows(rows, tokenizer, **options)[0]]
    assert listed
    for cells in ("numpy", "torch", "arrow"):
        formatted = rows.with_format(cells)
        assert is_raw(formatted)
        tokens, _ = tokenize_raw_rows(formatted, tokenizer, **options)
        assert [dict(row) for row in tokens] == listed


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
        ({"prompt": "a b c", "completion": "d"}, {"max_length": 2}, "no row has a target within"),
        ({"text": "a"}, {"max_length": 10**6}, "max_length is 1000000, but the tokenizer's model"),
        ({"text": "a"}, {"max_length": 1}, "max_length is 1, but a target needs at least 2"),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            {},
            "a message is from 'narrator', but must be from one of human, user, gpt",
        ),
        ({"messages": [{"speaker": "x", "text": "y"}]}, {}, "a message holds speaker, text, but"),
        ({"messages": "hi"}, {}, "column 'messages' holds str, not a list of messages"),
        ({"question": "a", "answer": 4}, {}, "column 'answer' holds int, not text"),
        ({"text": ["a"]}, {}, "column 'text' holds list, not text"),
        ({"prompt": "a", "completion": [ANSWER]}, {}, "column 'prompt' holds str, not a list"),
        ({"prompt": [USER], "completion": "a"}, {}, "column 'prompt' holds list, not text"),
        ({"prompt": [], "completion": [ANSWER]}, {}, "a conversation or its prompt has no message"),
        ({"text": "a", "ce_weight": "1"}, {"keep": ["ce_weight"]}, "'ce_weight' holds string"),
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


def test_no_rows_are_refused(tokenizer: Any) -> None:
    for rows in (Dataset.from_dict({"text": []}), IterableDataset.from_generator(lambda: iter([]))):
        with pytest.raises(InputError, match="the data set has no rows"):
            tokenize_raw_rows(rows, tokenizer, max_length=50)


def test_rows_with_ids_are_not_raw() -> None:
    assert not is_raw(Dataset.from_list([{"input_ids": [1, 2], "text": "a"}]))
    assert not is_raw(Dataset.from_list([{"body": "a"}]))
