"""One feature loss: a mean over pairs of layers, as a term of the objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_distill.errors import InputError
from hf_distill.losses.features import attention_kl, hidden_cosine, hidden_mse, relation_kl
from hf_distill.losses.objective import Term
from hf_distill.models.taps import AttentionCall, Found, Place
from hf_distill.training.feature_settings import FeatureSetting

STATES = {"hidden_cosine": hidden_cosine, "hidden_mse": hidden_mse, "embeddings": hidden_mse}
Pair = tuple[Place, Place]  # the student's and the teacher's


@dataclass(frozen=True)
class FeatureLoss:
    """One feature loss in one stack of layers.

    name: of the term; pairs: the places compared, (student's, teacher's), over which it is a mean
    denominator: "attended", or in the decoder of an encoder-decoder "targets"
    """

    name: str
    setting: FeatureSetting
    pairs: Sequence[Pair]
    denominator: str

    def __call__(self, ours: Found, theirs: Found, mask: Tensor) -> Term:
        """The term. ours: with projected states in place of the student's own."""
        values = [self._compare(ours, theirs, pair, mask) for pair in self.pairs]
        return Term(torch.stack(values).mean(0), self.denominator, self.setting.weight)

    def _compare(self, ours: Found, theirs: Found, pair: Pair, mask: Tensor) -> Tensor:
        """(rows,) sums over positions."""
        for found, place, role in zip((ours, theirs), pair, ("student", "teacher"), strict=True):
            if place not in found:
                raise InputError(
                    f"features: {self.name} finds no {place.what} at {place} of the {role}, which "
                    "does not use transformers' attention functions: leave out this feature"
                )
        student, teacher = ours[pair[0]], theirs[pair[1]]
        kind = self.setting.kind
        if isinstance(student, Tensor) and isinstance(teacher, Tensor):
            self._check(student, teacher, mask, pair)
            return STATES[kind](student, teacher.to(student.device), mask)
        assert isinstance(student, AttentionCall)
        assert isinstance(teacher, AttentionCall)
        if kind == "attention":
            maps, wanted = student.maps, teacher.maps
            assert maps is not None  # see `make_attention_visible`
            assert wanted is not None
            if maps.shape != wanted.shape:
                raise InputError(
                    f"features: {self.name} compares maps of the shape {tuple(maps.shape)} with "
                    f"the teacher's {tuple(wanted.shape)}, but needs equal heads and positions: "
                    "for models with different heads use 'relations'"
                )
            self._check_gradient(maps, pair[0])
            return attention_kl(maps, wanted.to(maps.device), mask)
        return self._relations(student, teacher, mask, pair)

    def _relations(
        self, student: AttentionCall, teacher: AttentionCall, mask: Tensor, pair: Pair
    ) -> Tensor:
        heads = self.setting.heads or teacher.query.shape[1]
        total: Tensor | None = None
        for name in ("query", "key", "value"):
            ours, theirs = (_merged(getattr(call, name)) for call in (student, teacher))
            for states, role in ((ours, "student"), (theirs, "teacher")):
                if states.shape[-1] % heads:
                    raise InputError(
                        f"features: relations in {heads} heads do not divide the {role}'s {name} "
                        f"of width {states.shape[-1]}: set heads to a divisor of all widths"
                    )
            self._check(ours, theirs, mask, pair, width=False)
            value = relation_kl(ours, theirs.to(ours.device), mask, heads)
            total = value if total is None else total + value
        assert total is not None
        return total

    def _check(
        self, ours: Tensor, theirs: Tensor, mask: Tensor, pair: Pair, *, width: bool = True
    ) -> None:
        same = ours.shape == theirs.shape if width else ours.shape[:2] == theirs.shape[:2]
        if not same or ours.dim() != 3 or ours.shape[:2] != mask.shape:
            raise InputError(
                f"features: {self.name} compares states of the shape {tuple(ours.shape)} at "
                f"{pair[0]} of the student with {tuple(theirs.shape)} at {pair[1]} of the teacher, "
                f"over (rows, positions) {tuple(mask.shape)}: both have to read the same positions"
            )
        self._check_gradient(ours, pair[0])

    def _check_gradient(self, states: Tensor, place: Place) -> None:
        if torch.is_grad_enabled() and not states.requires_grad:
            raise InputError(
                f"features: {self.name} has no gradient at the {place} of the student: its weights "
                "up to there are frozen, or activation checkpointing has use_reentrant=True; "
                "choose other layers, or set use_reentrant to False"
            )


def _merged(states: Tensor) -> Tensor:
    """(rows, heads, positions, width) -> (rows, positions, heads * width)"""
    return states.transpose(1, 2).flatten(2)
