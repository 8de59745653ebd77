from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_distill.data import collator
from hf_distill.data.pack import Block, Fitter, Splitter, join, pack, pack_batch
from hf_distill.losses.targets import IGNORE, shifted_labels

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=300)
MAX_LENGTH = 12


def numbered(lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Documents whose tokens all differ, so that none can be lost, doubled or moved unseen."""
    ids = np.arange(sum(lengths), dtype=np.int32)
    return [(part, part) for part in np.split(ids, np.cumsum(lengths)[:-1])]


def fill(filler: Splitter | Fitter, documents: list[tuple[np.ndarray, np.ndarray]]) -> list[Block]:
    blocks = [block for document in documents for block in filler.add(*document)]
    return blocks + list(filler.flush())


def as_rows(lengths: list[int]) -> Dataset:
    ids = [part.tolist() for part, _ in numbered(lengths)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@given(LENGTHS, st.integers(2, 40))
def test_splitting_conserves_tokens_in_order(lengths: list[int], max_length: int) -> None:
    blocks = fill(Splitter(max_length), numbered(lengths))
    sizes = [sum(len(ids) for ids, _ in block) for block in blocks]
    assert sizes[:-1] == [max_length] * (len(blocks) - 1)
    assert 0 < sizes[-1] <= max_length
    ids = np.concatenate([ids for block in blocks for ids, _ in block])
    assert ids.tolist() == list(range(sum(lengths)))


@given(LENGTHS)
def test_fitting_keeps_documents_whole(lengths: list[int]) -> None:
    documents = numbered(lengths)
    blocks = fill(Fitter(MAX_LENGTH), documents)
    assert all(sum(len(ids) for ids, _ in block) <= MAX_LENGTH for block in blocks)
    pieces = sorted((ids.tolist() for block in blocks for ids, _ in block), key=lambda ids: ids[0])
    assert pieces == [ids.tolist() for ids, _ in documents]


def test_fitting_fills_the_blocks() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, size=3000).tolist()
    documents = numbered(lengths)
    blocks = fill(Fitter(128), documents)
    assert sum(lengths) / (128 * len(blocks)) > 0.97


@given(LENGTHS, st.booleans())
def test_targets_of_a_joined_row(lengths: list[int], within: bool) -> None:
    documents = numbered(lengths)
    row = join(documents, within)
    tokens = sum(lengths)
    expected = tokens - len(lengths) if within else tokens - 1
    if row is None:
        assert expected == 0
        return
    assert int((row["labels"][1:] != IGNORE).sum()) == expected
    assert row["input_ids"].tolist() == list(range(tokens))
    if within:
        assert row["position_ids"].tolist() == [place for n in lengths for place in range(n)]
    else:
        assert row["labels"].tolist() == row["input_ids"].tolist()
        assert "position_ids" not in row


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.booleans(), st.booleans())
def test_packing_a_dataset_counts_what_it_keeps(
    lengths: list[int], whole: bool, within: bool
) -> None:
    rows, step = pack(as_rows(lengths), "train", MAX_LENGTH, whole=whole, within=within)
    found = list(chain.from_iterable(rows["input_ids"]))
    # A block that holds no target (one token; within documents: only one-token pieces) is left out.
    assert set(found) <= set(range(sum(lengths)))
    assert len(found) == len(set(found)) == step.tokens
    missing = set(range(sum(lengths))) - set(found)
    assert len(missing) <= (MAX_LENGTH * len(lengths) if within else 1 + whole * len(lengths))
    targets = sum(label != IGNORE for row in rows["labels"] for label in row[1:])
    assert (step.rows, step.targets) == (len(rows), targets)
    if not within and not whole:
        assert step.targets == len(found) - len(rows)


@pytest.mark.parametrize("whole", [False, True])
def test_a_batch_of_arrays_packs_as_lists_do(whole: bool) -> None:
    lists = as_rows([3, 7, 1, 9, 4])[:]
    arrays = {
        name: [np.asarray(ids, dtype=np.int64) for ids in column] for name, column in lists.items()
    }
    packed = pack_batch(lists, MAX_LENGTH, whole, within=whole)
    assert sum(map(len, packed["input_ids"])) == 24
    assert pack_batch(arrays, MAX_LENGTH, whole, within=whole) == packed


def test_batches_of_map_do_not_show() -> None:
    """More rows than one batch of ``map``: blocks run on across its borders."""
    rows, step = pack(as_rows([7] * 2500), "train", 64, whole=False, within=False)
    assert list(chain.from_iterable(rows["input_ids"])) == list(range(7 * 2500))
    assert {len(row) for row in rows["input_ids"][:-1]} == {64}
    assert step.tokens == 7 * 2500


def test_a_remainder_without_target_is_left_out() -> None:
    rows, step = pack(as_rows([8, 1]), "train", 8, whole=False, within=False)
    assert (len(rows), step.tokens) == (1, 8)
    rows, _ = pack(as_rows([8, 2]), "train", 8, whole=False, within=False)
    assert rows["input_ids"][:] == [list(range(8)), [8, 9]]


Factory = Callable[..., PreTrainedModel]


@pytest.fixture(params=["gpt2", "llama"])
def factory(request: pytest.FixtureRequest) -> Factory:
    return request.getfixturevalue(f"tiny_{request.param}")


def packed_batch(
    tokenizer: PreTrainedTokenizerFast, documents: list[list[int]], other: list[int], side: str
) -> dict[str, torch.Tensor]:
    """The documents packed into one row, and a longer row beside, so that there is padding."""
    parts = [(np.array(ids, dtype=np.int32),) * 2 for ids in documents]
    rows = [join(parts, within=True), join([(np.array(other, dtype=np.int32),) * 2], within=True)]
    return collator(tokenizer, padding_side=side)(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_within_keeps_documents_apart(
    factory: Factory, tiny_tokenizer: PreTrainedTokenizerFast, attention: str, side: str
) -> None:
    """Every document's logits are those it has alone, whatever its neighbours and the padding."""
    model = factory(attn_implementation=attention)
    torch.manual_seed(0)
    documents = [torch.randint(2, 300, (length,)).tolist() for length in (5, 1, 9, 4)]
    batch = packed_batch(tiny_tokenizer, documents, list(range(2, 32)), side)
    assert "attention_mask" not in batch
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits
        alone = [
            model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in documents
        ]
    start = 0 if side == "right" else 30 - sum(map(len, documents))
    expected = torch.cat(alone)
    assert_close(together[0, start : start + len(expected)], expected, atol=1e-6, rtol=1e-5)
    # Across, the same documents do depend on their neighbours: the test can tell.
    plain = {"input_ids": torch.tensor([list(chain.from_iterable(documents))])}
    with torch.no_grad():
        across = model(**plain, use_cache=False).logits[0]
    assert (across - expected).abs().max() > 1e-3


def test_a_cache_switches_the_separation_off(
    factory: Factory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Why callers must pass ``use_cache=False``: if this fails, transformers has become kinder."""
    model = factory()
    batch = packed_batch(tiny_tokenizer, [[5, 6, 7], [8, 9, 10]], [2, 3, 4, 5, 6, 7], "right")
    with torch.no_grad():
        cached, apart = (model(**batch, use_cache=cache).logits[0, 3:] for cache in (True, False))
    assert (cached - apart).abs().max() > 1e-4


def test_targets_within_are_those_of_the_documents_alone(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    documents = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 0]]
    batch = packed_batch(tiny_tokenizer, documents, list(range(2, 22)), "right")
    assert int((shifted_labels(batch)[0] != IGNORE).sum()) == sum(len(ids) - 1 for ids in documents)
    alone = collator(tiny_tokenizer)([{"input_ids": ids} for ids in documents])
    assert int((shifted_labels(alone) != IGNORE).sum()) == sum(len(ids) - 1 for ids in documents)
