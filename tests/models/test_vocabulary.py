from __future__ import annotations

import copy
import logging

import pytest
from transformers import PreTrainedTokenizerFast

from hf_distill.errors import InputError
from hf_distill.models.vocabulary import shared_vocabulary


def test_padded_heads_share_the_tokenizers_ids(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    size = len(tiny_tokenizer)
    assert shared_vocabulary(size + 4, size + 20, tiny_tokenizer, tiny_tokenizer) == size


def test_an_added_token_of_one_side_is_not_shared(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    larger = copy.deepcopy(tiny_tokenizer)
    larger.add_special_tokens({"additional_special_tokens": ["<chat>"]})
    size = len(tiny_tokenizer)
    assert shared_vocabulary(size + 9, size + 9, larger, tiny_tokenizer) == size


def test_same_size_but_other_tokens_names_the_first(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    trained = tiny_tokenizer.train_new_from_iterator(["zzzz yyyy zzzz"] * 9, len(tiny_tokenizer))
    message = r"id \d+ is '.*' for the student and '.*' for the teacher"
    with pytest.raises(InputError, match=message):
        shared_vocabulary(300, 300, tiny_tokenizer, trained)


def test_unknown_tokenizer_warns_once(
    tiny_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")  # the first process says it for all
    assert shared_vocabulary(310, 305, tiny_tokenizer, None) == len(tiny_tokenizer)
    assert not caplog.records
    monkeypatch.delenv("RANK")
    with caplog.at_level(logging.WARNING):
        assert shared_vocabulary(310, 305, tiny_tokenizer, None) == len(tiny_tokenizer)
    assert [record.message for record in caplog.records] == [
        "The tokens of student and teacher were not compared, since the tokenizer of the teacher "
        "is not known: pass teacher_tokenizer, or LiveTeacher(model, tokenizer), to check them."
    ]
