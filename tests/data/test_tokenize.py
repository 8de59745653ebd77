from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from hf_distill.data import DataConfig, PreparationTable, tokenize_rows
from hf_distill.data.tokenize import annotate
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE

EOS = 0
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|endoftext|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As reasoning models do: only the last answer keeps its beginning.
REWRITING = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if loop.last %}(thinking) {% endif %}{{ m['content'] }}\n{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "It is five."},
]


def learnt(tokenizer: PreTrainedTokenizerFast, ids: list[int], labels: list[int]) -> str:
    assert len(ids) == len(labels)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORE])


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Puts <pad> before and <|endoftext|> after every text, of its own accord."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <|endoftext|>", special_tokens=[("<pad>", 1), ("<|endoftext|>", 0)]
    )
    return tokenizer


def run(
    tokenizer: PreTrainedTokenizerFast, columns: dict[str, list[Any]], **options: Any
) -> tuple[DatasetDict, PreparationTable]:
    config = DataConfig(train="unused", **{"max_length": 64, "packing": False, **options})
    part = Dataset.from_dict(columns)
    return tokenize_rows(DatasetDict(train=part, eval=part), tokenizer, config, PreparationTable())


def test_text_is_learnt_whole_and_ended(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    [(ids, labels)] = annotate({"text": ["for row in rows"]}, tiny_tokenizer, "text")
    assert ids == labels == [*tiny_tokenizer("for row in rows")["input_ids"], EOS]


def test_what_the_tokenizer_adds_is_kept_before_and_not_doubled_after(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = with_bos(tiny_tokenizer)
    assert tokenizer("a")["input_ids"][0] == 1
    [(ids, _)] = annotate({"text": ["a dog"]}, tokenizer, "text")
    assert ids == tokenizer("a dog")["input_ids"]
    batch = {"prompt": ["a"], "completion": ["dog"]}
    [(ids, labels)] = annotate(batch, tokenizer, "prompt_completion")
    assert ids == tokenizer("a\ndog")["input_ids"]
    assert learnt(tokenizer, ids, labels) == "dog<|endoftext|>"


@pytest.mark.parametrize(
    ("prompt", "completion", "whole", "target"),
    [
        ("Add:", "two", "Add:\ntwo", "two"),
        ("Add: ", "two", "Add: two", "two"),
        ("Add:", " two", "Add: two", " two"),
        ("", "two", "two", "two"),
        ("the qu", "ick", "the qu\nick", "ick"),
    ],
)
def test_only_the_completion_is_learnt(
    tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, whole: str, target: str
) -> None:
    batch = {"prompt": [prompt], "completion": [completion]}
    [(ids, labels)] = annotate(batch, tiny_tokenizer, "prompt_completion")
    assert tiny_tokenizer.decode(ids) == whole + "<|endoftext|>"
    assert learnt(tiny_tokenizer, ids, labels) == target + "<|endoftext|>"


def test_the_prompt_is_a_prefix_even_where_a_token_would_straddle(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """ " fir" and "st": together "first" is one token, but a prompt ends where it ends."""
    separate = tiny_tokenizer("the fir")["input_ids"]
    assert tiny_tokenizer("the first")["input_ids"][: len(separate)] != separate
    batch = {"prompt": ["the fir"], "completion": ["st dog"]}
    [(ids, labels)] = annotate(batch, tiny_tokenizer, "prompt_completion", separator="")
    assert ids[: len(separate)] == separate
    assert tiny_tokenizer.decode(ids) == "the first dog<|endoftext|>"
    assert learnt(tiny_tokenizer, ids, labels) == "st dog<|endoftext|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MARKED, "It is four.<|endoftext|>It is five.<|endoftext|>"),
        (CHATML, "It is four.<|endoftext|>\nIt is five.<|endoftext|>\n"),
    ],
)
def test_only_the_assistant_is_learnt(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str, expected: str
) -> None:
    tokenizer = with_template(tiny_tokenizer, template)
    [(ids, labels)] = annotate({"messages": [CHAT]}, tokenizer, "chat")
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert learnt(tokenizer, ids, labels) == expected


def test_an_answer_before_any_question_is_not_learnt(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """As conversations of ShareGPT begin. No generation prompt comes before such a turn."""
    tokenizer = with_template(tiny_tokenizer, CHATML)
    [(ids, labels)] = annotate({"messages": [CHAT[1:]]}, tokenizer, "chat")
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT[1:], tokenize=False)
    assert learnt(tokenizer, ids, labels) == "It is five.<|endoftext|>\n"


def test_a_prompt_that_is_rendered_in_another_way_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    batch = {"prompt": [CHAT[:3]], "completion": [CHAT[3:]]}
    with pytest.raises(InputError, match="renders a prompt differently"):
        annotate(batch, with_template(tiny_tokenizer, REWRITING), "chat_completion")


def test_templates_that_cannot_be_used_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rewriting = with_template(tiny_tokenizer, REWRITING)
    with pytest.raises(InputError, match="first 2 messages as rendered are not a prefix of all 4"):
        annotate({"messages": [CHAT]}, rewriting, "chat")
    picky = with_template(tiny_tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"refuses a conversation of user, .*must alternate"):
        annotate({"messages": [CHAT]}, picky, "chat")
    with pytest.raises(InputError, match="no chat template"):
        run(tiny_tokenizer, {"messages": [CHAT]})


def test_tokenizers_that_cannot_be_used_are_refused(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        run(endless, {"text": ["a"]})
    short = copy.deepcopy(tiny_tokenizer)
    short.model_max_length = 63
    with pytest.raises(InputError, match="max_length is 64, but .* takes 63"):
        run(short, {"text": ["a"]})
    with pytest.raises(InputError, match="cannot be tokenized"):
        run(tiny_tokenizer, {"other": ["a"]})


def test_long_text_goes_on_in_windows(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "The quick brown fox jumps. " * 4
    whole = [*tiny_tokenizer(text)["input_ids"], EOS]
    rows, table = run(tiny_tokenizer, {"text": [text, "a"]}, max_length=10)
    windows = rows["train"]["input_ids"][:]
    assert list(chain.from_iterable(windows[:-1])) == whole
    assert max(map(len, windows)) == 10
    step = table.steps[0]
    assert (step.rows, step.tokens) == (len(windows), len(whole) + 2)
    assert step.targets == sum(len(window) - 1 for window in windows)
    assert step.changed == {"windows of longer rows": len(windows) - 1}


def test_a_window_without_target_goes(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = len(tiny_tokenizer("a dog")["input_ids"]) + 1
    rows, table = run(tiny_tokenizer, {"text": ["a dog"]}, max_length=tokens - 1)
    assert len(rows["train"]) == 1
    assert table.steps[0].removed == {"without a target within max_length": 1}


def test_long_completions_are_cut_and_long_prompts_go(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    columns = {
        "prompt": ["short ", "short ", "long " * 30, "short "],
        "completion": ["answer", "answer " * 30, "answer", "answer"],
    }
    rows, table = run(tiny_tokenizer, columns, max_length=16)
    assert [len(ids) for ids in rows["train"]["input_ids"]][1] == 16
    step = table.steps[0]
    assert (step.rows, step.removed) == (3, {"without a target within max_length": 1})
    assert step.changed == {"cut at max_length": 1}
    labels = rows["train"]["labels"][:]
    assert step.targets == sum(label != IGNORE for row in labels for label in row)
    assert labels[0][-1] == EOS
    assert labels[1][-1] != EOS
    with pytest.raises(InputError, match="no train row has a target within"):
        run(tiny_tokenizer, {"prompt": ["long " * 30], "completion": ["a"]}, max_length=16)


def test_packing_follows_the_configuration(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = {"text": ["one row", "another row", "a third row"]}
    pair = {"prompt": ["one", "two"], "completion": ["a", "b"]}
    for columns, attention, restarts in (
        (text, "auto", False),
        (text, "within", True),
        (pair, "auto", True),
        (pair, "across", False),
    ):
        rows, table = run(tiny_tokenizer, columns, packing=True, packing_attention=attention)
        assert ("position_ids" in rows["train"].column_names) is restarts
        assert len(rows["train"]) == 1
        assert [step.name for step in table.steps] == ["tokenize", "pack"] * 2
        assert table.steps[0].tokens == table.steps[1].tokens == len(rows["train"][0]["input_ids"])


def test_the_result_does_not_depend_on_processes(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    columns = {"text": [f"row {number} " * (number % 9 + 1) for number in range(60)]}
    results = []
    for processes in (None, 2):
        rows, table = run(tiny_tokenizer, columns, num_proc=processes, packing=True)
        results.append((rows["train"].to_list(), table))
    assert results[0] == results[1]


@pytest.mark.parametrize("chat_template", [CHATML, MARKED])
def test_an_answer_that_was_cut_has_no_end(
    chat_template: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_template(tiny_tokenizer, chat_template)
    batch = {"messages": [CHAT, CHAT], "teacher_finished": [True, False]}
    (ids, labels), (cut, cut_labels) = annotate(batch, tokenizer, "chat")
    assert ids[: len(cut)] == cut
    assert labels[: len(cut)] == cut_labels
    assert learnt(tokenizer, cut, cut_labels) == learnt(tokenizer, ids, labels).rstrip("\n")[:-13]
    split = {"prompt": [CHAT[:3]], "completion": [CHAT[3:]], "teacher_finished": [False]}
    [(cut, cut_labels)] = annotate(split, tokenizer, "chat_completion")
    assert learnt(tokenizer, cut, cut_labels) == "It is five."
    texts = {"prompt": ["a"], "completion": ["dog"], "teacher_finished": [False]}
    [(ids, labels)] = annotate(texts, tokenizer, "prompt_completion")
    assert learnt(tokenizer, ids, labels) == "dog"
