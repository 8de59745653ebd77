from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from hf_distill.data import Collator, collator
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE, shifted_labels
from hf_distill.models.positions import PositionCounter

ROWS = st.lists(st.lists(st.integers(2, 299), min_size=1, max_size=9), min_size=1, max_size=5)


@given(ROWS, st.sampled_from(["right", "left"]), st.sampled_from([None, 4]))
def test_padding_changes_no_row(rows: list[list[int]], side: Any, multiple: int | None) -> None:
    collate = Collator(1, 0, side, multiple)
    batch = collate([{"input_ids": ids, "labels": [IGNORE, *ids[1:]]} for ids in rows])
    length = batch["input_ids"].shape[1]
    assert length >= max(map(len, rows))
    assert multiple is None or (length % 4 == 0 and length < max(map(len, rows)) + 4)
    assert {value.dtype for value in batch.values()} == {torch.int64}
    for number, ids in enumerate(rows):
        mask = batch["attention_mask"][number].bool()
        assert batch["input_ids"][number, mask].tolist() == ids
        assert batch["labels"][number, mask].tolist() == [IGNORE, *ids[1:]]
        assert set(batch["input_ids"][number, ~mask].tolist()) <= {1}
        assert set(batch["labels"][number, ~mask].tolist()) <= {IGNORE}
        assert bool(mask[0 if side == "right" else -1])
    assert "position_ids" not in batch  # the model's own business, see models.positions


@settings(max_examples=10, deadline=None)
@given(rows=ROWS)
def test_logits_do_not_depend_on_padding(
    rows: list[list[int]], tiny_gpt2: Any, tiny_llama: Any
) -> None:
    for model in (tiny_gpt2(), tiny_llama()):
        for side in ("right", "left"):
            batch = Collator(1, 0, side)([{"input_ids": ids} for ids in rows])
            labels = batch.pop("labels")
            positions = PositionCounter(model)(batch["attention_mask"])
            with torch.no_grad():
                padded = model(**batch, position_ids=positions).logits
                for number, ids in enumerate(rows):
                    alone = model(input_ids=torch.tensor([ids])).logits[0]
                    mask = batch["attention_mask"][number].bool()
                    assert_close(padded[number, mask], alone, atol=1e-6, rtol=1e-4)
            targets = int((shifted_labels({"labels": labels}) != IGNORE).sum())
            assert targets == sum(len(ids) - 1 for ids in rows)


def test_packed_rows_are_padded_with_one_more_document() -> None:
    rows = [
        {
            "input_ids": [5, 6, 7, 8, 9],
            "labels": [5, 6, IGNORE, 8, 9],
            "position_ids": [0, 1, 0, 1, 2],
        },
        {"input_ids": [5, 6], "labels": [5, 6], "position_ids": [0, 1]},
    ]
    right = Collator(1, 0)(rows)
    assert set(right) == {"input_ids", "labels", "position_ids"}
    assert right["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]
    assert right["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]]
    assert right["labels"][1].tolist() == [5, 6, IGNORE, IGNORE, IGNORE]
    left = Collator(1, 0, "left")(rows)
    assert left["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    with pytest.raises(InputError, match="mixes rows with and without position_ids"):
        Collator(1, 0)([rows[0], {"input_ids": [5]}])


def test_tokens_for_padding(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert collator(tiny_tokenizer) == Collator(1, 0)
    assert (
        collator(tiny_tokenizer, padding_side="left", pad_to_multiple_of=8).pad_to_multiple_of == 8
    )
    bare = copy.deepcopy(tiny_tokenizer)
    bare.pad_token = None
    assert collator(bare) == Collator(0, 0)
    bare.eos_token = None
    with pytest.raises(InputError, match="neither a padding nor an end-of-text token"):
        collator(bare)
