"""A micro-batch on an accelerator never waits for the host, nor the host for it.

The meta device stands for the accelerator: its tensors have no values, so that every attempt to
read one (`item`, `nonzero`, a boolean index, a copy to the host) fails. Copies to it are counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory
from trainer_setup import arguments, make_rows, small_model, weights
from transformers import BatchEncoding
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_distill import DistillationTrainer, InputError, record
from hf_distill.data import Collator
from hf_distill.models import output_head
from hf_distill.tasks import TARGET_INDEX
from hf_distill.training import step_sums, target_index

META = torch.device("meta")
COLLATE = Collator(1, 0, padding_side="left")
WEIGHTS = {"ce_weight": [1.0, 0.0, 2.0, 0.5] * 3, "divergence_weight": [0.5, 1.0, 0.0, 2.0] * 3}


class Copies(TorchDispatchMode):
    """Collects the operations that take a tensor of the host and give one on the accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, Tensor)]
        if isinstance(out, Tensor) and out.device == META:
            self.found += [str(func) for a in given if a.device != META]
        return out


def rows(number: int = 12, weighted: bool = False) -> Dataset:
    made = Dataset.from_list(make_rows(number, seed=3))
    for name, values in WEIGHTS.items() if weighted else ():
        made = made.add_column(name, values)  # type: ignore[call-arg]
    return made


def trainer(tmp_path: Path, teacher: str, data: Any = None, **options: Any) -> DistillationTrainer:
    """Two rows a micro-batch, two micro-batches a step."""
    data = rows() if data is None else data
    student, live = small_model(0, attn_implementation="eager"), None
    if teacher == "live":
        live = small_model(1, attn_implementation="eager")
    elif teacher == "adapter":
        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        live = student = get_peft_model(student, config)
    elif teacher != "none":
        kinds = {"top_k": {"k": 4}, "sampled": {"draws": 4}, "full": {}}
        folder = tmp_path / "recording"
        data = record(
            data, small_model(1), folder, kind=teacher, data_collator=COLLATE, **kinds[teacher]
        )
    settings = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1,
        "alpha": 0.0 if teacher == "none" else 0.5,
    }  # fmt: skip
    options = {"data_collator": COLLATE} | options
    own = {k: options.pop(k) for k in ("data_collator", "kind") if k in options}
    kind = own.pop("kind", DistillationTrainer)
    return kind(
        student, live, arguments(tmp_path, **(settings | options)), train_dataset=data, **own
    )


@contextmanager
def on_the_accelerator(made: DistillationTrainer, patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Move a trainer to the meta device, after a step on the CPU that does what is done once.

    Yields the order of backwards and of answers that were read from the device.
    """
    made.train()
    order: list[str] = []

    def read(copy: Any) -> list[int]:
        order.append("read")
        return [0] * copy._tensor.numel()

    def backward(loss: Tensor) -> None:
        loss.backward()
        order.append("backward")

    patch.setattr(step_sums.HostCopy, "read", read)
    patch.setattr(made.accelerator, "backward", backward)
    # There is no autocast for this device, and none is on.
    patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    # On a real device its values are copied; on this one there would be nothing to see.
    make = torch.tensor
    patch.setattr(torch, "tensor", lambda data, device=None, **o: make(data, **o).to(device))
    patch.setattr(type(made.args), "device", META)
    patch.setattr(type(made.accelerator), "device", META)
    made.model.to(META)
    if made.teacher is not None:
        made.teacher.model.to(META)
        made.teacher.runner.autocast = nullcontext
    made._sums.reset()
    yield order


def run_two_steps(made: DistillationTrainer) -> list[str]:
    """Run the micro-batches of two steps; the copies to the device within those of the second."""
    loader, copies = iter(made.get_train_dataloader()), Copies()
    for within in (nullcontext(), copies):
        batches, counts = made.get_batch_samples(loader, 2, META)
        assert {t.device for b in batches for t in b.values()} == {META}
        for number, batch in enumerate(batches):
            made.accelerator.gradient_state._set_sync_gradients(number == 1)
            with within:
                loss = made.training_step(made.model, batch, counts)
            assert loss.device == META
    return copies.found


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("fused_head", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("teacher", ["none", "live", "adapter", "top_k", "sampled", "full"])
def test_no_micro_batch_waits(
    teacher: str, fused_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, teacher, rows(weighted=True), fused_head=fused_head)
    with on_the_accelerator(made, monkeypatch) as order:
        assert run_two_steps(made) == []
    assert all(p.grad is not None for p in made.model.parameters() if p.requires_grad)
    # The check for losses that are not finite is read once a step, behind the backward.
    assert order == ["backward", "backward", "read"] * 2


def nothing_known(self: Any, batch: Any) -> None:
    return None


def fresh_probe(self: Any, device: torch.device) -> Tensor:
    return torch.tensor(output_head.PROBE, device=device)


def read_at_once(self: Any, tensor: Tensor) -> None:
    tensor.tolist()


@pytest.mark.parametrize(
    ("place", "name", "wrong", "noticed"),
    [
        (target_index.StepTargets, "find", nothing_known, "nonzero"),
        (output_head.HeadReplacement, "_probe", fresh_probe, "_to_copy"),
        (step_sums.HostCopy, "__init__", read_at_once, "meta tensor"),
    ],
    ids=["targets", "probe", "check"],
)
def test_each_wait_is_noticed(
    place: Any, name: str, wrong: Any, noticed: str, tmp_path: Path, monkeypatch: Any
) -> None:
    made = trainer(tmp_path, "live")
    with on_the_accelerator(made, monkeypatch):
        monkeypatch.setattr(place, name, wrong)
        try:
            found = str(run_two_steps(made))
        except (NotImplementedError, RuntimeError) as error:
            found = str(error)
    assert noticed in found


# ---- The index belongs to its batch, whatever is done to the batch on the way ----


class Counted(DistillationTrainer):
    """Counts the micro-batches whose index was not known."""

    unknown = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.unknown += self._loss.step_targets.find(inputs) is None
        return super().compute_loss(model, inputs, *args, **kwargs)


class OwnLoader(Counted):
    """Its loader knows nothing of the trainer's collator."""

    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(list(self.train_dataset), 2, collate_fn=COLLATE)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(rows())


def as_encoding(batch: list[Any]) -> BatchEncoding:
    return BatchEncoding(COLLATE(batch))


def trained(tmp_path: Path, data: Any = None, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    options = {"max_steps": 3, "train_sampling_strategy": "sequential", "kind": Counted} | options
    made = trainer(tmp_path, "live", data, learning_rate=1e-2, **options)
    made.train()
    return made, weights(made)


@pytest.mark.parametrize(
    "options",
    [
        {"data": Stream()},
        {"data_collator": as_encoding},
        {"kind": OwnLoader},
        {"accelerator_config": {"dispatch_batches": True}},
        {"accelerator_config": {"dispatch_batches": True}, "data": Stream()},
        {"accelerator_config": {"split_batches": True}},
        {"dataloader_num_workers": 1},
    ],
    ids=["stream", "encoding", "own loader", "dispatch", "dispatch stream", "split", "workers"],
)
def test_loaders_agree(options: dict[str, Any], tmp_path: Path) -> None:
    _, expected = trained(tmp_path)
    made, found = trained(tmp_path, **options)
    assert made.unknown == 0
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class Forgets(Counted):
    """Makes the second half of each row's labels no label, after the batch was drawn."""

    in_place = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs["labels"] if self.in_place else inputs["labels"].clone()
        labels[:, labels.shape[1] // 2 :] = -100
        return super().compute_loss(model, {**inputs, "labels": labels}, *args, **kwargs)


class ForgetsInPlace(Forgets):
    in_place = True


class FirstRowOnly(Counted):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = {name: value[:1] for name, value in inputs.items()}
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("kind", [Forgets, ForgetsInPlace, FirstRowOnly])
def test_a_changed_batch_has_the_targets_of_its_labels(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, found = trained(tmp_path, kind=kind)
    assert made.unknown == 6
    monkeypatch.setattr(target_index.StepTargets, "find", nothing_known)
    for name, value in trained(tmp_path, kind=kind)[1].items():
        assert torch.equal(found[name], value), name


def test_models_and_hooks_do_not_see_the_index(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class Watching(DistillationTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(set(inputs))
            return super().training_step(model, inputs, *args, **kwargs)

        def teacher_inputs(self, inputs: Any) -> Any:
            seen.append(set(inputs) | {"labels"})
            return inputs

    made = trainer(tmp_path, "live", kind=Watching)
    made.train()
    made.evaluate(rows(4))
    assert set.union(*seen) == {"input_ids", "labels", "attention_mask"}


# ---- Pinned memory ----


@pytest.mark.parametrize("teacher", ["live", "top_k"])
def test_every_part_of_a_batch_can_be_pinned(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, teacher, rows(weighted=True))
    batch = made.data_collator(list(made.train_dataset.select(range(2))))
    pinned: list[Tensor] = []

    def pin(self: Tensor) -> Tensor:
        pinned.append(self.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    done = pin_memory(batch)
    places = done.pop(TARGET_INDEX).places
    assert {id(t) for t in pinned} == {id(t) for t in (places, *done.values())}
    assert torch.equal(places, batch.pop(TARGET_INDEX).places)
    assert {"ce_weight", "input_ids"} < set(done) == set(batch)
    assert ("teacher_ids" in done) == (teacher == "top_k")


# ---- What no device can look up is refused before any forward ----


def smaller_teacher() -> Any:
    return small_model(1, vocab_size=30)


def refused(made: DistillationTrainer, message: str, **columns: list[int]) -> None:
    plain = {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}
    with pytest.raises(InputError, match=message):
        made.data_collator([plain, {**plain, **columns}])


def test_the_collator_refuses_what_a_model_lacks(tmp_path: Path) -> None:
    live = DistillationTrainer(
        small_model(0), smaller_teacher(), arguments(tmp_path), train_dataset=rows()
    )
    refused(live, "the student reads ids up to 39, but the batch has the token id 40",
            input_ids=[3, 40, 5, 6])  # fmt: skip
    refused(live, "the teacher 'GPT2LMHeadModel' reads ids up to 29.* the token id 35: probably "
            r"the data were tokenized for another model .*, or .* \(resize the embedding",
            input_ids=[3, 35, 5, 6])  # fmt: skip
    refused(live, "token id -1: remove it from the data", input_ids=[3, -1, 5, 6])
    refused(live, "a label is the token id 40.* 0 to 39", labels=[3, 4, 40, 6])
    refused(live, "a label is the token id -1.*-100 means no label", labels=[3, 4, -1, 6])


def test_masked_ids_that_a_model_lacks_are_replaced(tmp_path: Path) -> None:
    made = DistillationTrainer(
        small_model(0),
        smaller_teacher(),
        arguments(tmp_path),
        train_dataset=rows(),
        data_collator=Collator(35, 35),
    )
    batch = made.data_collator([{"input_ids": [3, 4, 5]}, {"input_ids": [6]}])
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 0, 0]]


def test_a_batch_of_another_loader_is_checked_when_it_is_drawn(tmp_path: Path) -> None:
    made = OwnLoader(
        small_model(0), smaller_teacher(), arguments(tmp_path), train_dataset=list(rows())
    )
    made.train_dataset[1]["input_ids"][1] = 35
    with pytest.raises(InputError, match="the teacher 'GPT2LMHeadModel' reads ids up to 29"):
        made.get_batch_samples(iter(made.get_train_dataloader()), 1, META)


# ---- Defaults of the arguments ----


def test_the_filter_of_the_log_is_the_users(tmp_path: Path) -> None:
    assert not arguments(tmp_path).logging_nan_inf_filter
    assert arguments(tmp_path, logging_nan_inf_filter=True).logging_nan_inf_filter


def test_batches_are_copied_without_waiting_unless_the_user_says_so(tmp_path: Path) -> None:
    file = tmp_path / "loading.json"
    file.write_text(json.dumps({"non_blocking": False}))

    def chosen(given: Any, **options: Any) -> bool:
        options = {"use_cpu": False} | options
        return arguments(
            tmp_path, accelerator_config=given, **options
        ).accelerator_config.non_blocking

    for unsaid in (None, {}, {"split_batches": True}, '{"even_batches": true}'):
        assert chosen(unsaid)
        assert not chosen(unsaid, dataloader_pin_memory=False)  # Trainer would warn
        assert not chosen(unsaid, use_cpu=True)
    for said in (
        {"non_blocking": False},
        '{"non_blocking": false}',
        str(file),
        AcceleratorConfig(),
    ):
        assert not chosen(said)
    assert chosen({"non_blocking": True}, use_cpu=True)


# ---- Losses that fp16 skips ----


def test_a_skipped_loss_is_logged_as_the_mean(tmp_path: Path) -> None:
    scaler = SimpleNamespace(is_enabled=lambda: True)
    seen = SimpleNamespace(
        accelerator=SimpleNamespace(scaler=scaler),
        state=SimpleNamespace(global_step=4),
        _globalstep_last_logged=1,
        _tr_loss=torch.tensor(6.0),
    )
    assert step_sums.loss_for_log(seen, torch.tensor(2.0)) == 2.0
    assert step_sums.loss_for_log(seen, torch.tensor(torch.inf)) == 1.5
    seen.accelerator.scaler = None
    assert step_sums.loss_for_log(seen, torch.tensor(torch.inf)) == torch.inf
