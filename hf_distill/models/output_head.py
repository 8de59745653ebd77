"""A model's own forward, with something else in the place of its output head.

The fused head needs the hidden states that go into the output head, and the head's weight, at a
moment when both are there: inside the wrapped model's forward, where DDP's reducer, the gathering
hooks of ZeRO-3 and FSDP2, autocast and gradient checkpointing do their work as for any forward.
So the head's `forward` is replaced on the instance, for one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_distill.losses.fused_head import Finish, Head

T = TypeVar("T")

# Put in place of logits: small and large ones, so that scaling and capping both show.
PROBE = (-60.0, -1.0, 0.0, 0.5, 60.0)


class UnusualHead(Exception):
    """This head cannot be replaced, and why."""


class StandIn:
    """The place of a model's output head.

    model: not yet wrapped by an engine
    adapter: which of a `peft` model's adapters it will run with: None for the active one, "" for
        none of them
    raises: UnusualHead unless the head is a plain linear layer
    """

    def __init__(self, model: PreTrainedModel, adapter: str | None = None) -> None:
        self.module = _linear_head(model, adapter)
        self.finish = _after_the_head(model)
        self._probed = False

    def run(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        use: Callable[[Tensor, Head], tuple[T, Tensor | None]],
    ) -> tuple[Any, T]:
        """One forward of the model, wrapped or not, in which `use` takes the head's place.

        use: gets the hidden states (rows, positions, width) and the head, in the forward's own
            autocast; returns a result, and a loss where one is to be trained on
        returns: the model's outputs and the result. `outputs.logits` are only there for what hangs
            on the outputs of a module: they are to be added to the loss, times zero.
        raises: UnusualHead if the head was not called once, or its logits were changed afterwards
            in a way that the config does not tell
        """
        results: list[T] = []

        def in_place_of_the_head(hidden: Tensor) -> Tensor:
            head = Head(self.module.weight, self.module.bias, self.finish)
            result, loss = use(hidden, head)
            results.append(result)
            probe = torch.tensor(PROBE, device=hidden.device)
            # Attached to the loss: engines wait for gradients of what a forward returns.
            logits = probe if loss is None else probe + 0.0 * loss.float()
            return logits.expand(*hidden.shape[:-1], len(PROBE))

        self.module.forward = in_place_of_the_head  # type: ignore[method-assign, assignment]
        try:
            outputs = model(**inputs, use_cache=False)
        finally:
            del self.module.forward
        if len(results) != 1:
            raise UnusualHead(f"its forward called the output head {len(results)} times, not once")
        if not self._probed:
            self._check_probe(outputs.logits)
            self._probed = True
        return outputs, results[0]

    @contextmanager
    def whole_head(self, head: Head) -> Iterator[Head]:
        """The head as it is now, its weight gathered where an engine keeps it in shards.

        A collective of all processes, if so.
        """
        parts = [part for part in (self.module.weight, self.module.bias) if part is not None]
        # Of a student's own forward, ZeRO-3 may have the weight gathered already, and would be
        # confused to find it given away.
        away = [p for p in parts if getattr(getattr(p, "ds_status", None), "value", 1) != 1]
        with _gathered(away), torch.no_grad():
            weight, *bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in parts)
            yield Head(weight, bias[0] if bias else None, head.finish)

    def _check_probe(self, logits: Tensor) -> None:
        found = logits.detach().float().cpu()
        expected = torch.tensor(PROBE)
        expected = self.finish(expected).expand_as(found)
        # What is not finite comes from the loss, which is somebody else's to complain about.
        if found.isfinite().all() and not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
            raise UnusualHead("it changes its logits in a way that its config does not tell")


def _gathered(parameters: list[Any]) -> Any:
    """ZeRO-3's parameters, whole while this lasts; the library is only there where they are."""
    if not parameters:
        return nullcontext()
    from deepspeed.zero import GatheredParameters

    return GatheredParameters(parameters)


def _linear_head(model: PreTrainedModel, adapter: str | None) -> nn.Linear:
    head: Any = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):  # an adapter trains a copy of the head
        wanted = head.active_adapters if adapter is None else [adapter]
        copies = [head.modules_to_save[name] for name in wanted if name in head.modules_to_save]
        head = copies[0] if copies else head.original_module
    if isinstance(head, BaseTunerLayer) and adapter == "":
        head = head.get_base_layer()
    if type(head) is not nn.Linear:
        raise UnusualHead(f"its output head is a {type(head).__name__}, not a plain linear layer")
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        raise UnusualHead("its output head has hooks")
    return head


def _after_the_head(model: PreTrainedModel) -> Finish:
    """What the config tells about the way from the head's product to the logits."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Finish(scale, getattr(config, "final_logit_softcapping", None))
