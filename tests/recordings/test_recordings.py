"""Recordings: the bytes, what they say of a distribution, and training from them."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, concatenate_datasets, load_from_disk
from distributed import launch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trainer_setup import VOCABULARY, arguments, make_rows, small_model, weights

from hf_distill import DistillationTrainer, InputError, load_recording, record
from hf_distill.data import Collator
from hf_distill.losses import divergences
from hf_distill.losses.kernels.torch import outcomes, value_and_gradient
from hf_distill.losses.signals import Sampled
from hf_distill.losses.signals import TopK as TopKSignal
from hf_distill.losses.weights import Weights
from hf_distill.recordings import COLUMN, codec, id_lists
from hf_distill.recordings.bits import Stream
from hf_distill.recordings.extract import sampled, top_k_
from hf_distill.recordings.recorder import RecordingSettings, estimate
from hf_distill.recordings.row_format import read
from hf_distill.teachers import LiveTeacher

COLLATE = Collator(1, 0)


def recorded(
    tmp_path: Path, rows: Any, teacher: Any = None, name: str = "r", **options: Any
) -> Any:
    options = {"kind": "full", "shard_rows": 7, "data_collator": COLLATE} | options
    return record(rows, teacher or small_model(1), tmp_path / name, **options)


def rows(number: int = 20, seed: int = 0) -> Dataset:
    return Dataset.from_list(make_rows(number, seed))


# ---- Codec ----


@st.composite
def lists(draw: Any) -> tuple[codec.TopK, int]:
    vocabulary = draw(st.sampled_from([2, 257, 50257, 151936, 262144]))
    most = min(vocabulary, 300)
    k = draw(st.one_of(st.integers(1, most), st.just(min(vocabulary, 2000))))
    n = draw(st.integers(0, 4))
    kind = draw(st.sampled_from(["normal", "ties", "one-hot", "uniform", "infinite"]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.stack(
        [np.sort(generator.choice(vocabulary, k, replace=False)) for _ in range(n)] or [[0] * k]
    )[:n].astype(np.int64)
    logits = generator.normal(size=(n, k)) * 4
    if kind == "ties":
        logits = np.round(logits / 4)
    elif kind == "one-hot":
        logits = np.where(np.arange(k) == 0, 0.0, -1e6) + 0 * logits
    elif kind == "uniform":
        logits = 0 * logits
    elif kind == "infinite":
        logits = np.where(np.arange(k) % 2, -np.inf, logits)
    tail = np.full(n, -np.inf if k == vocabulary else draw(st.floats(-30, -0.01)), np.float32)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(logits).sum(1, keepdims=True))
        left = np.log1p(-np.exp(tail.astype(np.float64)))[:, None]
    outside = generator.random(n) < 0.3 if k < vocabulary else np.zeros(n, bool)
    label = np.where(outside, -12.0, np.nan).astype(np.float32)
    return codec.TopK(ids, (logits - total + left).astype(np.float32), tail, label), vocabulary


@settings(max_examples=150, deadline=None)
@given(lists())
def test_top_k_round_trip(case: tuple[codec.TopK, int]) -> None:
    """Ids come back as they were, probabilities within a level, sums at one."""
    content, vocabulary = case
    n, k = content.ids.shape
    found = codec.decode_top_k(codec.encode_top_k(content), n, k, vocabulary)
    assert (found.ids == content.ids).all()
    assert (np.isnan(found.log_label) == np.isnan(content.log_label)).all()
    assert np.allclose(found.log_tail, np.maximum(content.log_tail, codec.LEAST_TAIL), rtol=1e-3)
    label = np.where(np.isnan(found.log_label), 0, np.exp(np.nan_to_num(found.log_label)))
    total = np.exp(found.log_probs).sum(1) + np.exp(found.log_tail) + label
    assert np.allclose(total, 1, atol=2e-3)
    mass = np.abs(np.exp(found.log_probs) - np.exp(content.log_probs)).sum(1)
    assert (mass < 0.2).all()
    if k <= codec.EXACT:
        assert (mass < 5e-3).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60000), st.integers(1, 80), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_sampled_round_trip(vocabulary: int, draws: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    said = sampled(torch.randn(n, vocabulary, generator=generator) * 3, draws, generator)
    found = codec.decode_sampled(codec.encode_sampled(said), n, vocabulary)
    most = found.ids.shape[1]
    assert (found.ids == said.ids[:, :most]).all()
    assert (found.counts == said.counts[:, :most]).all()
    assert (found.counts.sum(1) == draws).all()
    assert np.allclose(found.entropy, said.entropy)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sets(st.one_of(st.integers(0, 40), st.integers(0, 262143)), max_size=60), max_size=9
    )
)
def test_lists_of_ids_round_trip_in_both_layouts(lists: list[set[int]]) -> None:
    ids = np.array([i for one in lists for i in sorted(one)], np.int64)
    lengths = np.array([len(one) for one in lists], np.int64)
    sizes = []
    for layout, encode in enumerate((id_lists._by_target, id_lists._by_id)):
        data = b"".join(part.tobytes() for part in [np.uint8(layout), *encode(ids, lengths)])
        found = id_lists.decode_lists(Stream(data), lengths, 262144)
        assert found.tolist() == ids.tolist()
        sizes.append(len(data))
    chosen = b"".join(part.tobytes() for part in id_lists.encode_lists(ids, lengths))
    assert len(chosen) == min(sizes)


def test_a_row_without_a_target_has_no_bytes() -> None:
    found = codec.decode_top_k(b"", 0, 64, 50257)
    assert found.ids.shape == found.log_probs.shape == (0, 64)
    assert codec.decode_sampled(b"", 0, 50257).ids.shape == (0, 0)


def test_ids_that_occur_again_and_again_take_fewer_bytes() -> None:
    generator = np.random.default_rng(0)
    known = np.sort(generator.choice(50257, 2000, replace=False))
    lists = np.sort(np.stack([generator.choice(known, 64, replace=False) for _ in range(400)]), 1)
    lengths = np.full(400, 64)
    as_index, alone = (
        sum(part.nbytes for part in encode(lists.ravel(), lengths))
        for encode in (id_lists._by_id, id_lists._by_target)
    )
    assert as_index < 0.75 * alone


def test_every_single_flipped_bit_is_found(tmp_path: Path) -> None:
    value = recorded(tmp_path, rows(3), kind="top_k", k=10)[1][COLUMN]
    read(value)
    generator = np.random.default_rng(0)
    for bit in generator.choice(len(value) * 8, 200, replace=False):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(codec.Damaged):
            read(bytes(damaged))
    with pytest.raises(codec.Damaged):
        read(value[:-1])


# ---- What it says of the distribution ----

NAMED = [
    divergences.forward_kl, divergences.reverse_kl, divergences.jsd, divergences.tvd,
]  # fmt: skip


def by_loops(log_q: Tensor, log_p: Tensor, ids: list[list[int]], divergence: Any) -> Tensor:
    """The divergence over the named ids and one outcome for all others, in float64."""
    values = []
    for row, named in enumerate(ids):
        q, p = log_q[row].double().exp(), log_p[row].double().exp()
        others = [i for i in range(len(q)) if i not in named]
        coarse = [
            torch.stack([x[i] for i in named] + [sum((x[i] for i in others), torch.zeros(()))])
            for x in (q, p)
        ]
        values.append(divergence(coarse[0].log()[None], coarse[1].log()[None])[0])
    return torch.stack(values)


@pytest.mark.parametrize("divergence", NAMED, ids=lambda f: f.__name__)
def test_top_k_is_the_coarse_grained_divergence(divergence: Any) -> None:
    """Value and gradient as loops in float64 find them; never above the full divergence."""
    torch.manual_seed(0)
    n, ids, k = 12, 50, 6
    logits, teacher = torch.randn(n, ids) * 2, torch.randn(n, ids) * 2
    labels = torch.randint(0, ids, (n,))
    said = top_k_(teacher.clone(), labels, k)
    outside = ~np.isnan(said.log_label)
    assert 0 < outside.sum() < n
    label_ids = torch.where(torch.from_numpy(outside), labels, -1)[:, None]
    named = torch.cat([torch.from_numpy(said.ids), label_ids], 1)
    log_label = torch.from_numpy(np.nan_to_num(said.log_label))[:, None]
    log_probs = torch.cat([torch.from_numpy(said.log_probs), log_label], 1)
    signal = TopKSignal(named, log_probs, torch.from_numpy(said.log_tail))
    weights = Weights(0.0, 1.0, 1.0, divergence, ids)
    values, gradient = value_and_gradient(logits.clone(), labels, signal, weights)

    leaf = logits.double().requires_grad_()
    log_q, log_p = leaf.log_softmax(-1), teacher.double().log_softmax(-1)
    lists = [[i for i in row if i >= 0] for row in named.tolist()]
    expected = by_loops(log_q, log_p, lists, divergence)
    expected.sum().backward()
    assert leaf.grad is not None
    assert torch.allclose(values["divergence"].double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(gradient.double(), leaf.grad, rtol=1e-3, atol=1e-6)
    assert (values["divergence"] >= 0).all()
    full = divergence(log_q, log_p)
    assert (values["divergence"] <= full + 1e-6).all()


def test_sampled_converges_to_the_full_gradient_at_the_rate_of_draws() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(1, 30), torch.randn(1, 30) * 2
    weights = Weights(0.0, 1.0, 1.0, divergences.forward_kl, 30)
    labels = torch.zeros(1, dtype=torch.int64)
    exact, slope = value_and_gradient(logits.clone(), labels, teacher, weights)
    generator = torch.Generator().manual_seed(1)

    def error(draws: int, repeats: int = 40) -> tuple[float, float]:
        squares, values = [], []
        for _ in range(repeats):
            said = sampled(teacher, draws, generator)
            signal = Sampled(
                torch.from_numpy(said.ids),
                torch.from_numpy(said.counts / draws).float(),
                torch.from_numpy(said.entropy),
            )
            value, found = value_and_gradient(logits.clone(), labels, signal, weights)
            squares.append(float((found - slope).square().sum()))
            values.append(float(value["divergence"]))
        mean = sum(values) / repeats
        spread = np.std(values) / math.sqrt(repeats)
        assert abs(mean - float(exact["divergence"])) < 4 * spread + 1e-3
        return math.sqrt(sum(squares) / repeats), mean

    few, many = error(100)[0], error(10000)[0]
    assert 7 < few / many < 14  # ten, for a hundred times the draws


def test_outcomes_of_recorded_teacher_sum_to_one(tmp_path: Path) -> None:
    """What training sees of a quantised recording is a distribution."""
    data = recorded(tmp_path, rows(6), kind="top_k", k=12)
    trainer = make_trainer(tmp_path, data)
    batch = next(iter(trainer.get_train_dataloader()))
    targets = batch["teacher_ids"][..., 0] >= 0
    signal = TopKSignal(
        batch["teacher_ids"][targets],
        batch["teacher_log_probs"][targets],
        batch["teacher_log_tail"][targets],
    )
    log_q = torch.zeros(int(targets.sum()), VOCABULARY).log_softmax(-1)
    _, log_p = outcomes(log_q, signal)
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(len(log_p)), atol=1e-4)


# ---- Training ----


def make_trainer(tmp_path: Path, data: Any, teacher: Any = None, **options: Any) -> Any:
    evaluated = options.pop("eval_dataset", None)
    steps = {"max_steps": 20, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    args = arguments(tmp_path / "out", **(steps | {"learning_rate": 1e-2} | options))
    return DistillationTrainer(
        small_model(0),
        teacher,
        args,
        train_dataset=data,
        eval_dataset=evaluated,
        data_collator=COLLATE,
    )


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "divergence": "jsd"}], ids=str)
def test_full_recording_is_the_live_teacher(options: Any, fused: bool, tmp_path: Path) -> None:
    plain, held_out = rows(), rows(5, seed=9)
    live = make_trainer(
        tmp_path, plain, small_model(1), eval_dataset=held_out, fused_head=fused, **options
    )
    live.train()
    data = recorded(tmp_path, plain)
    told = recorded(tmp_path, held_out, name="eval")
    again = make_trainer(tmp_path, data, eval_dataset=told, fused_head=fused, **options)
    again.train()
    assert apart(weights(again), weights(live)) < 1e-3
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (live, again)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours, theirs = again.evaluate(), live.evaluate()
    for name in ("eval_loss", "eval_ce"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_two_processes_record_and_train_as_with_a_live_teacher(tmp_path: Path) -> None:
    for how in ("live", "recorded"):
        launch("recording_worker.py", str(tmp_path), how)
    live, told = (
        json.loads((tmp_path / f"{how}.json").read_text()) for how in ("live", "recorded")
    )
    assert told == pytest.approx(live, rel=1e-4)
    ours, theirs = (torch.load(tmp_path / f"{how}.pt") for how in ("recorded", "live"))
    assert apart(ours, theirs) < 1e-3
    alone = recorded(tmp_path, rows(), name="alone", shard_rows=3)
    shards = sorted((tmp_path / "r").glob("*.arrow"))
    assert len(shards) == 7
    assert [row[COLUMN] for row in load_recording(tmp_path / "r")] == alone[:][COLUMN]


def test_a_live_teacher_may_evaluate_what_recordings_train(tmp_path: Path) -> None:
    teacher, held_out = small_model(1), rows(5, seed=9)
    data = recorded(tmp_path, rows(), teacher, kind="top_k", k=8)
    mixed = make_trainer(tmp_path, data, teacher, eval_dataset=held_out, max_steps=2)
    live = make_trainer(tmp_path, rows(), teacher, eval_dataset=held_out, max_steps=2)
    assert mixed.evaluate()["eval_forward_kl"] == live.evaluate()["eval_forward_kl"]
    mixed.train()


def test_resumed_training_from_a_recording_is_the_uninterrupted_one(tmp_path: Path) -> None:
    data = recorded(tmp_path, rows(), kind="top_k", k=8)
    options = {"save_strategy": "steps", "save_steps": 5}
    whole = make_trainer(tmp_path, data, **options)
    whole.train()
    again = make_trainer(tmp_path, data, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-10"))
    assert apart(weights(again), weights(whole)) == 0


def test_rows_may_be_shuffled_filtered_sliced_and_joined(tmp_path: Path) -> None:
    """A row carries its own teacher, so that nothing `datasets` does can mix them up."""
    teacher = small_model(1)
    first, second = recorded(tmp_path, rows(12)), recorded(tmp_path, rows(9, 3), name="s")
    data = concatenate_datasets([first, second]).shuffle(seed=1)
    data = data.filter(lambda row: len(row["input_ids"]) != 5).select(range(2, 14))
    data.save_to_disk(tmp_path / "saved")
    data = load_from_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "rows.parquet")
    data = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    again, live = (
        make_trainer(tmp_path, data if t is None else data.remove_columns(COLUMN), t)
        for t in (None, teacher)
    )
    again.train()
    live.train()
    assert apart(weights(again), weights(live)) < 1e-3


def test_streams_are_recorded_and_trained_from(tmp_path: Path) -> None:
    plain = rows()
    stream = plain.to_iterable_dataset()
    data = recorded(tmp_path, stream)
    assert data[:][COLUMN] == recorded(tmp_path, plain, name="again")[:][COLUMN]
    trainer = make_trainer(tmp_path, data.to_iterable_dataset())
    trainer.train()
    assert trainer.state.global_step == 20


def test_label_outside_the_k_is_named(tmp_path: Path) -> None:
    """Support k + 2 where the label is not among the k: its own probability is exact."""
    teacher, data = small_model(1), rows(6)
    told = recorded(tmp_path, data, kind="top_k", k=2)
    batch = make_trainer(tmp_path, told).data_collator([told[i] for i in range(6)])
    ids, log_probs = batch["teacher_ids"], batch["teacher_log_probs"]
    plain = COLLATE([data[i] for i in range(6)])
    with torch.no_grad():
        found = teacher(**{k: v for k, v in plain.items() if k != "labels"}).logits.log_softmax(-1)
    outside = ids[..., 2] >= 0
    assert outside.any()
    assert torch.equal(ids[..., 2][outside], plain["labels"].roll(-1, 1)[outside])
    exact = found.gather(2, ids.clamp(min=0))
    assert torch.allclose(log_probs[..., 2][outside], exact[..., 2][outside], atol=1e-2)
    assert torch.allclose(log_probs[outside][:, :2], exact[outside][:, :2], atol=2e-2)


@pytest.mark.parametrize("fused", [True, False])
def test_labels_that_the_teacher_lacks_are_not_named(
    fused: bool, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """Tokens added to the rows' tokenizer fit the padded rows of both heads, but are not shared."""
    larger, teacher = copy.deepcopy(tiny_tokenizer), small_model(1, vocab_size=310)
    larger.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    ids = [[5, 300, 7, 301, 299, 9], [301, 300, 8]]
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids] * 2)

    def trainer(train: Any, teacher: Any = None) -> Any:
        return DistillationTrainer(
            small_model(0, vocab_size=310), teacher, arguments(tmp_path / "out", fused_head=fused),
            train_dataset=train, eval_dataset=train, processing_class=larger, data_collator=COLLATE,
        )  # fmt: skip

    theirs = LiveTeacher(teacher, tiny_tokenizer)
    live = trainer(data, theirs).evaluate()
    for k in (300, 8):
        told = recorded(tmp_path, data, theirs, str(k), kind="top_k", k=k, tokenizer=larger)
        again = trainer(told)
        found = again.evaluate()
        assert found["eval_ce"] == pytest.approx(live["eval_ce"], rel=1e-5)
        if k == 300:
            expected = live["eval_forward_kl"]
            assert found["eval_forward_kl"] == pytest.approx(expected, rel=2e-2)
        again.train()
        assert all(math.isfinite(entry.get("loss", 0.0)) for entry in again.state.log_history)


def test_a_label_beyond_the_ids_leaves_the_probabilities_as_they_are() -> None:
    logits = torch.randn(3, 20) * 3
    best, last = logits.argmax(1), torch.full((3,), 19)
    logits[:, 19] = -20.0
    found, expected = (top_k_(logits.clone(), labels, 4) for labels in (last + 1, best))
    for name in ("ids", "log_probs", "log_tail", "log_label"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


# ---- Refusals ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row | {"input_ids": [*row["input_ids"][:-1], 7]}, "another row"),
        (lambda row: row | {"labels": [-100, -100, *row["labels"][2:]]}, "another row"),
        (lambda row: row | {"recording": row["recording"][:-3]}, "damaged"),
        (lambda row: row | {"recording": None}, "has no recording"),
    ],
    ids=["ids", "mask", "cut", "missing"],
)
def test_changed_rows_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    data = recorded(tmp_path, rows(6), kind="top_k", k=4)
    collate = make_trainer(tmp_path, data).data_collator
    collate([data[0], data[1]])
    with pytest.raises(InputError, match=said):
        collate([data[0], change(dict(data[1]))])


def test_another_temperature_is_refused_with_the_remedy(tmp_path: Path) -> None:
    data = recorded(tmp_path, rows(6), kind="top_k", k=4, temperature=2.0)
    with pytest.raises(InputError, match=r"recorded at temperature 2, .*record again at 1"):
        make_trainer(tmp_path, data)


def test_any_temperature_can_be_trained_with(tmp_path: Path) -> None:
    """0.7 in float32, as rows hold it, is another number than Python's."""
    data = recorded(tmp_path, rows(6), kind="top_k", k=4, temperature=0.7)
    trainer = make_trainer(tmp_path, data, temperature=0.7, max_steps=1, logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["forward_kl"] > 0


def test_rows_without_a_recording_are_refused_where_nobody_can_be_asked(tmp_path: Path) -> None:
    """A whole batch of them too, which would be trained by its labels alone, and less of it."""
    whole = recorded(tmp_path, rows(4))
    data = concatenate_datasets([whole, rows(4, 1).add_column(COLUMN, [None] * 4)])
    trainer = make_trainer(tmp_path, data, per_device_train_batch_size=1, max_steps=8)
    with pytest.raises(InputError, match="the batch has no recording"):
        trainer.train()


def test_sets_that_were_recorded_in_two_ways_are_refused(tmp_path: Path) -> None:
    train = recorded(tmp_path, rows(6), kind="top_k", k=4)
    held_out = recorded(tmp_path, rows(6, 1), kind="top_k", k=5, name="e")
    with pytest.raises(InputError, match="eval_dataset was recorded with k 5, but .* with 4"):
        make_trainer(tmp_path, train, eval_dataset=held_out)


def test_an_offloaded_teacher_is_the_same_teacher(tmp_path: Path) -> None:
    whole = recorded(tmp_path, rows(6), kind="top_k", k=4)
    away = recorded(
        tmp_path, rows(6), LiveTeacher(small_model(1), placement="offloaded"), "o",
        kind="top_k", k=4,
    )  # fmt: skip
    assert away[:][COLUMN] == whole[:][COLUMN]


def test_samples_serve_forward_kl_only(tmp_path: Path) -> None:
    data = recorded(tmp_path, rows(6), kind="sampled")
    make_trainer(tmp_path, data).train()
    with pytest.raises(InputError, match="no other divergence"):
        make_trainer(tmp_path, data, divergence="jsd")


def test_two_teachers_are_mixed_only_when_allowed(tmp_path: Path) -> None:
    first = recorded(tmp_path, rows(6), kind="top_k", k=4)
    second = recorded(tmp_path, rows(6), small_model(5), "s", kind="top_k", k=4)
    both = concatenate_datasets([first, second])
    with pytest.raises(InputError, match="has teacher"):
        make_trainer(tmp_path, both).train()
    make_trainer(tmp_path, both, mixed_recordings=True).train()


def test_nobody_to_learn_from_is_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train_dataset has no recorded teacher"):
        make_trainer(tmp_path, rows(6))
    with pytest.raises(InputError, match="eval_dataset has no recorded teacher"):
        make_trainer(tmp_path, recorded(tmp_path, rows(6)), eval_dataset=rows(3))


# ---- The folder ----


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Interrupted(Exception):
    pass


def test_an_interrupted_recording_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    data = rows(30)
    recorded(tmp_path, data, name="whole", kind="sampled")
    teacher = small_model(1)
    asked = 0
    forward = teacher.forward

    @functools.wraps(forward)
    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 4:
            raise Interrupted
        return forward(*args, **kwargs)

    teacher.forward = dies
    with pytest.raises(Interrupted):
        recorded(tmp_path, data, teacher, "cut", kind="sampled", batch_size=4)
    with pytest.raises(InputError, match="no complete recording"):
        load_recording(tmp_path / "cut")
    with pytest.raises(InputError, match="missing' is a folder that does not exist"):
        load_recording(tmp_path / "missing")
    assert list((tmp_path / "cut").glob("shard-*.arrow"))
    del teacher.forward
    recorded(tmp_path, data, teacher, "cut", kind="sampled", batch_size=4)
    once = recorded(tmp_path, data, teacher, "once", kind="sampled", batch_size=4)
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "once")
    assert len(load_recording(tmp_path / "once")) == len(once) == 30


def test_a_folder_of_another_recording_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path, rows(6), kind="top_k", k=4)
    with pytest.raises(InputError, match="holds a recording with k 4, not 5"):
        recorded(tmp_path, rows(6), kind="top_k", k=5)
    with pytest.raises(InputError, match="recorded from other rows"):
        recorded(tmp_path, rows(6, seed=4), kind="top_k", k=4)


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, monkeypatch: Any) -> None:
    from hf_distill.recordings import shards

    writer = shards.ArrowWriter
    made = []

    def full(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        if len(made) == 3:
            raise OSError(28, "No space left on device")
        return writer(*args, **kwargs)

    monkeypatch.setattr(shards, "ArrowWriter", full)
    with pytest.raises(InputError, match="2 finished shards are kept"):
        recorded(tmp_path, rows(20))
    assert len(list((tmp_path / "r").glob("shard-*.arrow"))) == 2
    recorded(tmp_path, rows(20))


def test_nothing_in_a_recording_is_pickled(tmp_path: Path) -> None:
    recorded(tmp_path, rows(6))
    suffixes = {path.suffix for path in (tmp_path / "r").iterdir()}
    assert suffixes == {".arrow", ".json", ".md"}
    assert not any(b"pickle" in content for content in bytes_of(tmp_path / "r").values())


def test_the_card_says_what_is_in_it(tmp_path: Path) -> None:
    data = recorded(tmp_path, rows(20), kind="top_k", k=12)
    card = (tmp_path / "r" / "README.md").read_text()
    size = sum(map(len, data[COLUMN]))
    assert f"{size:,} bytes" in card
    assert "k = 12" in card
    manifest = json.loads((tmp_path / "r" / "recording.json").read_text())
    assert manifest["rows"] == 20
    assert 0 < manifest["rounding"] < 0.05
    assert str(tmp_path) not in card


def test_the_estimate_knows_the_size(tmp_path: Path) -> None:
    data = rows(60)
    told = estimate(
        data,
        small_model(1),
        data_collator=COLLATE,
        sample_rows=30,
        settings=RecordingSettings(k=8),
    )
    found = recorded(tmp_path, data, kind="top_k", k=8)
    size = sum(map(len, found[COLUMN]))
    assert told.bytes == pytest.approx(size, rel=0.15)
    assert told.seconds > 0


@pytest.mark.parametrize("options", [{"kind": "best"}, {"k": 0}, {"temperature": 0.0}], ids=str)
def test_settings_out_of_range_are_refused(options: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        recorded(tmp_path, rows(3), **options)


def test_what_failed_leaves_no_engine_behind(tmp_path: Path) -> None:
    """A training with mixed precision after it would be refused by accelerate."""
    AcceleratorState._reset_state()
    with pytest.raises(InputError, match="k is 0"):
        recorded(tmp_path, rows(3), kind="top_k", k=0)
    with pytest.raises(InputError, match="the data set is empty"):
        estimate(rows(3).select([]), small_model(1), data_collator=COLLATE)
    assert estimate(rows(3), small_model(1), data_collator=COLLATE).rows == 3
    assert not AcceleratorState._shared_state
