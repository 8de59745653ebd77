"""Feature losses: terms of the objective that compare internal states of student and teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.errors import InputError
from hf_distill.losses.objective import Term
from hf_distill.losses.targets import Targets
from hf_distill.models.base import base_model
from hf_distill.models.layer_selection import Stack
from hf_distill.models.shorter_config import find_stacks
from hf_distill.models.taps import (
    Found,
    Place,
    Taps,
    make_attention_visible,
)
from hf_distill.teachers import LiveTeacher
from hf_distill.training.feature_losses import FeatureLoss
from hf_distill.training.feature_settings import KINDS, FeatureSetting, feature_settings, pairs_of

# The module of the student in training, and the file of a checkpoint, that hold the projections.
PROJECTIONS = "feature_projections"
FILE = f"{PROJECTIONS}.safetensors"


class Features:
    """All feature losses of a trainer.

    student, teacher: without wrappers; teacher None where there are no losses
    losses: in the order of the settings; projections: to the teacher's width, by name of a loss
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        settings: Sequence[FeatureSetting] = (),
        seed: int = 0,
    ) -> None:
        self._student = student
        self.losses: list[FeatureLoss] = []
        self.projections = nn.ModuleDict()
        if teacher is None:
            return
        stacks = (find_stacks(student), find_stacks(teacher)) if settings else ([], [])
        for setting in settings:
            for ours, theirs, pairs in pairs_of(setting, *stacks):
                self._add(setting, ours, theirs, pairs, teacher, seed)
        if any(setting.kind == "attention" for setting in settings):
            make_attention_visible(student, "student")
            make_attention_visible(teacher, "teacher")
        places = [pair for loss in self.losses for pair in loss.pairs]
        self._of_student = Taps(student, (ours for ours, _ in places))
        self._of_teacher = Taps(teacher, (theirs for _, theirs in places))

    def __bool__(self) -> bool:
        return bool(self.losses)

    def _add(
        self,
        setting: FeatureSetting,
        ours: Stack,
        theirs: Stack,
        found: Sequence[tuple[int, int]],
        teacher: PreTrainedModel,
        seed: int,
    ) -> None:
        kind = KINDS[setting.kind]
        sides = self._student.config.is_encoder_decoder
        name = f"{setting.kind}_{ours.name}" if sides else setting.kind
        decoder = sides and ours.name == "decoder"
        pairs = [(Place(kind.what, ours, s), Place(kind.what, theirs, t)) for s, t in found]
        self.losses.append(FeatureLoss(name, setting, pairs, "targets" if decoder else "attended"))
        widths = _width(self._student, ours), _width(teacher, theirs)
        if kind.projected and widths[0] != widths[1]:
            with torch.random.fork_rng(), self._student.device:
                torch.manual_seed(seed)  # the same on every process
                self.projections[name] = nn.Linear(*widths, bias=False, dtype=self._student.dtype)

    # ---- Forwards ----

    @contextmanager
    def of_teacher(self) -> Iterator[Found]:
        """The teacher's states, of one forward inside of this context."""
        if not self:
            yield {}
            return
        with self._of_teacher.listening() as found:
            yield found

    @contextmanager
    def of_student(self) -> Iterator[Projected]:
        """The student's states, of one forward inside of this context, and their projections.

        The projections are computed in the student's forward, where engines have the weights.
        """
        if not self:
            yield Projected({}, {})
            return
        projected: dict[str, Found] = {}
        with self._of_student.listening() as found:

            def project(_: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
                for loss in self.losses:
                    if loss.name in self.projections:
                        layer = self.projections[loss.name]
                        places = [ours for ours, _ in loss.pairs if ours in found]
                        projected[loss.name] = {place: layer(found[place]) for place in places}
                made: Any = [s for states in projected.values() for s in states.values()]
                return _joined(outputs, made)

            handle = self._student.register_forward_hook(project)
            try:
                yield Projected(found, projected)
            finally:
                handle.remove()

    def check_written(self, asked: Mapping[str, Any] | None) -> None:
        """InputError if the teacher reads another batch than the student. asked: that batch"""
        if asked is not None and self:
            raise InputError(
                "features compare layers at the same positions, but the teacher reads other "
                "prompts than the student: leave out features, or the column of teacher prompts"
            )

    def terms(
        self, ours: Projected, theirs: Found, batch: Mapping[str, Any], targets: Targets
    ) -> dict[str, Term]:
        """The terms by name, of what the two contexts have found.

        batch: for its attention mask
        """
        masks = {"targets": targets.mask, "attended": _attended(batch)} if self else {}
        with torch.autocast(targets.index.device.type, enabled=False):
            return {
                loss.name: loss(
                    {**ours.found, **ours.projected.get(loss.name, {})},
                    theirs,
                    masks[loss.denominator],
                )
                for loss in self.losses
            }

    # ---- Learned projections ----

    def attach(self) -> None:
        """Make the projections a part of the student, for engines and optimizer, but not of what
        it saves."""
        if self.projections and PROJECTIONS not in self._student._modules:
            self._student.add_module(PROJECTIONS, self.projections)
            kept: Any = self._student._keys_to_ignore_on_save
            self._student._keys_to_ignore_on_save = {*(kept or ()), *self._keys}

    def detach(self) -> None:
        """Leave the student without them."""
        if self._student._modules.pop(PROJECTIONS, None) is not None:
            kept: Any = self._student._keys_to_ignore_on_save
            self._student._keys_to_ignore_on_save = {*kept} - {*self._keys}

    def save(self, folder: str) -> None:
        """Write the projections into a checkpoint."""
        if self.projections:
            save_file(self.projections.state_dict(), Path(folder, FILE))

    def load(self, checkpoint: str) -> None:
        """Read the projections of a checkpoint.

        raises: InputError where it has none, or others
        """
        if not self.projections:
            return
        path = Path(checkpoint, FILE)
        try:
            found = load_file(path)
            self.projections.load_state_dict(found)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{path.parent} has no projections that fit these features: resume with the "
                "features that it was trained with, or start anew"
            ) from error

    @property
    def _keys(self) -> list[str]:
        return [f"{PROJECTIONS}.{key}" for key in self.projections.state_dict()]


def make_features(trainer: Any) -> Features:
    """The feature losses of a trainer; InputError if they cannot be computed."""
    settings, student = feature_settings(trainer.args.features), base_model(trainer.model)
    if not settings:
        return Features(student)
    if not isinstance(trainer.teacher, LiveTeacher) or trainer._recorded is not None:
        raise InputError(
            "features compare the student's layers with the teacher's, but recordings and custom "
            "teachers have no layers: train on rows without recordings, with a model as teacher"
        )
    if trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise InputError(
            "features read the layers by hooks, which torch.compile does not support: set "
            "torch_compile to False"
        )
    features = Features(student, base_model(trainer.teacher.model), settings, trainer.args.seed)
    if features.projections and trainer.optimizer is not None:
        raise InputError(
            "features of another width need trained projections, which an optimizer of your own "
            "does not include: leave out optimizers="
        )
    return features


@dataclass(frozen=True)
class Projected:
    """A student's states at places, and by name of a loss those that were projected for it."""

    found: Found
    projected: dict[str, Found]


def _width(model: PreTrainedModel, stack: Stack) -> int:
    """The width of a stack's hidden states, by the config of the module nearest to it."""
    parts = stack.path.split(".")
    for end in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        width = getattr(config, "hidden_size", None)
        if width is not None:
            return int(width)
    return int(model.config.get_text_config().hidden_size)


def _attended(batch: Mapping[str, Any]) -> Tensor:
    """(rows, positions) bool"""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    if ids is None:
        ids = batch["inputs_embeds"][..., 0]
    return torch.ones_like(ids, dtype=torch.bool)


class _Join(torch.autograd.Function):
    """The first argument. The others become reachable from it, with no gradient through it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.others = len(others)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*gradients, *[None] * ctx.others)


def _joined(outputs: Any, states: Sequence[Tensor]) -> Any:
    """The outputs of a forward, from which the graph also leads to these states.

    DDP searches the graph from the outputs for the weights that a forward has used, and does not
    wait for the gradients of other weights.
    """
    if not states or not torch.is_grad_enabled():
        return outputs
    for name, value in outputs.items():
        if isinstance(value, Tensor) and value.requires_grad:
            outputs[name] = _Join.apply(value, *states)
            break
    return outputs
