"""Capture internal states of chosen layers of a model during a forward.

`output_hidden_states` and `output_attentions` would keep the states of all layers. Here hooks on
the chosen layers keep references to tensors that the forward makes anyway. They add no operation to
the forward, so that activation checkpointing repeats exactly the same operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_distill.errors import InputError, warn_once
from hf_distill.models.layer_selection import Stack

HIDDEN, EMBEDDINGS, ATTENTION = "hidden", "embeddings", "attention"


@dataclass(frozen=True)
class Place:
    """A place in a model.

    what: HIDDEN, the output of a layer; EMBEDDINGS, the input of the first one; ATTENTION, the
        self-attention of a layer
    """

    what: str
    stack: Stack
    layer: int = 0

    def __str__(self) -> str:
        where = f"layer {self.layer} of its {self.stack.name}"
        return f"input of its {self.stack.name}" if self.what == EMBEDDINGS else where


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function.

    query, key, value: (rows, heads, positions, width of a head); fewer heads of keys and values in
        grouped-query attention
    weights: (rows, heads, positions, positions), None where the implementation makes none
    """

    function: Callable[..., tuple[Tensor, Tensor | None]]
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    rest: tuple[Any, ...]
    options: Mapping[str, Any]
    weights: Tensor | None

    @property
    def maps(self) -> Tensor | None:
        """The attention maps without dropout, (rows, heads, positions, positions)."""
        if self.weights is None or not self.options.get("dropout"):
            return self.weights
        inputs = (self.module, self.query, self.key, self.value, *self.rest)
        return self.function(*inputs, **{**self.options, "dropout": 0.0})[1]


Found = dict[Place, Tensor | AttentionCall]


class Taps:
    """Captures the states at some places of a model in its forwards.

    model: without wrappers; places: of this model
    """

    def __init__(self, model: PreTrainedModel, places: Iterable[Place]) -> None:
        self._model = model
        self._places = list(dict.fromkeys(places))
        self._listens_to_attention = any(place.what == ATTENTION for place in self._places)

    @contextmanager
    def listening(self) -> Iterator[Found]:
        """The states that one forward inside this context makes at the places."""
        found: Found = {}
        inside: list[Place] = []  # the layer whose attention is awaited
        with ExitStack() as undo:
            for place in self._places:
                for handle in self._hooks(place, found, inside):
                    undo.callback(handle.remove)
            if self._listens_to_attention:
                undo.enter_context(_noting_attention(found, inside))
            yield found

    def _hooks(self, place: Place, found: Found, inside: list[Place]) -> Iterator[Any]:
        block: nn.Module = self._model.get_submodule(f"{place.stack.path}.{place.layer}")

        def given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(place, args[0] if args else kwargs["hidden_states"])

        def made(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found.setdefault(place, output[0] if isinstance(output, tuple | list) else output)

        def entered(*_: Any) -> None:
            inside.append(place)

        def left(*_: Any) -> None:
            inside.clear()

        if place.what == EMBEDDINGS:
            yield block.register_forward_pre_hook(given, with_kwargs=True)
        elif place.what == HIDDEN:
            yield block.register_forward_hook(made)
        else:
            yield block.register_forward_pre_hook(entered)
            yield block.register_forward_hook(left)


def make_attention_visible(model: PreTrainedModel, role: str) -> None:
    """Switch to the attention implementation that returns attention maps, `eager`.

    raises: InputError for a model that has none
    """
    before = model.config._attn_implementation
    if before == "eager":
        return
    model.set_attn_implementation("eager")
    if model.config._attn_implementation != "eager":
        raise InputError(
            f"the {role} computes attention by {before!r}, which returns no maps, and cannot be "
            "switched to 'eager': leave out the feature 'attention'"
        )
    warn_once("The %s now computes attention by 'eager', since %r returns no maps.", role, before)


@contextmanager
def _noting_attention(found: Found, inside: list[Place]) -> Iterator[None]:
    """Capture the first call of an attention function in each layer (self-attention in decoders).

    All models get their attention function from one registry.
    """
    registry: Any = ALL_ATTENTION_FUNCTIONS
    get = registry.get_interface

    def get_noting(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = get(name, default)
        if not inside or inside[-1] in found:
            return function
        place = inside[-1]

        def noting(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
        ) -> tuple[Tensor, Tensor | None]:
            output, weights = function(module, query, key, value, *rest, **options)
            found[place] = AttentionCall(
                function, module, query, key, value, rest, options, weights
            )
            return output, weights

        return noting

    registry.get_interface = get_noting
    try:
        yield
    finally:
        del registry.get_interface
