"""The k largest logits of every row, in falling order, the lowest column first among equals, and the topk statistic."""

import triton
import triton.language as tl

from .lanes import (
    INFINITY,
    THREADS,
    curve,
    exp,
    fetched,
    kernel,
    lanes_of,
    largest,
    moved_to_pack,
    phase_of,
    row_of,
    times,
)
from .token_stats import SAVED_LOG_SUM, SAVED_MAX


@triton.jit
def flipped(bits):
    """Between a float's bits and an integer of the same order, either way."""
    if bits.dtype == tl.int64:
        return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@kernel
def topk_kernel(
    logits, logits_outer: tl.int64, logits_inner: tl.int64, targets, targets_outer: tl.int64, targets_inner: tl.int64,
    value, saved, index, belief, k: tl.int32, rows: tl.int64, inner: tl.int32, columns: tl.int32,
    ignore_index: tl.int64, scale: tl.float64, softcap: tl.float64,
    CURVE: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The k largest lanes of a row, in one pass. A lane that beats the least of those held takes its place: after the
    first chunk that happens k ln(V / BLOCK) times in a row without order, so chunks are hardly more than read."""
    T: tl.constexpr = logits.dtype.element_ty
    A: tl.constexpr = saved.dtype.element_ty
    BITS: tl.constexpr = tl.int64 if A.is_fp64() else tl.int32
    LEAST: tl.constexpr = -0x8000000000000000 if A.is_fp64() else -0x80000000
    row, slot = tl.program_id(0).to(tl.int64), tl.arange(0, K)
    active = slot < k
    target = tl.load(row_of(targets, row, inner, targets_outer, targets_inner, 0)).to(tl.int64)
    if target == ignore_index:
        tl.store(index + row * k + slot, tl.full([K], -1, tl.int32), mask=active)
        tl.store(belief + row * k + slot, tl.zeros([K], A), mask=active)
        tl.store(value + row, tl.full((), 0, A))
        return
    scale, softcap = tl.full((), scale, A), tl.full((), softcap, A)
    PACKS: tl.constexpr = BLOCK // (THREADS * VEC)
    x = row_of(logits, row, inner, logits_outer, logits_inner, 0)
    low = phase_of(x, VEC, WIDE)
    x, high = moved_to_pack(x, -low, VEC, WIDE), low + columns
    lanes = lanes_of(PACKS, VEC, WIDE)
    keys, places = tl.full([K], LEAST, BITS), tl.zeros([K], tl.int32)
    held = fetched(x, 0, high, PACKS, VEC, WIDE)
    for start in range(0, high, BLOCK):
        z = curve(held, scale, softcap, T, A, CURVE)[0]
        held = fetched(x, start + BLOCK, high, PACKS, VEC, WIDE)
        key = flipped((z + 0.0).to(BITS, bitcast=True))  # -0 counts as 0
        if (start < low) | (start + BLOCK > high):
            key = tl.where((start + lanes >= low) & (start + lanes < high), key, LEAST)
        best = tl.max(largest(key), 0)
        least = tl.min(tl.where(active, keys, best), 0)
        while best > least:
            place = tl.min(tl.min(tl.min(tl.where(key == best, lanes, BLOCK), 2), 1), 0)  # the lowest index wins a tie
            evicted = tl.where(active & (keys == least), places * K + slot, -1)  # the highest index loses a tie
            here = evicted == tl.max(evicted, 0)
            keys, places = tl.where(here, best, keys), tl.where(here, start - low + place, places)
            key = tl.where(lanes == place, LEAST, key)
            best = tl.max(largest(key), 0)
            least = tl.min(tl.where(active, keys, best), 0)

    ranked, index_ = keys, places
    for rank in range(k):
        best = tl.max(tl.where(active, keys, LEAST), 0)
        place = tl.min(tl.where(active & (keys == best), places, columns), 0)
        ranked, index_ = tl.where(slot == rank, best, ranked), tl.where(slot == rank, place, index_)
        keys = tl.where((keys == best) & (places == place), LEAST, keys)
    z = flipped(ranked).to(A, bitcast=True)
    e = tl.where(active, exp(z - tl.max(tl.where(active, z, -INFINITY), 0)), 0.0)
    b = e / tl.sum(e, 0)
    logp = (z - tl.load(saved + SAVED_MAX * rows + row)) - tl.load(saved + SAVED_LOG_SUM * rows + row)
    tl.store(index + row * k + slot, index_, mask=active)
    tl.store(belief + row * k + slot, b, mask=active)
    tl.store(value + row, tl.sum(times(b, logp), 0))
