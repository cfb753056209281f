"""Token statistics in Triton: one streaming read of a row. token_gradient has the backward pass.

The arithmetic and its rules are those of csrc/math/row_state.h: the target's lane is kept apart, so
that -log p_t = softplus(log-odds) is exact however close p_t is to 1, and sums are taken about the running maximum. On
a peaked row S = sum e^(z-m) is 1 + s and the entropy lives in s: lanes at the maximum are counted (`tops`) apart from
the sum over the others (`rest`).

Shapes, strides and options are run-time arguments: nothing is compiled again for another vocabulary, number of rows or
temperature. No atomics: a lane's place is fixed and parts merge in order, the same bits every run.
"""

import triton
import triton.language as tl

from .lanes import (
    INFINITY,
    SOFTCAPPED,
    curve,
    exp,
    fetched,
    finite,
    kernel,
    lanes_of,
    log1p,
    log_softplus,
    row_of,
    softplus,
    times,
    whole,
)

# A program is 128 threads, and a thread works on BYTES while the next BYTES are on their way (half of them from the
# reference where there is one; half as many where loads are not 16 bytes wide, and in double precision). Memory of 4.3
# TB/s, 0.7 us away, asks for 23 KB in flight on each of 132 SMs. RESIDENT programs have 32 KB, so a thread may take 128
# of the 65536 registers. With a softcap or in double precision arithmetic is the limit, and three programs are enough.
# At that rate an SM of 1.75 GHz has slots for 13 instructions a bfloat16 element it reads or writes. What the machine
# code takes of them is in benchmarks/results/not-run-on-a-gpu-yet.md. No GPU has timed this yet.
WARPS, BYTES = 4, 64
RESIDENT, RESIDENT_SLOW = 4, 3

# The streaming state of a part of a row, about d = z - max: lanes at the max, sum of e^d, e^d d, e^d d^2 over the rest.
MAX, TOPS, REST, SHIFTED, SQUARED = (tl.constexpr(i) for i in range(5))
TOTAL, ORIGIN, COUNT = (tl.constexpr(i) for i in range(5, 8))  # sum of z - origin over all lanes, the target's too
# With a reference: sum of e^d g, its own max and sum of e^dq, sum of e^dq g, where g = z - r - offset.
GAP, REF_MAX, REF_SUM, REF_GAP, OFFSET = (tl.constexpr(i) for i in range(8, 13))
BEFORE, TARGET, REF_TARGET = (tl.constexpr(i) for i in range(13, 16))  # largest z left of the target; z_t, r_t or NaN
FIELDS = tl.constexpr(16)

# The order of pyunlearn.ops.OUTPUTS, in which the argument `lines` holds four bits an output; saved is what backward
# needs besides the row.
LOGP, LOG_NLL, ENTROPY, VARIANCE, KL_PQ, KL_QP, UNIFORM_CE, LSE, GREEDY, TOPK = (tl.constexpr(i) for i in range(10))
SAVED_MAX, SAVED_LOG_SUM, SAVED_LOG_ODDS, SAVED_REF_MAX, SAVED_REF_LOG_SUM = (tl.constexpr(i) for i in range(5))

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the max of nothing: finite, so that a lane at -inf has e^d = 0, not NaN


@triton.jit
def line_of(output: tl.constexpr, lines):
    """Which line of the stacked statistics holds an output, counted from 1; 0 where it was not asked for."""
    return (lines >> (4 * output)) & 15


@triton.jit
def moved(d, s, shifted, squared):
    """Sums about a maximum, about another one -d above it."""
    c = exp(d)
    d = tl.where(c > 0, d, 0.0)
    return c * s, c * (shifted + d * s), c * (squared + d * (2 * shifted + d * s))


@triton.jit
def resumed(field, holder, GROUPS: tl.constexpr, WANTED: tl.constexpr):
    """A sum spread over the groups; what the state holds of it goes to the group `holder` (-1: none)."""
    group = tl.arange(0, GROUPS)
    if WANTED:
        return tl.load(field + group * 0, mask=group == holder, other=0.0)
    else:
        return tl.zeros([GROUPS], field.dtype.element_ty)


@triton.jit
def store_sum(field, sums, WANTED: tl.constexpr):
    if WANTED:
        tl.store(field, tl.sum(sums, 0))


@kernel
def accumulate_kernel(
    logits, logits_outer: tl.int64, logits_inner: tl.int64,
    reference, reference_outer: tl.int64, reference_inner: tl.int64,
    targets, targets_outer: tl.int64, targets_inner: tl.int64,
    state, fresh: tl.int32,
    inner: tl.int32, columns: tl.int32, part_columns: tl.int32, first: tl.int64, ignore_index: tl.int64,
    scale: tl.float64, softcap: tl.float64,
    MOMENTS: tl.constexpr, SQUARES: tl.constexpr, UNIFORM: tl.constexpr, PQ: tl.constexpr, QP: tl.constexpr,
    CURVE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One part of one row. A thread holds whole groups of VEC lanes, whose sums are its own until the end."""
    T: tl.constexpr = logits.dtype.element_ty
    R: tl.constexpr = reference.dtype.element_ty
    A: tl.constexpr = state.dtype.element_ty
    REFERENCE: tl.constexpr = PQ or QP
    GROUPS: tl.constexpr = BLOCK // VEC
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    target = tl.load(row_of(targets, row, inner, targets_outer, targets_inner, 0, False)).to(tl.int64)
    if target == ignore_index:
        return
    begin = part * part_columns
    n = whole(tl.maximum(tl.minimum(columns - begin, part_columns), 0), VEC, ALIGNED)
    x = row_of(logits, row, inner, logits_outer, logits_inner, begin, ALIGNED)
    r = row_of(reference, row, inner, reference_outer, reference_inner, begin, ALIGNED)
    held = fetched(x, 0, n, GROUPS, VEC, ALIGNED)
    ref_held = fetched(r, 0, n, GROUPS, VEC, ALIGNED) if REFERENCE else held

    scale, softcap = tl.full((), scale, A), tl.full((), softcap, A)
    column = target - first - begin
    inside = (column >= 0) & (column < n)
    left = tl.minimum(tl.maximum(column, 0), n).to(tl.int32)  # columns before the target
    at = tl.where(inside, column, -1).to(tl.int32)
    s = state + (row * tl.num_programs(1) + part) * FIELDS
    streaming, holder = fresh == 0, tl.where(fresh == 0, 0, -1)
    m = tl.load(s + MAX, mask=streaming, other=LOWEST)
    ref_m = tl.load(s + REF_MAX, mask=streaming, other=LOWEST)
    before = tl.load(s + BEFORE, mask=streaming, other=-INFINITY)
    tops, rest = resumed(s + TOPS, holder, GROUPS, MOMENTS), resumed(s + REST, holder, GROUPS, True)
    shifted, squared = resumed(s + SHIFTED, holder, GROUPS, MOMENTS), resumed(s + SQUARED, holder, GROUPS, SQUARES)
    total, ref_sum = resumed(s + TOTAL, holder, GROUPS, UNIFORM), resumed(s + REF_SUM, holder, GROUPS, REFERENCE)
    gap, ref_gap = resumed(s + GAP, holder, GROUPS, PQ), resumed(s + REF_GAP, holder, GROUPS, QP)
    count = tl.load(s + COUNT, mask=streaming, other=0.0)
    origin, offset = tl.full((), 0, A), tl.full((), 0, A)
    if UNIFORM or REFERENCE:
        # The level of z, and of z - r, in the first lane: sums about it do not feel a common shift.
        z = curve(tl.load(x, mask=n > 0, other=0.0), scale, softcap, T, A, CURVE)[0]
        origin = tl.where(count > 0, tl.load(s + ORIGIN, mask=streaming, other=0.0), finite(z))
        if REFERENCE:
            q = curve(tl.load(r, mask=n > 0, other=0.0), scale, softcap, R, A, CURVE)[0]
            offset = tl.where(count > 0, tl.load(s + OFFSET, mask=streaming, other=0.0), finite(z - q))
    z_t = curve(tl.load(x + at, mask=inside, other=0.0), scale, softcap, T, A, CURVE)[0]
    tl.store(s + TARGET, tl.where(inside, z_t, tl.load(s + TARGET, mask=streaming, other=float("nan"))))
    if REFERENCE:
        r_t = curve(tl.load(r + at, mask=inside, other=0.0), scale, softcap, R, A, CURVE)[0]
        tl.store(s + REF_TARGET, tl.where(inside, r_t, tl.load(s + REF_TARGET, mask=streaming, other=float("nan"))))

    lanes = lanes_of(GROUPS, VEC, ALIGNED)
    for start in range(0, n, BLOCK):
        block = curve(held, scale, softcap, T, A, CURVE)[0]
        ref_block = curve(ref_held, scale, softcap, R, A, CURVE)[0]
        held = fetched(x, start + BLOCK, n, GROUPS, VEC, ALIGNED)
        ref_held = fetched(r, start + BLOCK, n, GROUPS, VEC, ALIGNED) if REFERENCE else held
        if CURVE == SOFTCAPPED:  # -inf has become -softcap
            block = tl.where(start + lanes < n, block, -INFINITY)
            ref_block = tl.where(start + lanes < n, ref_block, -INFINITY)
        if UNIFORM:
            total += tl.sum(tl.where(start + lanes < n, block - origin, 0.0), 1)
        if (at >= start) & (at < start + BLOCK):
            before = tl.maximum(before, tl.max(tl.max(tl.where(start + lanes < at, block, -INFINITY), 1), 0))
            block = tl.where(start + lanes == at, -INFINITY, block)
            if REFERENCE:
                ref_block = tl.where(start + lanes == at, -INFINITY, ref_block)

        top = tl.max(tl.max(block, 1), 0)
        if tl.minimum(start + BLOCK, n) <= left:
            before = tl.maximum(before, top)
        if top > m:
            rest, up_shifted, up_squared = moved(m - top, tops + rest, shifted, squared)
            if MOMENTS:
                tops, shifted = tl.zeros_like(tops), up_shifted
            if SQUARES:
                squared = up_squared
            if PQ:
                gap = times(exp(m - top), gap)
            m = top
        if REFERENCE:
            ref_top = tl.max(tl.max(ref_block, 1), 0)
            if ref_top > ref_m:
                c = exp(ref_m - ref_top)
                ref_sum, ref_gap, ref_m = c * ref_sum, times(c, ref_gap), ref_top
            g, e = (block - ref_block) - offset, exp(ref_block - ref_m)
            ref_sum += tl.sum(e, 1)
            if QP:
                ref_gap += tl.sum(times(e, g), 1)
        if MOMENTS and top == m:  # seldom
            tops += tl.sum(tl.where(block == m, 1.0, 0.0).to(A), 1)
            if PQ:
                gap += tl.sum(tl.where(block == m, g, 0.0), 1)
            block = tl.where(block == m, -INFINITY, block)
        d = block - m
        e = exp(d)
        rest += tl.sum(e, 1)
        if PQ:
            gap += tl.sum(times(e, g), 1)
        if MOMENTS:
            d = tl.maximum(d, -200.0, propagate_nan=tl.PropagateNan.ALL)  # e is 0 beyond, and 0 * -inf is NaN
            shifted += tl.sum(e * d, 1)
            if SQUARES:
                squared += tl.sum(e * d * d, 1)

    # The reductions above have made every thread wait for the others' reads of the state.
    tl.store(s + MAX, m)
    tl.store(s + REF_MAX, ref_m)
    tl.store(s + ORIGIN, origin)
    tl.store(s + OFFSET, offset)
    tl.store(s + COUNT, count + n)
    tl.store(s + BEFORE, before)
    store_sum(s + TOPS, tops, True)
    store_sum(s + REST, rest, True)
    store_sum(s + SHIFTED, shifted, MOMENTS)
    store_sum(s + SQUARED, squared, SQUARES)
    store_sum(s + TOTAL, total, UNIFORM)
    store_sum(s + REF_SUM, ref_sum, REFERENCE)
    store_sum(s + GAP, gap, PQ)
    store_sum(s + REF_GAP, ref_gap, QP)


@kernel
def finish_kernel(
    state, parts: tl.int32, targets, targets_outer: tl.int64, targets_inner: tl.int64, stats, saved,
    rows: tl.int64, inner: tl.int32, lines: tl.int64, has_reference: tl.int32, vocabulary: tl.int32,
    ignore_index: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of rows: the parts of their states, in order, then the target's lane, then the statistics."""
    A: tl.constexpr = state.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < rows
    place = row_of(targets, row, inner, targets_outer, targets_inner, 0, False)
    counts = exists & (tl.load(place, mask=exists, other=0).to(tl.int64) != ignore_index)

    zero = tl.zeros([BLOCK], A)
    m, ref_m, before = zero + LOWEST, zero + LOWEST, zero - INFINITY
    z_t, r_t, origin, offset, count = zero + float("nan"), zero + float("nan"), zero, zero, zero
    for part in range(parts):
        s = state + (row * parts + part) * FIELDS
        z, more = tl.load(s + TARGET, mask=counts, other=float("nan")), tl.load(s + COUNT, mask=counts, other=0.0)
        z_t, r_t = tl.where(z == z, z, z_t), tl.where(z == z, tl.load(s + REF_TARGET, mask=counts, other=0.0), r_t)
        origin = tl.where(count == 0, tl.load(s + ORIGIN, mask=counts, other=0.0), origin)
        offset = tl.where(count == 0, tl.load(s + OFFSET, mask=counts, other=0.0), offset)
        m = tl.maximum(m, tl.load(s + MAX, mask=counts, other=LOWEST))
        ref_m = tl.maximum(ref_m, tl.load(s + REF_MAX, mask=counts, other=LOWEST))
        before = tl.maximum(before, tl.load(s + BEFORE, mask=counts, other=-INFINITY))
        count += more
    tops, rest, shifted, squared, total, gap, ref_sum, ref_gap = zero, zero, zero, zero, zero, zero, zero, zero
    for part in range(parts):
        s = state + (row * parts + part) * FIELDS
        d = tl.load(s + MAX, mask=counts, other=0.0) - m
        own_tops, own_rest = tl.load(s + TOPS, mask=counts, other=0.0), tl.load(s + REST, mask=counts, other=0.0)
        own_shifted, own_squared = (
            tl.load(s + SHIFTED, mask=counts, other=0.0),
            tl.load(s + SQUARED, mask=counts, other=0.0),
        )
        own_sum, own_shifted, own_squared = moved(d, own_tops + own_rest, own_shifted, own_squared)
        tops += tl.where(d == 0, own_tops, 0.0)
        rest += tl.where(d == 0, own_rest, own_sum)
        shifted += own_shifted
        squared += own_squared
        rebase = tl.load(s + ORIGIN, mask=counts, other=0.0) - origin
        total += tl.load(s + TOTAL, mask=counts, other=0.0) + tl.load(s + COUNT, mask=counts, other=0.0) * rebase
        c, own_sum = exp(d), own_tops + own_rest
        c_ref, own_ref = (
            exp(tl.load(s + REF_MAX, mask=counts, other=0.0) - ref_m),
            tl.load(s + REF_SUM, mask=counts, other=0.0),
        )
        rebase = tl.load(s + OFFSET, mask=counts, other=0.0) - offset
        ref_sum += c_ref * own_ref
        gap += times(c, tl.load(s + GAP, mask=counts, other=0.0) + own_sum * rebase)
        ref_gap += times(c_ref, tl.load(s + REF_GAP, mask=counts, other=0.0) + own_ref * rebase)

    others = tops + rest
    log_odds = tl.where(others == 0, -INFINITY, tl.log(others) + (m - z_t))
    greedy = (z_t >= m) & (z_t > before)
    possible, ref_possible = z_t > -INFINITY, r_t > -INFINITY
    # NaN, +inf, or nothing but -inf in the row: it has no softmax, and every statistic is NaN
    bad = (z_t != z_t) | (z_t == INFINITY) | (m == INFINITY) | (log_odds != log_odds)
    bad |= (others == 0) & (z_t == -INFINITY)
    all_m, all_ref_m = tl.where(possible, tl.maximum(m, z_t), m), tl.where(ref_possible, tl.maximum(ref_m, r_t), ref_m)
    d, d_t = m - all_m, tl.where(possible, z_t - all_m, LOWEST)
    e_t, q_t = exp(d_t), tl.where(ref_possible, exp(r_t - all_ref_m), 0.0)
    others, shifted, squared = moved(d, others, shifted, squared)
    tops = tl.where(d == 0, tops, 0.0) + tl.where(d_t == 0, 1.0, 0.0)
    rest = tl.where(d == 0, rest, others) + tl.where(d_t == 0, 0.0, e_t)
    shifted += times(e_t, d_t)
    squared += times(e_t, d_t * d_t)
    c_ref, g_t = exp(ref_m - all_ref_m), (z_t - r_t) - offset
    gap = times(exp(d), gap) + times(e_t, g_t)
    ref_gap = times(c_ref, ref_gap) + times(q_t, g_t)

    sum_, ref_sum = tops + rest, c_ref * ref_sum + q_t
    log_sum, ref_log_sum = log1p((tops - 1) + rest), tl.where(r_t == r_t, tl.log(ref_sum), float("nan"))
    mean = shifted / sum_
    # logsumexp(z) - logsumexp(r) - offset, in the order that keeps a common shift of z and r out of the rounding
    excess = ((all_m - all_ref_m) - offset) + (log_sum - ref_log_sum)
    entropy, variance = log_sum - mean, squared / sum_ - mean * mean
    kl_pq, kl_qp = gap / sum_ - excess, excess - ref_gap / ref_sum
    values = (
        -softplus(log_odds),
        log_softplus(log_odds),
        tl.where(entropy < 0, 0.0, entropy),
        tl.where(variance < 0, 0.0, variance),
        tl.where(kl_pq < 0, 0.0, kl_pq),
        tl.where(kl_qp < 0, 0.0, kl_qp),
        ((all_m - origin) + log_sum) - total / vocabulary,
        all_m + log_sum,
        tl.where(greedy, 1.0, 0.0),
    )
    for output in tl.static_range(TOPK):
        line = line_of(output, lines)
        if line > 0:
            value = tl.where(counts, tl.where(bad, float("nan"), values[output]), 0.0)
            tl.store(stats + (line - 1) * rows + row, value, mask=exists)
    all_ref_m, ref_log_sum = (
        tl.where(has_reference != 0, all_ref_m, 0.0),
        tl.where(has_reference != 0, ref_log_sum, 0.0),
    )
    tl.store(saved + SAVED_MAX * rows + row, tl.where(counts, all_m, 0.0), mask=exists)
    log_sum = tl.where(bad, float("nan"), log_sum)
    tl.store(saved + SAVED_LOG_SUM * rows + row, tl.where(counts, log_sum, 0.0), mask=exists)
    log_odds = tl.where(bad, float("nan"), log_odds)
    tl.store(saved + SAVED_LOG_ODDS * rows + row, tl.where(counts, log_odds, 0.0), mask=exists)
    tl.store(saved + SAVED_REF_MAX * rows + row, tl.where(counts, all_ref_m, 0.0), mask=exists)
    tl.store(saved + SAVED_REF_LOG_SUM * rows + row, tl.where(counts, ref_log_sum, 0.0), mask=exists)
