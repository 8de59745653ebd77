"""The output head alone: CE and a divergence at weight 1/2 each, forward and backward.

    python benchmarks/head.py                      float32 and bfloat16, T = 1, forward KL
    python benchmarks/head.py --temperature 2
    python benchmarks/head.py --divergence jsd --variants floor,plain,ours
    python benchmarks/head.py --targets 8192 --vocab 151936 --variants ours

`floor` is the four matrix products and nothing else, as plain calls on 512 rows; `floor_sliced`
makes the logits for 512 ids at a time, as ours does in float32. Peers:
pip install 'hf-distill[bench]'.
Before any time is printed, values and gradients of all variants are compared (TRL's kernel has no
cross-entropy, so it is compared with the divergence alone).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from common import FLOORS, Missing, answer, four_products, in_turn, parser, show, timed
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses import Hidden, LinearHead, Weights, fused_loss
from hf_distill.losses.divergences import named_divergence

VARIANTS = ["floor", "floor_sliced", "plain", "liger", "trl", "ours"]
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}


class Problem:
    """The same tensors for every variant."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        dtype, device = getattr(torch, options.dtype), options.device
        n, ids = options.targets, options.vocab

        def make(*shape: int, size: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device) * size).to(dtype)

        self.hidden = make(n, options.width).requires_grad_()
        self.weight = make(ids, options.width, size=0.05).requires_grad_()
        self.teacher_hidden = make(n, options.teacher_width)
        self.teacher_weight = make(ids, options.teacher_width, size=0.05)
        self.labels = torch.randint(0, ids, (n,), device=device)
        self.temperature, self.divergence = options.temperature, options.divergence

    def work(self, function: Callable[[Problem], Tensor]) -> None:
        """Forward and backward; what came of it is looked at when no clock runs any longer."""
        self.slopes: tuple[Tensor, ...] = ()
        self.loss = function(self)
        self.slopes = torch.autograd.grad(self.loss, (self.hidden, self.weight))


def norm(slopes: tuple[Tensor, ...]) -> float:
    return torch.stack([slope.float().norm() for slope in slopes]).norm().item()


def ours(problem: Problem) -> Tensor:
    p = problem
    function = named_divergence(p.divergence)
    weights = Weights(0.5, 0.5, p.temperature, function, len(p.weight))
    scale = torch.tensor(1 / len(p.labels), dtype=torch.float64, device=p.labels.device)
    teacher = Hidden(p.teacher_hidden, LinearHead(p.teacher_weight))
    loss, _ = fused_loss(p.hidden, LinearHead(p.weight), p.labels, teacher, weights, scale=scale)
    return loss


def plain(problem: Problem, ce: float = 0.5, divergence: float = 0.5) -> Tensor:
    p = problem
    logits = F.linear(p.hidden, p.weight).float()
    theirs = F.linear(p.teacher_hidden, p.teacher_weight).float()
    value = named_divergence(p.divergence)(
        F.log_softmax(logits / p.temperature, -1), F.log_softmax(theirs / p.temperature, -1)
    ).mean()
    return ce * F.cross_entropy(logits, p.labels) + divergence * p.temperature**2 * value


@cache
def _compiled() -> Callable[[Problem], Tensor]:
    return torch.compile(plain)


def compiled(problem: Problem) -> Tensor:
    return _compiled()(problem)


def liger(problem: Problem) -> Tensor:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise Missing(str(error)) from error
    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
    if problem.divergence not in betas or problem.temperature != 1.0:
        raise Missing("it has no T^2, and only forward_kl, reverse_kl and jsd")
    p = problem
    loss = LigerFusedLinearJSDLoss(beta=betas[p.divergence])
    return loss(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.labels)


def trl(problem: Problem) -> Tensor:
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        raise Missing(str(error)) from error
    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
    if problem.divergence not in betas:
        raise Missing("it has only forward_kl, reverse_kl and jsd")
    p = problem
    values, _ = ChunkedDivergenceFunction.apply(
        p.hidden,
        p.weight,
        None,
        p.teacher_hidden,
        p.teacher_weight,
        None,
        betas[p.divergence],
        p.temperature,
    )
    return values.mean() * p.temperature**2


def floor(problem: Problem, slices: int | None = None) -> None:
    p = problem
    _, d_weight = four_products(
        p.hidden.detach(), p.weight.detach(), p.teacher_hidden, p.teacher_weight, slices
    )
    d_weight.to(p.weight.dtype)  # in the dtype that the others hand it out in


FUNCTIONS = {"ours": ours, "plain": plain, "compiled": compiled, "liger": liger, "trl": trl}


def worker(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    problem = Problem(options)
    loss = size = None
    if variant in FLOORS:
        found = timed(lambda: floor(problem, FLOORS[variant]), options.repeats)
    else:
        found = timed(lambda: problem.work(FUNCTIONS[variant]), options.repeats)
        loss, size = problem.loss.item(), norm(problem.slopes)
    if variant == "trl":  # what it leaves out, told by plain PyTorch
        whole = torch.autograd.grad(plain(problem, 0.0, 1.0), (problem.hidden, problem.weight))
        agree("trl", size, norm(whole), options.dtype)
    return {
        "dtype": options.dtype,
        "temperature": options.temperature,
        "divergence": options.divergence,
        "targets": options.targets,
        "vocab": options.vocab,
        **found,
        "loss": loss,
        "grad_norm": size,
    }


def agree(name: str, found: float, expected: float, dtype: str) -> None:
    if not abs(found - expected) <= TOLERANCE[dtype] * abs(expected):
        raise SystemExit(f"{name} disagrees: {found} against {expected}")


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--variants", default=",".join(VARIANTS))
    arguments.add_argument("--dtype", default="float32,bfloat16")
    arguments.add_argument("--temperature", type=float, default=1.0)
    arguments.add_argument("--divergence", default="forward_kl")
    arguments.add_argument("--targets", type=int, default=2048)
    arguments.add_argument("--vocab", type=int, default=50257)
    arguments.add_argument("--width", type=int, default=768)
    arguments.add_argument("--teacher-width", type=int, default=1280)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.set_defaults(device="cpu")  # benchmarks/gpu_head.py makes problems elsewhere
    options = arguments.parse_args()
    if options.worker:
        answer(lambda: worker(options.worker, options))
        return
    kept = ("temperature", "divergence", "targets", "vocab", "width", "teacher_width", "repeats")
    passed = {name: getattr(options, name) for name in kept}
    for dtype in options.dtype.split(","):
        variants = options.variants.split(",")
        rows = in_turn(__file__, variants, passed | {"dtype": dtype}, options.rounds)
        reference = next((row for row in rows if row["variant"] == "plain"), None)
        for row in rows:
            if reference and row["variant"] in ("liger", "ours") and "missing" not in row:
                for key in ("loss", "grad_norm"):
                    agree(f"{row['variant']}: {key}", row[key], reference[key], dtype)
        show(rows, options.json)


if __name__ == "__main__":
    main()
