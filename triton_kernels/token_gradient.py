"""d(logits) of the token statistics in Triton: one read and one write of a row, by csrc/math/token_gradient.h's rules.

The target's lane is worked out by 1 - p_t from the log-odds, never as the difference of two nearly equal numbers.
"""

import triton
import triton.language as tl

from .lanes import (
    INFINITY,
    curve,
    exp,
    kernel,
    log_softplus,
    moved_to_pack,
    phase_of,
    row_of,
    slope,
    softplus,
    times,
)
from .token_stats import (
    ENTROPY,
    KL_PQ,
    KL_QP,
    LOG_NLL,
    LOGP,
    LSE,
    SAVED_LOG_ODDS,
    SAVED_LOG_SUM,
    SAVED_MAX,
    SAVED_REF_LOG_SUM,
    SAVED_REF_MAX,
    TOPK,
    UNIFORM_CE,
    line_of,
)


@triton.jit
def entry(stats, output: tl.constexpr, lines, rows, row):
    """An output of a row in the stacked statistics, or 0."""
    line = line_of(output, lines)
    return tl.load(stats + (line - 1) * rows + row, mask=line > 0, other=0.0)


@triton.jit
def lane_gradient(z, r, coefficients, LOGS: tl.constexpr, REFERENCE: tl.constexpr):
    """dz of lanes other than the target: p (on_p + on_logp logp + on_logq logq) + on_q q + constant."""
    row_max, log_sum, log_scale, ref_max, ref_log_sum, on_p, on_logp, on_logq, on_q, constant = coefficients
    logp = (z - row_max) - log_sum
    p = exp(logp - log_scale)
    weight, dz = on_p, constant
    if LOGS:
        weight += on_logp * logp
    if REFERENCE:
        logq = (r - ref_max) - ref_log_sum
        weight += times(on_logq, logq)
        dz += on_q * exp(logq)
    if LOGS or REFERENCE:
        return dz + times(p, weight)
    else:
        return dz + p * weight


@triton.jit
def scattered(
    x, r, at, wanted, more, scale, softcap, coefficients,
    A: tl.constexpr, CURVE: tl.constexpr, LOGS: tl.constexpr, REFERENCE: tl.constexpr,
):  # fmt: skip
    """dx of lanes here and there; more is added to dz."""
    T: tl.constexpr = x.dtype.element_ty
    z, y = curve(tl.load(x + at, mask=wanted, other=0.0), scale, softcap, T, A, CURVE)
    q = z
    if REFERENCE:
        R: tl.constexpr = r.dtype.element_ty
        q = curve(tl.load(r + at, mask=wanted, other=0.0), scale, softcap, R, A, CURVE)[0]
    return slope(more + lane_gradient(z, q, coefficients, LOGS, REFERENCE), y, scale, CURVE).to(T)


@kernel
def backward_kernel(
    grad, stats, saved, rows: tl.int64, lines: tl.int64,
    logits, logits_outer: tl.int64, logits_inner: tl.int64,
    reference, reference_outer: tl.int64, reference_inner: tl.int64,
    targets, targets_outer: tl.int64, targets_inner: tl.int64,
    index, belief, k: tl.int32, out, out_outer: tl.int64, out_inner: tl.int64,
    inner: tl.int32, columns: tl.int32, part_columns: tl.int32, first: tl.int64, vocabulary: tl.int32,
    ignore_index: tl.int64, scale: tl.float64, softcap: tl.float64,
    LOGS: tl.constexpr, REFERENCE: tl.constexpr, K: tl.constexpr, CURVE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One part of one row of d(logits), which may be the logits' own memory."""
    T: tl.constexpr = logits.dtype.element_ty
    R: tl.constexpr = reference.dtype.element_ty
    A: tl.constexpr = saved.dtype.element_ty
    COARSE: tl.constexpr = T.primitive_bitwidth == 16
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * part_columns
    n = tl.maximum(tl.minimum(columns - begin, part_columns), 0)
    x = row_of(logits, row, inner, logits_outer, logits_inner, begin)
    r = row_of(reference, row, inner, reference_outer, reference_inner, begin)
    dx = row_of(out, row, inner, out_outer, out_inner, begin)
    lanes, edge = tl.arange(0, BLOCK), tl.arange(0, 2 * VEC)
    if WIDE:  # whole packs, `body` lanes from `head` on, and fewer than a pack's lanes on either side: the edges
        head = tl.minimum((VEC - phase_of(x, VEC, WIDE)) % VEC, n)
        body = tl.multiple_of((n - head) // VEC * VEC, VEC)
    else:
        head, body = n * 0, n
    edge = tl.where(edge < VEC, edge, head + body - VEC + edge)
    at_edge = (edge < head) | ((edge >= head + body) & (edge < n))
    x_body, r_body, dx_body = (
        moved_to_pack(x, head, VEC, WIDE),
        moved_to_pack(r, head, VEC, WIDE),
        moved_to_pack(dx, head, VEC, WIDE),
    )

    target = tl.load(row_of(targets, row, inner, targets_outer, targets_inner, 0)).to(tl.int64)
    a, a_nll = entry(grad, LOGP, lines, rows, row), entry(grad, LOG_NLL, lines, rows, row)
    a_entropy, a_uniform = entry(grad, ENTROPY, lines, rows, row), entry(grad, UNIFORM_CE, lines, rows, row)
    a_pq, a_qp = entry(grad, KL_PQ, lines, rows, row), entry(grad, KL_QP, lines, rows, row)
    a_lse, a_topk = entry(grad, LSE, lines, rows, row), entry(grad, TOPK, lines, rows, row)
    entropy, kl_pq = entry(stats, ENTROPY, lines, rows, row), entry(stats, KL_PQ, lines, rows, row)
    row_max, log_sum = tl.load(saved + SAVED_MAX * rows + row), tl.load(saved + SAVED_LOG_SUM * rows + row)
    ref_max, ref_log_sum = tl.load(saved + SAVED_REF_MAX * rows + row), tl.load(saved + SAVED_REF_LOG_SUM * rows + row)
    u = tl.load(saved + SAVED_LOG_ODDS * rows + row)
    wanted = (a != 0) | (a_nll != 0) | (a_entropy != 0) | (a_uniform != 0) | (a_pq != 0) | (a_qp != 0) | (a_topk != 0)
    wanted |= a_lse != 0
    if (target == ignore_index) | (wanted == 0):  # the row is not read
        for start in range(0, body, BLOCK):
            tl.store(dx_body + start + lanes, tl.zeros([BLOCK], T), mask=start + lanes < body)
        tl.store(dx + edge, tl.zeros([2 * VEC], T), mask=at_edge)
        return
    held = tl.load(x_body + lanes, mask=lanes < body, other=0.0)
    ref_held = tl.load(r_body + lanes, mask=lanes < body, other=0.0) if REFERENCE else held

    scale, softcap = tl.full((), scale, A), tl.full((), softcap, A)
    nll = softplus(u)
    small = exp(-tl.abs(u))
    p_other = tl.where(u > 0, 1.0, small) / (1 + small)  # 1 - p_t
    # On a memorised token p_j and nll both underflow while their ratio does not: 1 / nll moves into the exponent. The
    # other terms are scaled back; where the target is all there is (u = -inf) nothing is left to scale.
    rescale = (a_nll != 0) & (u < -30)
    log_scale = tl.where(rescale & (u > -INFINITY), log_softplus(u), 0.0)
    unscale = exp(log_scale)
    shared = a_uniform + a_lse + a_qp - a_topk - times(a_entropy, entropy) - times(a_pq, kl_pq)
    constant = -a_uniform / vocabulary
    on_p = (shared - a) * unscale + tl.where(rescale, a_nll, times(a_nll, 1 / nll))
    on_logp, on_logq = (a_pq - a_entropy) * unscale, -a_pq * unscale
    coefficients = (row_max, log_sum, log_scale, ref_max, ref_log_sum, on_p, on_logp, on_logq, -a_qp, constant)

    # The lanes that do not follow the common formula: read before anything is overwritten, for dx may be x.
    column = target - first - begin
    inside = (column >= 0) & (column < n)
    y_t = curve(tl.load(x + column, mask=inside, other=0.0), scale, softcap, T, A, CURVE)[1]
    p_t = exp(-nll)
    weight = shared - times(a_pq - a_entropy, nll)
    dz_t = constant + a * p_other - tl.where(rescale, a_nll, times(a_nll, p_other / nll))
    if REFERENCE:
        r_t = curve(tl.load(r + column, mask=inside, other=0.0), scale, softcap, R, A, CURVE)[0]
        logq = (r_t - ref_max) - ref_log_sum
        weight += times(-a_pq, logq)
        dz_t -= a_qp * exp(logq)
    dz_t += times(p_t, weight)
    if K > 0:
        rank = tl.arange(0, K)
        j = tl.load(index + row * k + rank, mask=rank < k, other=-1).to(tl.int64)
        b = a_topk * tl.load(belief + row * k + rank, mask=rank < k, other=0.0)
        dz_t += tl.sum(tl.where(j == target, b, 0.0), 0)
        apart = (j != target) & (j >= first + begin) & (j < first + begin + n)
        j -= first + begin
        dx_top = scattered(x, r, j, apart, b, scale, softcap, coefficients, A, CURVE, LOGS, REFERENCE)
    dx_edge = scattered(x, r, edge, at_edge, 0.0, scale, softcap, coefficients, A, CURVE, LOGS, REFERENCE)
    tl.debug_barrier()
    for start in range(0, body, BLOCK):
        z, y = curve(held, scale, softcap, T, A, CURVE, COARSE)
        q = curve(ref_held, scale, softcap, R, A, CURVE, COARSE)[0]
        ahead = start + BLOCK + lanes
        held = tl.load(x_body + ahead, mask=ahead < body, other=0.0)
        ref_held = tl.load(r_body + ahead, mask=ahead < body, other=0.0) if REFERENCE else held
        dz = lane_gradient(z, q, coefficients, LOGS, REFERENCE)
        tl.store(dx_body + start + lanes, slope(dz, y, scale, CURVE).to(T), mask=start + lanes < body)
    tl.store(dx + edge, dx_edge, mask=at_edge)

    tl.debug_barrier()  # the last store to a lane is the right one
    tl.store(dx + column, slope(dz_t, y_t, scale, CURVE).to(T), mask=inside)
    if K > 0:
        tl.store(dx + j, dx_top, mask=apart)
