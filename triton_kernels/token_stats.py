"""Token statistics in Triton: one streaming read of a row. token_gradient has the backward pass.

The arithmetic and its rules are those of csrc/math/row_state.h: the target's lane is kept apart, so
that -log p_t = softplus(log-odds) is exact however close p_t is to 1, and sums are taken about the running maximum. On
a peaked row S = sum e^(z-m) is 1 + s and the entropy lives in s: lanes at the maximum are counted (`tops`) apart from
the sum over the others (`rest`), where those may be that are at the maximum beside one of the same thread.

Threads do not wait for each other: each has a maximum and sums of its own, merged when the row has been read.

Shapes, strides and options are run-time arguments: nothing is compiled again for another vocabulary, number of rows or
temperature. No atomics: a lane's place is fixed and parts merge in order, the same bits every run.
"""

import triton
import triton.language as tl

from .lanes import (
    INFINITY,
    THREADS,
    added,
    curve,
    exp,
    fetched,
    finite,
    kernel,
    lanes_of,
    largest,
    log1p,
    log_softplus,
    moved_to_pack,
    phase_of,
    row_of,
    softplus,
    swapped,
    times,
)

# A thread works on BYTES while twice as many are on their way (half of them from the reference where there is one; half
# as many where loads are not 16 bytes wide, with a softcap, and in double precision). Memory of 4.3 TB/s, 0.7 us away,
# asks for 23 KB in flight on each of 132 SMs. RESIDENT programs have up to 48 KB, so a thread may take REGISTERS of the
# 65536.
# At that rate an SM of 1.75 GHz has slots for 13 instructions a bfloat16 element it reads or writes. What the machine
# code takes of them is in benchmarks/results/not-run-on-a-gpu-yet.md. No GPU has timed this yet.
BYTES, RESIDENT, REGISTERS = 64, 3, 168

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
def as_bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def joined(sums, d, before, before_d):
    """Sums of threads and what the state held of them, about maxima d above theirs."""
    return tl.sum(times(exp(d), sums), 0) + times(exp(before_d), before)


@kernel
def accumulate_kernel(
    logits, logits_outer: tl.int64, logits_inner: tl.int64,
    reference, reference_outer: tl.int64, reference_inner: tl.int64,
    targets, targets_outer: tl.int64, targets_inner: tl.int64,
    state, fresh: tl.int32,
    inner: tl.int32, columns: tl.int32, part_columns: tl.int32, first: tl.int64, ignore_index: tl.int64,
    scale: tl.float64, softcap: tl.float64,
    MOMENTS: tl.constexpr, SQUARES: tl.constexpr, UNIFORM: tl.constexpr, PQ: tl.constexpr, QP: tl.constexpr,
    CURVE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One part of one row. Each thread has a running maximum and sums of its own lanes until the end."""
    T: tl.constexpr = logits.dtype.element_ty
    R: tl.constexpr = reference.dtype.element_ty
    A: tl.constexpr = state.dtype.element_ty
    REFERENCE: tl.constexpr = PQ or QP
    PACKS: tl.constexpr = BLOCK // (THREADS * VEC)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    target = tl.load(row_of(targets, row, inner, targets_outer, targets_inner, 0)).to(tl.int64)
    if target == ignore_index:
        return
    n = tl.maximum(tl.minimum(columns - part * part_columns, part_columns), 0)
    begin = tl.minimum(part * part_columns, columns - 1)  # of an empty part too there is something to read
    x = row_of(logits, row, inner, logits_outer, logits_inner, begin)
    r = row_of(reference, row, inner, reference_outer, reference_inner, begin)
    low = phase_of(x, VEC, WIDE)
    x, r = moved_to_pack(x, -low, VEC, WIDE), moved_to_pack(r, -low, VEC, WIDE)
    high = low + n  # the row is lanes [low, high)
    held = fetched(x, 0, high, PACKS, VEC, WIDE)
    after = fetched(x, BLOCK, high, PACKS, VEC, WIDE)
    ref_held = fetched(r, 0, high, PACKS, VEC, WIDE) if REFERENCE else held
    ref_after = fetched(r, BLOCK, high, PACKS, VEC, WIDE) if REFERENCE else after

    scale, softcap = tl.full((), scale, A), tl.full((), softcap, A)
    column = target - first - begin
    inside = (column >= 0) & (column < n)
    left = low + tl.minimum(tl.maximum(column, 0), n).to(tl.int32)  # the end of what comes before the target
    at = tl.where(inside, low + column, -1).to(tl.int32)
    s = state + (row * tl.num_programs(1) + part) * FIELDS
    streaming = fresh == 0
    origin, offset = tl.full((), 0, A), tl.full((), 0, A)
    if UNIFORM or REFERENCE:
        count = tl.load(s + COUNT, mask=streaming, other=0.0)
        # The level of z, and of z - r, in the first lane: sums about it do not feel a common shift.
        z_0 = curve(tl.load(x + low, mask=n > 0, other=0.0), scale, softcap, T, A, CURVE)[0]
        origin = tl.where(count > 0, tl.load(s + ORIGIN, mask=streaming, other=0.0), finite(z_0))
        if REFERENCE:
            q_0 = curve(tl.load(r + low, mask=n > 0, other=0.0), scale, softcap, R, A, CURVE)[0]
            offset = tl.where(count > 0, tl.load(s + OFFSET, mask=streaming, other=0.0), finite(z_0 - q_0))
    z_t = curve(tl.load(x + at, mask=inside, other=0.0), scale, softcap, T, A, CURVE)[0]
    tl.store(s + TARGET, tl.where(inside, z_t, tl.load(s + TARGET, mask=streaming, other=float("nan"))))
    if REFERENCE:
        r_t = curve(tl.load(r + at, mask=inside, other=0.0), scale, softcap, R, A, CURVE)[0]
        tl.store(s + REF_TARGET, tl.where(inside, r_t, tl.load(s + REF_TARGET, mask=streaming, other=float("nan"))))

    zero = tl.zeros([THREADS], A)
    m, ref_m, before = zero + LOWEST, zero + LOWEST, zero - INFINITY
    rest, shifted, squared, total, gap, ref_sum, ref_gap = zero, zero, zero, zero, zero, zero, zero
    # With MOMENTS a thread's largest lane is in its hand, with others, and in no sum.
    hand = tl.full([PACKS, THREADS, VEC // 4 if VEC > 2 else 1], -INFINITY, A)
    lanes = lanes_of(PACKS, VEC, WIDE)
    for start in tl.range(0, high, BLOCK, loop_unroll_factor=2):
        z = curve(held, scale, softcap, T, A, CURVE)[0]
        q = curve(ref_held, scale, softcap, R, A, CURVE)[0]
        held, ref_held = after, ref_after
        after = fetched(x, start + 2 * BLOCK, high, PACKS, VEC, WIDE)
        ref_after = fetched(r, start + 2 * BLOCK, high, PACKS, VEC, WIDE) if REFERENCE else after
        if (start < low) | (start + BLOCK > high) | ((at >= start) & (at < start + BLOCK)):  # seldom
            place = as_bits(start - low + lanes)  # the column; beyond all of them where it is negative
            if UNIFORM:
                total += added(tl.where(place < as_bits(n), z - origin, 0.0))
            before = tl.maximum(before, largest(tl.where(place < as_bits(left - low), z, -INFINITY)))
            counts = (place < as_bits(n)) & (place != as_bits(at - low))
            z = tl.where(counts, z, -INFINITY)
            if REFERENCE:
                q = tl.where(counts, q, -INFINITY)
        elif UNIFORM:
            total += added(z - origin)

        if MOMENTS:
            others, hand = swapped(z, hand)
            most = largest(hand)
        else:
            others = z
            most = largest(z)
        if start + BLOCK <= left:
            before = tl.maximum(before, most)
        top = tl.maximum(m, most)
        rest, shifted, squared = moved(m - top, rest, shifted, squared)
        if PQ:
            gap = times(exp(m - top), gap)
        m = top
        if REFERENCE:
            ref_top = tl.maximum(ref_m, largest(q))
            c = exp(ref_m - ref_top)
            ref_sum, ref_gap, ref_m = c * ref_sum, times(c, ref_gap), ref_top
            g, e = (z - q) - offset, exp(q - ref_m[None, :, None])
            ref_sum += added(e)
            if QP:
                ref_gap += added(times(e, g))
            if PQ:
                gap += added(times(exp(z - m[None, :, None]), g))
        d = others - m[None, :, None]
        e = exp(d)
        rest += added(e)
        if MOMENTS:
            d = tl.maximum(d, -200.0, propagate_nan=tl.PropagateNan.ALL)  # e is 0 beyond, and 0 * -inf is NaN
            shifted += added(e * d)
            if SQUARES:
                squared += added(e * d * d)

    # The threads' sums, then what the state held: read here, before the reductions make threads wait for each other.
    old_m, old_ref_m = (
        tl.load(s + MAX, mask=streaming, other=LOWEST),
        tl.load(s + REF_MAX, mask=streaming, other=LOWEST),
    )
    old_before = tl.load(s + BEFORE, mask=streaming, other=-INFINITY)
    tops, old_rest = tl.load(s + TOPS, mask=streaming, other=0.0), tl.load(s + REST, mask=streaming, other=0.0)
    old_shifted = tl.load(s + SHIFTED, mask=streaming, other=0.0)
    old_squared = tl.load(s + SQUARED, mask=streaming, other=0.0)
    old_total, old_gap = tl.load(s + TOTAL, mask=streaming, other=0.0), tl.load(s + GAP, mask=streaming, other=0.0)
    old_ref_sum = tl.load(s + REF_SUM, mask=streaming, other=0.0)
    old_ref_gap = tl.load(s + REF_GAP, mask=streaming, other=0.0)
    top = tl.maximum(tl.max(m, 0), old_m)
    d, old_d = m - top, old_m - top
    rest, shifted, squared = moved(d, rest, shifted, squared)
    old_sum, old_shifted, old_squared = moved(old_d, tops + old_rest, old_shifted, old_squared)
    tops, old_rest = tl.where(old_d == 0, tops, 0.0), tl.where(old_d == 0, old_rest, old_sum)
    if MOMENTS:
        tops += tl.sum(added(tl.where(hand == top, 1.0, 0.0).to(A)), 0)
        d_hand = hand - top
        e = tl.where(hand == top, 0.0, exp(d_hand))
        d_hand = tl.maximum(d_hand, -200.0, propagate_nan=tl.PropagateNan.ALL)
        rest += added(e)
        shifted += added(e * d_hand)
        squared += added(e * d_hand * d_hand)
    tl.store(s + MAX, top)
    tl.store(s + BEFORE, tl.maximum(tl.max(before, 0), old_before))
    tl.store(s + ORIGIN, origin)
    tl.store(s + OFFSET, offset)
    tl.store(s + COUNT, tl.load(s + COUNT, mask=streaming, other=0.0) + n)
    tl.store(s + TOPS, tops)
    tl.store(s + REST, tl.sum(rest, 0) + old_rest)
    if MOMENTS:
        tl.store(s + SHIFTED, tl.sum(shifted, 0) + old_shifted)
    if SQUARES:
        tl.store(s + SQUARED, tl.sum(squared, 0) + old_squared)
    if UNIFORM:
        tl.store(s + TOTAL, tl.sum(total, 0) + old_total)
    if PQ:
        tl.store(s + GAP, joined(gap, d, old_gap, old_d))
    ref_top = tl.maximum(tl.max(ref_m, 0), old_ref_m)
    d, old_d = ref_m - ref_top, old_ref_m - ref_top
    tl.store(s + REF_MAX, ref_top)
    if REFERENCE:
        tl.store(s + REF_SUM, tl.sum(exp(d) * ref_sum, 0) + exp(old_d) * old_ref_sum)
    if QP:
        tl.store(s + REF_GAP, joined(ref_gap, d, old_ref_gap, old_d))


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
    place = row_of(targets, row, inner, targets_outer, targets_inner, 0)
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
