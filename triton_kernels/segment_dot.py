"""<a, b>, <a, a> and <b, b> of many pairs of arrays, in float64: a program a chunk, then a program a segment.

The table is csrc/tensor/call.h's Segment: (a, b, count, first chunk, type of a, type of b) for every segment.
"""

import triton
import triton.language as tl

COLUMNS = tl.constexpr(6)


@triton.jit(do_not_specialize=["segments", "chunk"])
def chunk_kernel(
    table, segments, chunk, partials, A: tl.constexpr, B: tl.constexpr, A_TYPE: tl.constexpr, B_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of a segment of these types; programs of other segments leave at once."""
    i = tl.program_id(0)
    low, high = segments * 0, segments
    while high - low > 1:  # the last segment that begins at this chunk or before it
        middle = (low + high) // 2
        before = tl.load(table + middle * COLUMNS + 3) <= i
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    row = table + low * COLUMNS
    if (tl.load(row + 4) == A_TYPE) & (tl.load(row + 5) == B_TYPE):
        begin = (i - tl.load(row + 3)) * chunk
        n = tl.minimum(tl.load(row + 2) - begin, chunk).to(tl.int32)
        a = tl.load(row).to(tl.pointer_type(A)) + begin
        b = tl.load(row + 1).to(tl.pointer_type(B)) + begin
        if ALIGNED:
            a, b = tl.multiple_of(a, 16), tl.multiple_of(b, 16)
        ab, aa, bb = (tl.zeros([BLOCK], tl.float64),) * 3
        whole = n // BLOCK * BLOCK
        lane = tl.arange(0, BLOCK)
        for first in range(0, whole, BLOCK):  # no mask: loads of 16 bytes
            x, y = tl.load(a + first + lane).to(tl.float64), tl.load(b + first + lane).to(tl.float64)
            ab, aa, bb = ab + x * y, aa + x * x, bb + y * y
        inside = whole + lane < n
        x = tl.load(a + whole + lane, mask=inside, other=0.0).to(tl.float64)
        y = tl.load(b + whole + lane, mask=inside, other=0.0).to(tl.float64)
        ab, aa, bb = ab + x * y, aa + x * x, bb + y * y
        out = partials + i.to(tl.int64) * 3
        tl.store(out, tl.sum(ab))
        tl.store(out + 1, tl.sum(aa))
        tl.store(out + 2, tl.sum(bb))


@triton.jit(do_not_specialize=["segments", "chunk"])
def finish_kernel(table, segments, chunk, partials, sums, BLOCK: tl.constexpr):
    """Adds a segment's chunks up in a fixed order."""
    s = tl.program_id(0)
    count, first = tl.load(table + s * COLUMNS + 2), tl.load(table + s * COLUMNS + 3)
    chunks = (count + chunk - 1) // chunk
    ab, aa, bb = (tl.zeros([BLOCK], tl.float64),) * 3
    for start in range(0, chunks.to(tl.int32), BLOCK):
        lane = start + tl.arange(0, BLOCK)
        at, inside = partials + (first + lane) * 3, lane < chunks
        ab += tl.load(at, mask=inside, other=0.0)
        aa += tl.load(at + 1, mask=inside, other=0.0)
        bb += tl.load(at + 2, mask=inside, other=0.0)
    tl.store(sums + s, tl.sum(ab))
    tl.store(sums + segments + s, tl.sum(aa))
    tl.store(sums + 2 * segments + s, tl.sum(bb))
