"""Replace a model's output head for one forward.

The fused head needs the inputs of the output head, and the head's weight, while both exist: inside
the wrapped model's own forward, where DDP's reducer, the gathering hooks of ZeRO-3 and FSDP2,
autocast and gradient checkpointing run as usual. So the `forward` of the head is replaced on the
instance, for one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from hf_distill.losses.linear_head import LinearHead, LogitTransform
from hf_distill.models.shards import gathered_zero3

T = TypeVar("T")

LATE_BIAS = "final_logits_bias"
# Returned in place of logits: small and large values, which reveal both scaling and capping.
PROBE = (-60.0, -1.0, 0.0, 0.5, 60.0)


class UnsupportedHead(Exception):
    """A head that cannot be replaced, with the reason."""


class HeadReplacement:
    """The output head of a model, replaceable for one forward.

    model: not yet wrapped by an engine
    adapter: which of a `peft` model's adapters will be active: None for the current one, "" for
        none of them
    raises: UnsupportedHead unless the head is a plain linear layer
    """

    def __init__(self, model: PreTrainedModel, adapter: str | None = None) -> None:
        self.module = _linear_head(model, adapter)
        self._late = _LateBias(model) if LATE_BIAS in model._buffers else None
        self.transform = _logit_transform(model)
        self._probed = False
        self._probes: dict[torch.device, Tensor] = {}
        self._at_the_head: Callable[[Tensor], Tensor] | None = None
        # Under torch.compile the graph ends before the head, which is not compiled: a function that
        # changes from call to call would be compiled again for each batch.
        self._replacement = torch.compiler.disable(self._call)

    @property
    def head(self) -> LinearHead:
        """The head's parameters as they are now: perhaps in shards, or offloaded."""
        return LinearHead(self.module.weight, self._bias(), self.transform)

    def forward(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        use: Callable[[Tensor, LinearHead], tuple[T, Tensor | None]],
    ) -> tuple[Any, T]:
        """Run one forward of the model, wrapped or not, with `use` in place of the head.

        use: called with the hidden states (rows, positions, width) and the head, in the forward's
            own autocast; returns a result, and a loss if one is to be trained on
        returns: the model's outputs and the result. `outputs.logits` are placeholders; add them to
            the loss times zero, for hooks that wait for the gradient of a module's output
        raises: UnsupportedHead if the head was not called exactly once, or if the model changes its
            logits afterwards in a way that its config does not state
        """
        results: list[T] = []

        def at_the_head(hidden: Tensor) -> Tensor:
            result, loss = use(hidden, self.head)
            results.append(result)
            probe = self._probe(hidden.device)
            # Attached to the loss: engines wait for gradients of what a forward returns.
            logits = probe if loss is None else probe + 0.0 * loss.float()
            # A copy: FSDP2 warns about views, which could lose its pre-backward hook.
            return logits.expand(*hidden.shape[:-1], len(PROBE)).clone()

        try:
            late = nullcontext() if self._late is None else self._late.moved()
            with self._replaced(at_the_head), late:
                outputs = model(**inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            if not results or self._probed:
                raise
            # After the head: the placeholder met a tensor as wide as the vocabulary.
            raise UnsupportedHead("its forward needs whole logits after the head") from error
        if len(results) != 1:
            raise UnsupportedHead(
                f"its forward called the output head {len(results)} times, not once"
            )
        if not self._probed:
            self._check_probe(outputs.logits)
            self._probed = True
        return outputs, results[0]

    @contextmanager
    def _replaced(self, at_the_head: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """A context in which the head's forward is `at_the_head`.

        If accelerate has put its own forward there, which calls the head's, only the inner one is
        replaced. Its hook still moves the inputs to the head's device, and loads and releases an
        offloaded weight.
        """
        name = "_old_forward" if _device_hook(self.module) is not None else "forward"
        kept = vars(self.module).get(name)
        self._at_the_head = at_the_head
        setattr(self.module, name, self._replacement)
        try:
            yield
        finally:
            self._at_the_head = None
            if kept is None:
                delattr(self.module, name)
            else:
                setattr(self.module, name, kept)

    def _call(self, hidden: Tensor) -> Tensor:
        assert self._at_the_head is not None
        return self._at_the_head(hidden)

    @contextmanager
    def gathered(self, head: LinearHead) -> Iterator[LinearHead]:
        """The head as it is now, its weight whole where it is kept in shards or offloaded.

        With a sharded head, a collective of all processes.
        """
        parts = [part for part in (self.module.weight, self._bias()) if part is not None]
        # Inside the student's forward ZeRO-3 may already have gathered the weight; releasing it
        # here would break its bookkeeping.
        with gathered_zero3(parts), _loaded(self.module), torch.no_grad():
            now = self.head
            parts = [now.weight] if now.bias is None else [now.weight, now.bias]
            weight, *bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in parts)
            yield LinearHead(weight, bias[0] if bias else None, head.transform)

    def _probe(self, device: torch.device) -> Tensor:
        """The probe values on a device, copied there once, since each copy waits for the device."""
        if device not in self._probes:
            self._probes[device] = torch.tensor(PROBE, device=device)
        return self._probes[device]

    def _bias(self) -> Tensor | None:
        return self.module.bias if self._late is None else self._late.bias

    def _check_probe(self, logits: Tensor) -> None:
        found = logits.detach().float().cpu()
        expected = self.transform(torch.tensor(PROBE)).expand_as(found)
        # Values that are not finite come from the loss, which has a check of its own.
        if found.isfinite().all() and not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
            raise UnsupportedHead("it changes its logits in a way that its config does not state")


class _LateBias:
    """The bias that BART and its relatives add to the logits after the head.

    It is a buffer of the model, (1, ids), and becomes the bias of the replaced head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._buffers = model._buffers
        self._kept: Tensor | None = None

    @property
    def bias(self) -> Tensor:
        """(ids,)"""
        found = self._buffers[LATE_BIAS] if self._kept is None else self._kept
        assert found is not None
        return found[0]

    @contextmanager
    def moved(self) -> Iterator[None]:
        """A context in which the model adds no bias after the head."""
        kept = self._buffers[LATE_BIAS]
        assert kept is not None
        self._kept, self._buffers[LATE_BIAS] = kept, kept.new_zeros(1, 1)
        try:
            yield
        finally:
            self._buffers[LATE_BIAS], self._kept = kept, None


@contextmanager
def _loaded(module: nn.Module) -> Iterator[None]:
    """Load an offloaded weight inside a context, as accelerate's hook does in a forward."""
    hook = _device_hook(module)
    if hook is None or not any(p.is_meta for p in module.parameters()):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _device_hook(module: nn.Module) -> ModelHook | None:
    """The hook by which accelerate moves inputs and weights of a module, if it has one."""
    hook = getattr(module, "_hf_hook", None)
    only = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return hook if all(type(part) is AlignDevicesHook for part in only) else None


def _linear_head(model: PreTrainedModel, adapter: str | None) -> nn.Linear:
    head: Any = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):  # an adapter trains a copy of the head
        wanted = head.active_adapters if adapter is None else [adapter]
        copies = [head.modules_to_save[name] for name in wanted if name in head.modules_to_save]
        head = copies[0] if copies else head.original_module
    if isinstance(head, BaseTunerLayer) and adapter == "":
        head = head.get_base_layer()
    if type(head) is not nn.Linear:
        kind = type(head).__name__
        raise UnsupportedHead(f"its output head is a {kind}, not a plain linear layer")
    weight = head.weight
    # A quantised weight (torchao) is a wrapper around several tensors, as a DTensor is around one.
    if is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor):
        raise UnsupportedHead(f"the weight of its output head is a {type(weight).__name__}")
    forward = "forward" in vars(head) and _device_hook(head) is None
    if forward or head._forward_hooks or head._forward_pre_hooks:
        raise UnsupportedHead("its output head has hooks")
    return head


def _logit_transform(model: PreTrainedModel) -> LogitTransform:
    """The transform from the head's product to the logits, as the config states it."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))
