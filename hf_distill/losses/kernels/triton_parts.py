"""Functions that both Triton kernels use.

An *end* is a pair (scale, cap): the transform from the product of a model's head to its logits (see
`losses.linear_head.LogitTransform`).
"""

# Triton's functions take tensors and compile-time constants that Python's types do not describe.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from hf_distill.losses.kernels.torch import LEAST

# Below every logit, and finite: the difference of two of them is a number.
LOWEST = tl.constexpr(-1e30)
TINY = tl.constexpr(1.1754943508222875e-38)
LEAST_LOG = tl.constexpr(LEAST)


@triton.jit
def logits_at(pointer, places, limit, end, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """Load products and turn them into logits; -inf at places beyond the limit."""
    if MASKED:
        product = tl.load(pointer + places, mask=places < limit, other=-float("inf"))
    else:
        product = tl.load(pointer + places)
    scale, cap = end
    z = product.to(tl.float32) * scale
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        bounded = cap * (1.0 - 2.0 / (tl.exp(2.0 * z / cap) + 1.0))
        z = tl.where(z == -float("inf"), z, bounded)
    return z


@triton.jit
def write_gradient(
    pointer, places, limit, gradient, z, end, factor, CAPPED: tl.constexpr, MASKED: tl.constexpr
):
    """Store the gradient by the products, made of the one by the logits z."""
    scale, cap = end
    if CAPPED:
        gradient *= 1.0 - (z / cap) * (z / cap)
    narrow = (gradient * (scale * factor)).to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + places, narrow, mask=places < limit)
    else:
        tl.store(pointer + places, narrow)


@triton.jit
def add_exp(most, total, x):
    """Add exp(x) to running sums that are kept relative to the running maxima."""
    highest = tl.maximum(most, x)
    return highest, total * tl.exp(most - highest) + tl.exp(x - highest)


@triton.jit
def add_exp_times(most, total, times, x, y):
    """The same, and exp(x) * y to a second sum."""
    highest = tl.maximum(most, x)
    decay = tl.exp(most - highest)
    new = tl.exp(x - highest)
    return highest, total * decay + new, times * decay + new * y


@triton.jit
def joined(most, total):
    """The sums of all lanes: their common maximum, and the sum relative to it."""
    highest = tl.max(most, 0)
    return highest, tl.sum(total * tl.exp(most - highest), 0)


# The divergences that `value_and_slope` knows, by the names of `losses.divergences.DIVERGENCES`.
KNOWN_DIVERGENCES = frozenset(
    {"forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"}
)


@triton.jit
def value_and_slope(log_q, log_p, parameter, DIVERGENCE: tl.constexpr):
    """v and s of `losses.closed_forms`: the summand of an id, and dD / d log_q of that id."""
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    if DIVERGENCE == "forward_kl":
        v = p * (log_p - log_q)
        s = -p
    elif DIVERGENCE == "reverse_kl":
        v = q * (log_q - log_p)
        s = v
    elif DIVERGENCE == "jsd":
        log_m = tl.log(tl.maximum(parameter * p + (1.0 - parameter) * q, TINY))
        s = (1.0 - parameter) * q * (log_q - log_m)
        v = s + parameter * p * (log_p - log_m)
    elif DIVERGENCE == "skew_forward_kl":
        m = tl.maximum(parameter * p + (1.0 - parameter) * q, TINY)
        v = p * (log_p - tl.log(m))
        s = (parameter - 1.0) * (p / m) * q
    elif DIVERGENCE == "skew_reverse_kl":
        m = tl.maximum(parameter * q + (1.0 - parameter) * p, TINY)
        v = q * (log_q - tl.log(m))
        s = v - parameter * (q / m) * q
    elif DIVERGENCE == "tvd":
        half = 0.5 * (q - p)
        v = tl.abs(half)
        s = tl.where(half > 0, 0.5, tl.where(half < 0, -0.5, 0.0)) * q
    else:
        tl.static_assert(False, "value_and_slope has no branch for this divergence")
    return v, s


@triton.jit
def weight_of(pointer, number, row):
    """The weight of a target: its own, where there are weights for each, or the number."""
    if pointer is not None:
        number = tl.load(pointer + row)
    return number
