"""The Triton kernel for recorded teachers: k ids with a tail, or draws.

One program works on one row. It first takes the student's logits at the recorded ids out of the
row (they become -inf there), so that the sums over the row are those of the tail, which one minus
the other probabilities would cancel. Everywhere but at the recorded ids the gradient is a multiple
of the softmax (see `kernels.torch._sparse`). The recorded ids get their own values at the end.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from hf_distill.losses.kernels.triton_parts import (
    LEAST_LOG,
    LOWEST,
    add_exp,
    joined,
    logits_at,
    value_and_slope,
    weight_of,
    write_gradient,
)


@triton.jit
def sparse_kernel(
    student, named_ids, named, rest, labels, ce_weights, divergence_weights, values,
    rows, student_stride, width, ids, shared,
    ce_weight, divergence_weight, temperature, parameter, factor, scale, cap,
    DIVERGENCE: tl.constexpr, CAPPED: tl.constexpr, ALIKE: tl.constexpr, GRADIENT: tl.constexpr,
    DRAWN: tl.constexpr,  # draws and the entropy, instead of log-probabilities and the tail
    WIDTH: tl.constexpr,  # a power of two, at least the number of recorded ids
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, as in `dense_kernel`; named_ids and named: (rows, width), rest: (rows,).

    The divergence is that of the distributions over the recorded ids and one outcome for all
    others. With DRAWN it is -rest - sum(named * log q[named_ids]).
    """
    row = tl.program_id(0)
    student += row.to(tl.int64) * student_stride
    label = tl.load(labels + row)
    ce_weight = weight_of(ce_weights, ce_weight, row)
    weight = weight_of(divergence_weights, divergence_weight, row) * temperature
    inverse_t = 1.0 / temperature
    end = (scale, cap)
    z_label = logits_at(student, label, ids, end, CAPPED, False)

    slots = tl.arange(0, WIDTH)
    offsets = row.to(tl.int64) * width + slots
    own_ids = tl.load(named_ids + offsets, mask=slots < width, other=-1)
    used = own_ids >= 0
    theirs = tl.load(named + offsets, mask=used, other=0.0)
    tail = tl.load(rest + row)
    # An unused slot points beyond the row, where the load gives -inf.
    own_z = logits_at(student, tl.where(used, own_ids, ids), ids, end, CAPPED, True)
    nothing = tl.full((WIDTH,), -float("inf"), student.dtype.element_ty)
    tl.debug_barrier()  # every thread has read before any writes
    tl.store(student + own_ids, nothing, mask=used)
    tl.debug_barrier()

    zero = tl.zeros((BLOCK,), tl.float32)
    sums = (zero + LOWEST, zero, zero + LOWEST, zero)
    whole = shared // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        sums = _tail_pass(
            student, start, sums, ids, shared, inverse_t, end, CAPPED, ALIKE, False, BLOCK
        )
    for start in range(whole, ids, BLOCK):
        sums = _tail_pass(
            student, start, sums, ids, shared, inverse_t, end, CAPPED, ALIKE, True, BLOCK
        )
    m1, s1, mq, sq = sums
    most, sum_tail = joined(mq, sq)
    log_sum_q, log_tail = _with_named(most, sum_tail, own_z * inverse_t)
    log_sum = log_sum_q
    if not ALIKE:
        most, summed = joined(m1, s1)
        log_sum, _ = _with_named(most, summed, own_z)
    tl.store(values + row, log_sum - z_label)

    log_q = tl.where(used, own_z * inverse_t - log_sum_q, 0.0)
    q = tl.where(used, tl.exp(log_q), 0.0)
    if DRAWN:
        drawn = tl.sum(theirs, 0)
        divergence = -tail - tl.sum(theirs * log_q, 0)
        of_tail = weight * drawn
        own = q * drawn - theirs
    else:
        v, s = value_and_slope(log_q, theirs, parameter, DIVERGENCE)
        v, s = tl.where(used, v, 0.0), tl.where(used, s, 0.0)
        log_least = tl.maximum(log_tail, LEAST_LOG)
        v_tail, s_tail = value_and_slope(log_least, tail, parameter, DIVERGENCE)
        s_tail /= tl.exp(log_least)
        divergence = tl.maximum(tl.sum(v, 0) + v_tail, 0.0)
        total = tl.sum(s, 0) + tl.exp(log_tail) * s_tail
        of_tail = weight * (s_tail - total)
        own = s - q * total
    tl.store(values + rows + row, divergence)

    if GRADIENT:
        for start in range(0, whole, BLOCK):
            _multiples(
                student, start, ids, shared, label, inverse_t, log_sum, log_sum_q,
                ce_weight, of_tail, factor, end, CAPPED, ALIKE, False, BLOCK,
            )  # fmt: skip
        for start in range(whole, ids, BLOCK):
            _multiples(
                student, start, ids, shared, label, inverse_t, log_sum, log_sum_q,
                ce_weight, of_tail, factor, end, CAPPED, ALIKE, True, BLOCK,
            )  # fmt: skip
        tl.debug_barrier()  # what was written at the recorded ids is overwritten
        own = weight * own + ce_weight * tl.exp(own_z - log_sum)
        own = tl.where(own_ids == label, own - ce_weight, own)
        places = tl.where(used, own_ids, ids)
        write_gradient(student, places, ids, own, own_z, end, factor, CAPPED, True)


@triton.jit
def _tail_pass(
    student, start, sums, ids, shared, inverse_t, end,
    CAPPED: tl.constexpr, ALIKE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add one block of the row, whose recorded ids are -inf, to its sums."""
    m1, s1, mq, sq = sums
    places = start + tl.arange(0, BLOCK)
    z = logits_at(student, places, ids, end, CAPPED, MASKED)
    if not ALIKE:
        m1, s1 = add_exp(m1, s1, z)
        if MASKED:
            z = tl.where(places < shared, z, -float("inf"))
    mq, sq = add_exp(mq, sq, z * inverse_t)
    return m1, s1, mq, sq


@triton.jit
def _with_named(most, total, named):
    """The log of all exponentials, and of the tail's share; -inf where the tail has no ids.

    most, total: the sum over the tail, relative to its maximum; named: the others, not summed yet
    """
    highest = tl.maximum(most, tl.max(named, 0))
    total *= tl.exp(most - highest)
    log_sum = highest + tl.log(total + tl.sum(tl.exp(named - highest), 0))
    return log_sum, highest + tl.log(total) - log_sum


@triton.jit
def _multiples(
    student, start, ids, shared, label, inverse_t, log_sum, log_sum_q, ce_weight, of_tail, factor,
    end, CAPPED: tl.constexpr, ALIKE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block, right everywhere but at the recorded ids."""
    places = start + tl.arange(0, BLOCK)
    z = logits_at(student, places, ids, end, CAPPED, MASKED)
    gradient = ce_weight * tl.exp(z - log_sum)
    gradient = tl.where(places == label, gradient - ce_weight, gradient)
    part = of_tail * tl.exp(z - log_sum if ALIKE else z * inverse_t - log_sum_q)
    if MASKED:
        part = tl.where(places < shared, part, 0.0)
    write_gradient(student, places, ids, gradient + part, z, end, factor, CAPPED, MASKED)
