"""The Triton kernel for teachers with all of their logits, and for no teacher.

One program works on one row, in blocks of `BLOCK` ids. The first pass reads both rows and keeps,
lane by lane, running maxima and sums of exponentials, and for the KLs the running expectation of
their log-ratio. The last pass reads the rows again and writes the gradient over the student's:
8 bytes read and 2 written a logit in bfloat16. The divergences whose gradient needs both
normalisers first (JSD, the skewed KLs, TVD) read the rows once more in between.

Loops over whole blocks have no masks, so that their loads stay wide. Branches on `tl.constexpr`
arguments are resolved when a variant is compiled. Source of the one-pass softmax: arXiv:1805.02867.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from hf_distill.losses.kernels.triton_parts import (
    LOWEST,
    add_exp,
    add_exp_times,
    joined,
    logits_at,
    value_and_slope,
    weight_of,
    write_gradient,
)


@triton.jit
def dense_kernel(
    student, teacher, labels, ce_weights, divergence_weights, values,
    rows, student_stride, teacher_stride, ids, shared, teacher_ids,
    ce_weight, divergence_weight, temperature, parameter, factor,
    scale, cap, teacher_scale, teacher_cap,
    DIVERGENCE: tl.constexpr,  # its name, "none" without a teacher
    CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,  # soft-capping after the head
    ALIKE: tl.constexpr,  # T = 1 and one vocabulary: cross-entropy and divergence share a softmax
    GRADIENT: tl.constexpr,  # else values only, and those that only evaluation reports
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: `values` (4, rows) float32, and with GRADIENT the gradient over the student's.

    With a teacher, T = temperature, and both softmaxes over the first `shared` ids:
        values[0] = logsumexp(z) - z[label]
        values[1] = D(softmax(t / T), softmax(z / T))
        gradient  = ce_weight * (softmax(z) - onehot(label)) + divergence_weight * T^2 * dD/dz,
                    times the derivative of z by the product of its head, and `factor`
    Without GRADIENT values[2] is the teacher's own cross-entropy, over its `teacher_ids`, and
    values[3] whether both have the same most likely id.
    """
    row = tl.program_id(0)
    label = tl.load(labels + row)
    ce_weight = weight_of(ce_weights, ce_weight, row)
    weight = weight_of(divergence_weights, divergence_weight, row) * temperature
    inverse_t = 1.0 / temperature
    TEACHER: tl.constexpr = DIVERGENCE != "none"
    EVALUATE: tl.constexpr = TEACHER and not GRADIENT
    student += row.to(tl.int64) * student_stride
    if TEACHER:
        teacher += row.to(tl.int64) * teacher_stride
    end, teacher_end = (scale, cap), (teacher_scale, teacher_cap)
    z_label = logits_at(student, label, ids, end, CAPPED, False)
    whole = shared // BLOCK * BLOCK

    zero = tl.zeros((BLOCK,), tl.float32)
    low = zero + LOWEST
    first = tl.zeros((BLOCK,), tl.int32)
    sums = (low, zero, low, zero, low, zero, zero, low, zero, low, first, low, first)
    last = tl.maximum(ids, teacher_ids) if EVALUATE else ids
    for start in range(0, whole, BLOCK):
        sums = _first_pass(
            student, teacher, start, sums, ids, shared, teacher_ids, inverse_t, end, teacher_end,
            DIVERGENCE, CAPPED, TEACHER_CAPPED, ALIKE, EVALUATE, False, BLOCK,
        )  # fmt: skip
    for start in range(whole, last, BLOCK):
        sums = _first_pass(
            student, teacher, start, sums, ids, shared, teacher_ids, inverse_t, end, teacher_end,
            DIVERGENCE, CAPPED, TEACHER_CAPPED, ALIKE, EVALUATE, True, BLOCK,
        )  # fmt: skip
    m1, s1, mq, sq, mp, sp, ratio, mt, st, z_best, z_at, t_best, t_at = sums

    log_sum_q, log_sum_p, total = 0.0, 0.0, 0.0
    if TEACHER:
        most_q, sum_q = joined(mq, sq)
        most_p, sum_p = joined(mp, sp)
        log_sum_q, log_sum_p = most_q + tl.log(sum_q), most_p + tl.log(sum_p)
        if DIVERGENCE == "forward_kl":
            divergence = tl.sum(ratio * tl.exp(mp - most_p), 0) / sum_p + log_sum_q - log_sum_p
        elif DIVERGENCE == "reverse_kl":
            divergence = tl.sum(ratio * tl.exp(mq - most_q), 0) / sum_q + log_sum_p - log_sum_q
            total = divergence
        else:
            both = (zero, zero)
            for start in range(0, whole, BLOCK):
                both = _middle_pass(
                    student, teacher, start, both, shared, inverse_t, log_sum_q, log_sum_p,
                    parameter, end, teacher_end, DIVERGENCE, CAPPED, TEACHER_CAPPED, False, BLOCK,
                )  # fmt: skip
            for start in range(whole, shared, BLOCK):
                both = _middle_pass(
                    student, teacher, start, both, shared, inverse_t, log_sum_q, log_sum_p,
                    parameter, end, teacher_end, DIVERGENCE, CAPPED, TEACHER_CAPPED, True, BLOCK,
                )  # fmt: skip
            divergence, total = tl.sum(both[0], 0), tl.sum(both[1], 0)
        tl.store(values + rows + row, tl.maximum(divergence, 0.0))
    log_sum = log_sum_q
    if not ALIKE:
        most, summed = joined(m1, s1)
        log_sum = most + tl.log(summed)
    tl.store(values + row, log_sum - z_label)

    if EVALUATE:
        t_label = logits_at(teacher, label, teacher_ids, teacher_end, TEACHER_CAPPED, False)
        most, summed = joined(mt, st)
        tl.store(values + 2 * rows + row, most + tl.log(summed) - t_label)
        # Of equal logits the first counts.
        z_first = tl.min(tl.where(z_best == tl.max(z_best, 0), z_at, shared), 0)
        t_first = tl.min(tl.where(t_best == tl.max(t_best, 0), t_at, shared), 0)
        tl.store(values + 3 * rows + row, (z_first == t_first).to(tl.float32))
    if GRADIENT:
        for start in range(0, whole, BLOCK):
            _last_pass(
                student, teacher, start, ids, shared, label, inverse_t, log_sum, log_sum_q,
                log_sum_p, total, ce_weight, weight, parameter, factor, end, teacher_end,
                DIVERGENCE, CAPPED, TEACHER_CAPPED, ALIKE, False, BLOCK,
            )  # fmt: skip
        for start in range(whole, ids, BLOCK):
            _last_pass(
                student, teacher, start, ids, shared, label, inverse_t, log_sum, log_sum_q,
                log_sum_p, total, ce_weight, weight, parameter, factor, end, teacher_end,
                DIVERGENCE, CAPPED, TEACHER_CAPPED, ALIKE, True, BLOCK,
            )  # fmt: skip


@triton.jit
def _first_pass(
    student, teacher, start, sums, ids, shared, teacher_ids, inverse_t, end, teacher_end,
    DIVERGENCE: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    ALIKE: tl.constexpr, EVALUATE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add one block to the sums of both rows."""
    m1, s1, mq, sq, mp, sp, ratio, mt, st, z_best, z_at, t_best, t_at = sums
    places = start + tl.arange(0, BLOCK)
    z = logits_at(student, places, ids, end, CAPPED, MASKED)
    if not ALIKE:
        m1, s1 = add_exp(m1, s1, z)
    if DIVERGENCE != "none":
        t = logits_at(teacher, places, teacher_ids, teacher_end, TEACHER_CAPPED, MASKED)
        if EVALUATE:
            mt, st = add_exp(mt, st, t)
        if MASKED:
            z = tl.where(places < shared, z, -float("inf"))
            t = tl.where(places < shared, t, -float("inf"))
        if EVALUATE:
            z_better, t_better = z > z_best, t > t_best
            z_best, z_at = tl.where(z_better, z, z_best), tl.where(z_better, places, z_at)
            t_best, t_at = tl.where(t_better, t, t_best), tl.where(t_better, places, t_at)
        z *= inverse_t
        t *= inverse_t
        difference = t - z
        if MASKED:
            difference = tl.where(places < shared, difference, 0.0)
        if DIVERGENCE == "forward_kl":
            mp, sp, ratio = add_exp_times(mp, sp, ratio, t, difference)
            mq, sq = add_exp(mq, sq, z)
        elif DIVERGENCE == "reverse_kl":
            mq, sq, ratio = add_exp_times(mq, sq, ratio, z, -difference)
            mp, sp = add_exp(mp, sp, t)
        else:
            mq, sq = add_exp(mq, sq, z)
            mp, sp = add_exp(mp, sp, t)
    return m1, s1, mq, sq, mp, sp, ratio, mt, st, z_best, z_at, t_best, t_at


@triton.jit
def _middle_pass(
    student, teacher, start, both, shared, inverse_t, log_sum_q, log_sum_p, parameter,
    end, teacher_end,
    DIVERGENCE: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add one block to the divergence and to the sum of its slopes."""
    places = start + tl.arange(0, BLOCK)
    z = logits_at(student, places, shared, end, CAPPED, MASKED)
    t = logits_at(teacher, places, shared, teacher_end, TEACHER_CAPPED, MASKED)
    log_q, log_p = z * inverse_t - log_sum_q, t * inverse_t - log_sum_p
    v, s = value_and_slope(log_q, log_p, parameter, DIVERGENCE)
    if MASKED:
        v = tl.where(places < shared, v, 0.0)
        s = tl.where(places < shared, s, 0.0)
    return both[0] + v, both[1] + s


@triton.jit
def _last_pass(
    student, teacher, start, ids, shared, label, inverse_t, log_sum, log_sum_q, log_sum_p, total,
    ce_weight, weight, parameter, factor, end, teacher_end,
    DIVERGENCE: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    ALIKE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block over the student's products."""
    places = start + tl.arange(0, BLOCK)
    z = logits_at(student, places, ids, end, CAPPED, MASKED)
    # With T = 1 and one vocabulary, log_sum is log_sum_q, and the compiler makes one exponential.
    gradient = ce_weight * tl.exp(z - log_sum)
    gradient = tl.where(places == label, gradient - ce_weight, gradient)
    if DIVERGENCE != "none":
        t = logits_at(teacher, places, shared, teacher_end, TEACHER_CAPPED, MASKED)
        log_q = z - log_sum if ALIKE else z * inverse_t - log_sum_q
        log_p = t * inverse_t - log_sum_p
        if DIVERGENCE == "forward_kl":
            part = tl.exp(log_q) - tl.exp(log_p)
        elif DIVERGENCE == "reverse_kl":
            part = tl.exp(log_q) * (log_q - log_p - total)
        else:
            _, s = value_and_slope(log_q, log_p, parameter, DIVERGENCE)
            part = s - tl.exp(log_q) * total
        if MASKED:
            part = tl.where(places < shared, part, 0.0)
        gradient += weight * part
    write_gradient(student, places, ids, gradient, z, end, factor, CAPPED, MASKED)
