"""Value and gradient of the objective for a chunk of targets, as Triton kernels.

They compute what `kernels.torch` computes. For each row, with z the student's logits, t the
teacher's, x^T = softmax(x / T) over the shared ids, and y the label,

    ce         = logsumexp(z) - z[y]
    divergence = D(t^T, z^T)
    gradient   = factor * dz/dproduct * (w_ce * (softmax(z) - onehot(y)) + w_divergence * T^2 * dD/dz)

One program works on one row, in blocks of `BLOCK` ids. The first pass reads both rows and keeps,
lane by lane, running maxima and sums of exponentials, and for the KLs the running expectation of
their log-ratio. The last pass reads the rows again and writes the gradient over the student's:
8 bytes read and 2 written a logit in bfloat16. The divergences whose gradient needs both
normalisers first (JSD, the skewed KLs, TVD) read the rows once more in between. All arithmetic is
in float32. The source of the one-pass softmax is arXiv:1805.02867.

With a recorded teacher, the program takes the student's logits at the recorded ids out of the row
first, so that what remains is the tail; the gradient there is a multiple of the softmax (see
`kernels.torch`). The recorded ids get their own values at the end.

Loops over whole blocks have no masks, so that their loads stay wide. Branches on `tl.constexpr`
arguments are resolved when a variant is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_distill.losses.divergences import built_in
from hf_distill.losses.kernels.torch import LEAST
from hf_distill.losses.linear_head import LogitTransform
from hf_distill.losses.signals import Logits, Sampled, TopK
from hf_distill.losses.weights import Weights

BLOCK = 2048
WARPS = 8
# Below every logit, and finite: the difference of two of them is a number.
LOWEST = tl.constexpr(-1e30)
TINY = tl.constexpr(1.1754943508222875e-38)
LEAST_LOG = tl.constexpr(LEAST)


# ---- Elementwise ----


@triton.jit
def _logits(pointer, places, limit, scale, cap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """Load products and turn them into logits; -inf at places beyond the limit."""
    if MASKED:
        product = tl.load(pointer + places, mask=places < limit, other=-float("inf"))
    else:
        product = tl.load(pointer + places)
    z = product.to(tl.float32) * scale
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        bounded = cap * (1.0 - 2.0 / (tl.exp(2.0 * z / cap) + 1.0))
        z = tl.where(z == -float("inf"), z, bounded)
    return z


@triton.jit
def _add_exp(most, total, x):
    """Add exp(x) to running sums that are kept relative to the running maxima."""
    highest = tl.maximum(most, x)
    return highest, total * tl.exp(most - highest) + tl.exp(x - highest)


@triton.jit
def _add_exp_times(most, total, times, x, y):
    """The same, and exp(x) * y to a second sum."""
    highest = tl.maximum(most, x)
    decay = tl.exp(most - highest)
    new = tl.exp(x - highest)
    return highest, total * decay + new, times * decay + new * y


@triton.jit
def _joined(most, total):
    """The sums of all lanes: their common maximum, and the sum relative to it."""
    highest = tl.max(most, 0)
    return highest, tl.sum(total * tl.exp(most - highest), 0)


@triton.jit
def _value_and_slope(log_q, log_p, parameter, DIVERGENCE: tl.constexpr):
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
    else:  # tvd
        half = 0.5 * (q - p)
        v = tl.abs(half)
        s = tl.where(half > 0, 0.5, tl.where(half < 0, -0.5, 0.0)) * q
    return v, s


@triton.jit
def _by_product(gradient, z, scale, cap, factor, CAPPED: tl.constexpr):
    """From the gradient by the logits to the one by the product."""
    if CAPPED:
        gradient *= 1.0 - (z / cap) * (z / cap)
    return gradient * (scale * factor)


@triton.jit
def _weight(pointer, number, row):
    """The weight of this target, which may have one of its own."""
    if pointer is None:
        return number
    return tl.load(pointer + row)


# ---- Teachers with all of their logits, or no teacher ----


@triton.jit
def _first_pass(
    student, teacher, start, sums, ids, shared, teacher_ids, inverse_t,
    scale, cap, teacher_scale, teacher_cap,
    DIVERGENCE: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    ALIKE: tl.constexpr, EVALUATE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add one block to the sums of both rows."""
    m1, s1, mq, sq, mp, sp, ratio, mt, st, z_best, z_at, t_best, t_at = sums
    places = start + tl.arange(0, BLOCK)
    z = _logits(student, places, ids, scale, cap, CAPPED, MASKED)
    if not ALIKE:
        m1, s1 = _add_exp(m1, s1, z)
    if DIVERGENCE != "none":
        t = _logits(
            teacher, places, teacher_ids, teacher_scale, teacher_cap, TEACHER_CAPPED, MASKED
        )
        if EVALUATE:
            mt, st = _add_exp(mt, st, t)
        if MASKED:
            z = tl.where(places < shared, z, -float("inf"))
            t = tl.where(places < shared, t, -float("inf"))
        if EVALUATE:
            better = z > z_best
            z_best, z_at = tl.where(better, z, z_best), tl.where(better, places, z_at)
            better = t > t_best
            t_best, t_at = tl.where(better, t, t_best), tl.where(better, places, t_at)
        z *= inverse_t
        t *= inverse_t
        difference = t - z
        if MASKED:
            difference = tl.where(places < shared, difference, 0.0)
        if DIVERGENCE == "forward_kl":
            mp, sp, ratio = _add_exp_times(mp, sp, ratio, t, difference)
            mq, sq = _add_exp(mq, sq, z)
        elif DIVERGENCE == "reverse_kl":
            mq, sq, ratio = _add_exp_times(mq, sq, ratio, z, -difference)
            mp, sp = _add_exp(mp, sp, t)
        else:
            mq, sq = _add_exp(mq, sq, z)
            mp, sp = _add_exp(mp, sp, t)
    return m1, s1, mq, sq, mp, sp, ratio, mt, st, z_best, z_at, t_best, t_at


@triton.jit
def _middle_pass(
    student, teacher, start, value, total, shared, inverse_t, log_sum_q, log_sum_p, parameter,
    scale, cap, teacher_scale, teacher_cap,
    DIVERGENCE: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add one block to the divergence and to the sum of its slopes."""
    places = start + tl.arange(0, BLOCK)
    z = _logits(student, places, shared, scale, cap, CAPPED, MASKED)
    t = _logits(teacher, places, shared, teacher_scale, teacher_cap, TEACHER_CAPPED, MASKED)
    log_q, log_p = z * inverse_t - log_sum_q, t * inverse_t - log_sum_p
    v, s = _value_and_slope(log_q, log_p, parameter, DIVERGENCE)
    if MASKED:
        v = tl.where(places < shared, v, 0.0)
        s = tl.where(places < shared, s, 0.0)
    return value + v, total + s


@triton.jit
def _last_pass(
    student, teacher, start, ids, shared, label, inverse_t,
    log_sum, log_sum_q, log_sum_p, total, ce_weight, weight, parameter, factor,
    scale, cap, teacher_scale, teacher_cap,
    DIVERGENCE: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    ALIKE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block over the student's products."""
    places = start + tl.arange(0, BLOCK)
    z = _logits(student, places, ids, scale, cap, CAPPED, MASKED)
    log_q = z * inverse_t - log_sum_q
    if ALIKE:
        gradient = ce_weight * tl.exp(log_q)
    else:
        gradient = ce_weight * tl.exp(z - log_sum)
    gradient = tl.where(places == label, gradient - ce_weight, gradient)
    if DIVERGENCE != "none":
        t = _logits(teacher, places, shared, teacher_scale, teacher_cap, TEACHER_CAPPED, MASKED)
        log_p = t * inverse_t - log_sum_p
        if DIVERGENCE == "forward_kl":
            part = tl.exp(log_q) - tl.exp(log_p)
        elif DIVERGENCE == "reverse_kl":
            part = tl.exp(log_q) * (log_q - log_p - total)
        else:
            _, s = _value_and_slope(log_q, log_p, parameter, DIVERGENCE)
            part = s - tl.exp(log_q) * total
        if MASKED:
            part = tl.where(places < shared, part, 0.0)
        gradient += weight * part
    gradient = _by_product(gradient, z, scale, cap, factor, CAPPED)
    narrow = gradient.to(student.dtype.element_ty)
    if MASKED:
        tl.store(student + places, narrow, mask=places < ids)
    else:
        tl.store(student + places, narrow)


@triton.jit
def dense_kernel(
    student, teacher, labels, ce_weights, divergence_weights, values,
    rows, student_stride, teacher_stride, ids, shared, teacher_ids,
    ce_weight, divergence_weight, temperature, parameter, factor,
    scale, cap, teacher_scale, teacher_cap,
    DIVERGENCE: tl.constexpr,  # its name, "none" without a teacher
    CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,  # soft-capping after the head
    ALIKE: tl.constexpr,  # T = 1 and one vocabulary: cross-entropy and divergence share a softmax
    GRADIENT: tl.constexpr,  # else values only, with those that only evaluation reports
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: `values` (4, rows) float32, and with GRADIENT the gradient over the student's."""
    row = tl.program_id(0)
    student += row.to(tl.int64) * student_stride
    label = tl.load(labels + row)
    ce_weight = _weight(ce_weights, ce_weight, row)
    weight = _weight(divergence_weights, divergence_weight, row) * temperature
    inverse_t = 1.0 / temperature
    TEACHER: tl.constexpr = DIVERGENCE != "none"
    EVALUATE: tl.constexpr = TEACHER and not GRADIENT
    TWO_PASSES: tl.constexpr = DIVERGENCE == "forward_kl" or DIVERGENCE == "reverse_kl"
    last = ids
    if TEACHER:
        teacher += row.to(tl.int64) * teacher_stride
        if EVALUATE:
            last = tl.maximum(ids, teacher_ids)
    z_label = _logits(student, label, ids, scale, cap, CAPPED, False)

    lanes = tl.zeros((BLOCK,), tl.float32)
    low = lanes + LOWEST
    at = tl.zeros((BLOCK,), tl.int32)
    sums = (low, lanes, low, lanes, low, lanes, lanes, low, lanes, low, at, low, at)
    whole = shared // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        sums = _first_pass(
            student, teacher, start, sums, ids, shared, teacher_ids, inverse_t,
            scale, cap, teacher_scale, teacher_cap,
            DIVERGENCE, CAPPED, TEACHER_CAPPED, ALIKE, EVALUATE, False, BLOCK,
        )  # fmt: skip
    for start in range(whole, last, BLOCK):
        sums = _first_pass(
            student, teacher, start, sums, ids, shared, teacher_ids, inverse_t,
            scale, cap, teacher_scale, teacher_cap,
            DIVERGENCE, CAPPED, TEACHER_CAPPED, ALIKE, EVALUATE, True, BLOCK,
        )  # fmt: skip
    m1, s1, mq, sq, mp, sp, ratio, mt, st, z_best, z_at, t_best, t_at = sums

    log_sum, log_sum_q, log_sum_p, total = 0.0, 0.0, 0.0, 0.0
    if TEACHER:
        most_q, sum_q = _joined(mq, sq)
        most_p, sum_p = _joined(mp, sp)
        log_sum_q = most_q + tl.log(sum_q)
        log_sum_p = most_p + tl.log(sum_p)
        if DIVERGENCE == "forward_kl":
            divergence = tl.sum(ratio * tl.exp(mp - most_p), 0) / sum_p + log_sum_q - log_sum_p
        elif DIVERGENCE == "reverse_kl":
            divergence = tl.sum(ratio * tl.exp(mq - most_q), 0) / sum_q + log_sum_p - log_sum_q
            total = divergence
        else:
            value, slopes = lanes, lanes
            for start in range(0, whole, BLOCK):
                value, slopes = _middle_pass(
                    student, teacher, start, value, slopes, shared, inverse_t,
                    log_sum_q, log_sum_p, parameter, scale, cap, teacher_scale, teacher_cap,
                    DIVERGENCE, CAPPED, TEACHER_CAPPED, False, BLOCK,
                )  # fmt: skip
            for start in range(whole, shared, BLOCK):
                value, slopes = _middle_pass(
                    student, teacher, start, value, slopes, shared, inverse_t,
                    log_sum_q, log_sum_p, parameter, scale, cap, teacher_scale, teacher_cap,
                    DIVERGENCE, CAPPED, TEACHER_CAPPED, True, BLOCK,
                )  # fmt: skip
            divergence, total = tl.sum(value, 0), tl.sum(slopes, 0)
        tl.store(values + rows + row, tl.maximum(divergence, 0.0))
    if ALIKE:
        log_sum = log_sum_q
    else:
        most, summed = _joined(m1, s1)
        log_sum = most + tl.log(summed)
    tl.store(values + row, log_sum - z_label)
    if EVALUATE:
        t_label = _logits(
            teacher, label, teacher_ids, teacher_scale, teacher_cap, TEACHER_CAPPED, False
        )
        most, summed = _joined(mt, st)
        tl.store(values + 2 * rows + row, most + tl.log(summed) - t_label)
        # Of equal logits the first counts.
        z_first = tl.min(tl.where(z_best == tl.max(z_best, 0), z_at, shared), 0)
        t_first = tl.min(tl.where(t_best == tl.max(t_best, 0), t_at, shared), 0)
        tl.store(values + 3 * rows + row, (z_first == t_first).to(tl.float32))
    if GRADIENT:
        for start in range(0, whole, BLOCK):
            _last_pass(
                student, teacher, start, ids, shared, label, inverse_t,
                log_sum, log_sum_q, log_sum_p, total, ce_weight, weight, parameter, factor,
                scale, cap, teacher_scale, teacher_cap,
                DIVERGENCE, CAPPED, TEACHER_CAPPED, ALIKE, False, BLOCK,
            )  # fmt: skip
        for start in range(whole, ids, BLOCK):
            _last_pass(
                student, teacher, start, ids, shared, label, inverse_t,
                log_sum, log_sum_q, log_sum_p, total, ce_weight, weight, parameter, factor,
                scale, cap, teacher_scale, teacher_cap,
                DIVERGENCE, CAPPED, TEACHER_CAPPED, ALIKE, True, BLOCK,
            )  # fmt: skip


# ---- Recorded teachers ----


@triton.jit
def _tail_pass(
    student, start, sums, ids, shared, inverse_t, scale, cap,
    CAPPED: tl.constexpr, ALIKE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add one block of the row, whose recorded ids are -inf, to its sums."""
    m1, s1, mq, sq = sums
    places = start + tl.arange(0, BLOCK)
    z = _logits(student, places, ids, scale, cap, CAPPED, MASKED)
    if not ALIKE:
        m1, s1 = _add_exp(m1, s1, z)
        if MASKED:
            z = tl.where(places < shared, z, -float("inf"))
    mq, sq = _add_exp(mq, sq, z * inverse_t)
    return m1, s1, mq, sq


@triton.jit
def _multiples(
    student, start, ids, shared, label, inverse_t, log_sum, log_sum_q, ce_weight, of_tail, factor,
    scale, cap,
    CAPPED: tl.constexpr, ALIKE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block, right everywhere but at the recorded ids."""
    places = start + tl.arange(0, BLOCK)
    z = _logits(student, places, ids, scale, cap, CAPPED, MASKED)
    if ALIKE:
        gradient = (ce_weight + of_tail) * tl.exp(z - log_sum)
    else:
        part = of_tail * tl.exp(z * inverse_t - log_sum_q)
        if MASKED:
            part = tl.where(places < shared, part, 0.0)
        gradient = ce_weight * tl.exp(z - log_sum) + part
    gradient = tl.where(places == label, gradient - ce_weight, gradient)
    gradient = _by_product(gradient, z, scale, cap, factor, CAPPED)
    narrow = gradient.to(student.dtype.element_ty)
    if MASKED:
        tl.store(student + places, narrow, mask=places < ids)
    else:
        tl.store(student + places, narrow)


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
    """One row, with named_ids and named (rows, width), rest (rows,); see `dense_kernel`."""
    row = tl.program_id(0)
    student += row.to(tl.int64) * student_stride
    label = tl.load(labels + row)
    ce_weight = _weight(ce_weights, ce_weight, row)
    weight = _weight(divergence_weights, divergence_weight, row) * temperature
    inverse_t = 1.0 / temperature
    z_label = _logits(student, label, ids, scale, cap, CAPPED, False)

    slots = tl.arange(0, WIDTH)
    offsets = row.to(tl.int64) * width + slots
    own_ids = tl.load(named_ids + offsets, mask=slots < width, other=-1)
    used = own_ids >= 0
    theirs = tl.load(named + offsets, mask=used, other=0.0)
    tail = tl.load(rest + row)
    # Beyond the row, an unused slot is masked by the load and has -inf.
    own_z = _logits(student, tl.where(used, own_ids, ids), ids, scale, cap, CAPPED, True)
    tl.debug_barrier()  # every thread has read before any writes
    tl.store(
        student + own_ids, (own_z * 0.0 - float("inf")).to(student.dtype.element_ty), mask=used
    )
    tl.debug_barrier()

    lanes = tl.zeros((BLOCK,), tl.float32)
    low = lanes + LOWEST
    sums = (low, lanes, low, lanes)
    whole = shared // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        sums = _tail_pass(
            student, start, sums, ids, shared, inverse_t, scale, cap, CAPPED, ALIKE, False, BLOCK
        )
    for start in range(whole, ids, BLOCK):
        sums = _tail_pass(
            student, start, sums, ids, shared, inverse_t, scale, cap, CAPPED, ALIKE, True, BLOCK
        )
    m1, s1, mq, sq = sums
    most_tail, sum_tail = _joined(mq, sq)
    most_q = tl.maximum(most_tail, tl.max(own_z, 0) * inverse_t)
    sum_tail *= tl.exp(most_tail - most_q)
    log_sum_q = most_q + tl.log(sum_tail + tl.sum(tl.exp(own_z * inverse_t - most_q), 0))
    log_tail = most_q + tl.log(sum_tail) - log_sum_q  # -inf where the recorded ids are all
    if ALIKE:
        log_sum = log_sum_q
    else:
        most, summed = _joined(m1, s1)
        highest = tl.maximum(most, tl.max(own_z, 0))
        summed = summed * tl.exp(most - highest) + tl.sum(tl.exp(own_z - highest), 0)
        log_sum = highest + tl.log(summed)
    tl.store(values + row, log_sum - z_label)

    log_q = tl.where(used, own_z * inverse_t - log_sum_q, 0.0)
    q = tl.where(used, tl.exp(log_q), 0.0)
    if DRAWN:
        # theirs: how often each id was drawn, over the number of draws; tail: the entropy
        drawn = tl.sum(theirs, 0)
        divergence = -tail - tl.sum(theirs * log_q, 0)
        of_tail = weight * drawn
        own = q * drawn - theirs
    else:
        v, s = _value_and_slope(log_q, theirs, parameter, DIVERGENCE)
        v, s = tl.where(used, v, 0.0), tl.where(used, s, 0.0)
        log_least = tl.maximum(log_tail, LEAST_LOG)
        v_tail, s_tail = _value_and_slope(log_least, tail, parameter, DIVERGENCE)
        s_tail /= tl.exp(log_least)
        divergence = tl.maximum(tl.sum(v, 0) + v_tail, 0.0)
        total = tl.sum(s, 0) + tl.exp(log_tail) * s_tail
        of_tail = weight * (s_tail - total)
        own = s - q * total
    tl.store(values + rows + row, divergence)
    if GRADIENT:
        for start in range(0, whole, BLOCK):
            _multiples(
                student, start, ids, shared, label, inverse_t, log_sum, log_sum_q, ce_weight,
                of_tail, factor, scale, cap, CAPPED, ALIKE, False, BLOCK,
            )  # fmt: skip
        for start in range(whole, ids, BLOCK):
            _multiples(
                student, start, ids, shared, label, inverse_t, log_sum, log_sum_q, ce_weight,
                of_tail, factor, scale, cap, CAPPED, ALIKE, True, BLOCK,
            )  # fmt: skip
        tl.debug_barrier()
        own = weight * own + ce_weight * tl.exp(own_z - log_sum)
        own = tl.where(own_ids == label, own - ce_weight, own)
        own = _by_product(own, own_z, scale, cap, factor, CAPPED)
        tl.store(student + own_ids, own.to(student.dtype.element_ty), mask=used)


# ---- Launching ----


class TritonKernel:
    """The kernel of the fused head on CUDA, for the built-in divergences."""

    extra_bytes = 0

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher: Logits | TopK | Sampled | None,
        weights: Weights,
        *,
        transform: LogitTransform,
        teacher_transform: LogitTransform,
        gradient: bool,
        factor: float = 1.0,
    ) -> Mapping[str, Tensor]:
        """See `kernels.interface.Kernel`."""
        rows, ids = logits.shape
        values = logits.new_empty((4, rows), dtype=torch.float32)
        names = ["ce"] if teacher is None else ["ce", "divergence"]
        if isinstance(teacher, Logits) and not gradient:
            names += ["teacher_ce", "top1_agreement"]
        if rows:
            name, parameter = built_in(weights.function) or ("none", 0.0)
            shared = ids if teacher is None else weights.shared
            common = {
                "labels": labels,
                "values": values,
                "rows": rows,
                "student_stride": logits.stride(0),
                "ids": ids,
                "shared": shared,
                "temperature": float(weights.temperature),
                "parameter": float(parameter),
                "factor": float(factor),
                "scale": float(transform.scale),
                "cap": float(transform.cap or 1.0),
                "DIVERGENCE": "none" if teacher is None else name,
                "CAPPED": transform.cap is not None,
                "ALIKE": teacher is not None and weights.temperature == 1.0 and shared == ids,
                "GRADIENT": gradient,
                "BLOCK": min(BLOCK, triton.next_power_of_2(max(ids, 16))),
                "num_warps": WARPS,
                **_weights("ce", weights.ce),
                **_weights("divergence", weights.divergence),
            }
            if isinstance(teacher, TopK | Sampled):
                _launch_sparse(logits, teacher, common)
            else:
                _launch_dense(logits, teacher, teacher_transform, common)
        return dict(zip(names, values, strict=False))


def _launch_dense(
    logits: Tensor, teacher: Logits | None, transform: LogitTransform, common: dict
) -> None:
    theirs = logits if teacher is None else _rows(teacher.logits)
    dense_kernel[(len(logits),)](
        student=logits,
        teacher=theirs,
        teacher_stride=theirs.stride(0),
        teacher_ids=theirs.shape[1],
        teacher_scale=float(transform.scale),
        teacher_cap=float(transform.cap or 1.0),
        TEACHER_CAPPED=transform.cap is not None,
        **common,
    )


def _launch_sparse(logits: Tensor, teacher: TopK | Sampled, common: dict) -> None:
    drawn = isinstance(teacher, Sampled)
    named, rest = (
        (teacher.weights, teacher.entropy)
        if isinstance(teacher, Sampled)
        else (teacher.log_probs, teacher.log_tail)
    )
    width = teacher.ids.shape[1]
    sparse_kernel[(len(logits),)](
        student=logits,
        named_ids=teacher.ids.contiguous(),
        named=named.contiguous(),
        rest=rest.contiguous(),
        width=width,
        DRAWN=drawn,
        WIDTH=max(16, triton.next_power_of_2(width)),
        **common,
    )


def _weights(name: str, weight: float | Tensor) -> dict:
    """The arguments for a weight: a number, or a pointer to one for each target."""
    own = isinstance(weight, Tensor)
    return {
        f"{name}_weights": weight.contiguous() if own else None,
        f"{name}_weight": 0.0 if own else float(weight),
    }


def _rows(logits: Tensor) -> Tensor:
    """Logits whose ids lie side by side in memory."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
