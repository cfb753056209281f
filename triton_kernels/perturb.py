"""out = w + scale z over a table of chunks, in Triton: csrc/tensor/call.h's Perturb.

The words are math/philox.h's. The normals come from the CPU's polynomials, with fused multiply-adds.
"""

import triton
import triton.language as tl

BLOCKS = 256  # Philox calls a step of a program: 1024 elements, 8 a thread


@triton.jit(do_not_specialize=["key_low", "key_high", "remove_draw", "remove_scale", "add_draw", "add_scale"])
def perturb_kernel(
    table,
    key_low,
    key_high,
    remove_draw,
    remove_scale,
    add_draw,
    add_scale,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    WIDE: tl.constexpr,
    WORDS: tl.constexpr,
    REMOVE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = table + tl.program_id(0).to(tl.int64) * 5
    source, target, first, count, parameter = (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3).to(tl.int32),
        tl.load(row + 4),
    )
    aligned = ((source | target) % 16 == 0) & (first % 4 == 0) & (count % 8 == 0)
    if aligned:
        chunk(
            source, target, first // 4, 0, tl.multiple_of(count, 8), parameter, key_low, key_high,
            remove_draw, remove_scale, add_draw, add_scale,
            SOURCE, TARGET, WIDE, WORDS, REMOVE, ADD, BLOCKS, ALIGNED=True,
        )  # fmt: skip
    else:
        chunk(
            source, target, first // 4, (first % 4).to(tl.int32), count, parameter, key_low, key_high,
            remove_draw, remove_scale, add_draw, add_scale,
            SOURCE, TARGET, WIDE, WORDS, REMOVE, ADD, BLOCKS, ALIGNED=False,
        )  # fmt: skip


@triton.jit
def chunk(
    source, target, first_block, skipped, count, parameter, key_low, key_high, remove_draw, remove_scale, add_draw,
    add_scale, SOURCE: tl.constexpr, TARGET: tl.constexpr, WIDE: tl.constexpr, WORDS: tl.constexpr,
    REMOVE: tl.constexpr, ADD: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    at = count * 0
    while at < skipped + count:  # not range: its bounds are no tensors in older interpreters
        at = tl.multiple_of(at, 4 * BLOCKS)
        element = at - skipped + tl.arange(0, 4 * BLOCKS)
        mask = (element >= 0) & (element < count)
        block = first_block + at // 4 + tl.arange(0, BLOCKS)
        to = pointer(target, TARGET, ALIGNED) + element
        if WORDS:
            w0, w1, w2, w3 = words(block, key_low, key_high, add_draw, parameter)
            tl.store(to, in_order(w0, w1, w2, w3).to(tl.int32, bitcast=True), mask)
        elif SOURCE is None:
            z = normals(block, key_low, key_high, add_draw, parameter)
            tl.store(to, z * as_scale(add_scale, tl.float32), mask)
        else:
            value = tl.load(pointer(source, SOURCE, ALIGNED) + element, mask)
            if REMOVE or ADD:
                value = value.to(WIDE)
                if REMOVE:
                    old = normals(block, key_low, key_high, remove_draw, parameter)
                    value = to_bfloat16(value - old * as_scale(remove_scale, WIDE))
                if ADD:
                    z = normals(block, key_low, key_high, add_draw, parameter).to(WIDE)
                    value = value + z * as_scale(add_scale, WIDE)
            tl.store(to, value.to(TARGET), mask)
        at += 4 * BLOCKS


@triton.jit
def pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    p = address.to(tl.pointer_type(TYPE))
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def to_bfloat16(x):
    """float32 to the nearest bfloat16 number, ties to even, as float32."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def as_scale(bits, TYPE: tl.constexpr):
    return bits.to(tl.float64, bitcast=True).to(TYPE)


@triton.jit
def words(block, key_low, key_high, draw, parameter):
    """The four words of each block of four elements."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    zero = c0 * 0
    c2, c3 = zero + draw.to(tl.uint32, bitcast=True), zero + parameter.to(tl.uint32)
    k0, k1 = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    return tl.philox_impl(c0, c1, c2, c3, k0, k1)


@triton.jit
def in_order(w0, w1, w2, w3):
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def normals(block, key_low, key_high, draw, parameter):
    w0, w1, w2, w3 = words(block, key_low, key_high, draw, parameter)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return in_order(z0, z1, z2, z3)


@triton.jit
def box_muller(radius, angle):
    """csrc/math/philox.h: -2 ln u = -2 ln2 e + f Q(f) with u = 2^e (1 + f), then quarter turns q + w."""
    c = radius.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u = tl.where(c < 0, c + 1.0, c)
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = shifted >> 23
    f = tl.where(e == 0, c, ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0)
    q = tl.fma(f, -0.174447134, 0.287336856)
    q = tl.fma(q, f, -0.299045324)
    q = tl.fma(q, f, 0.331247866)
    q = tl.fma(q, f, -0.399136662)
    q = tl.fma(q, f, 0.500041485)
    q = tl.fma(q, f, -0.666683733)
    q = tl.fma(q, f, 0.999999762)
    q = tl.fma(q, f, -2.0)
    r = tl.sqrt(tl.fma(e.to(tl.float32), -1.38629436, q * f))

    quarter = (angle + 0x20000000) >> 30
    twice = ((angle - (quarter << 30)) * 2 + 1).to(tl.int32, bitcast=True)
    w = twice.to(tl.float32) * 4.656612873077393e-10
    s = w * w
    odd = tl.fma(s, -0.00460165786, 0.079680033)
    odd = tl.fma(odd, s, -0.64596349)
    odd = tl.fma(odd, s, 1.57079637) * w * r
    even = tl.fma(s, -0.0203985814, 0.253594935)
    even = tl.fma(even, s, -1.2336967)
    even = tl.fma(even, s, 0.99999994) * r
    swapped = (quarter & 1) != 0
    cosine, sine = tl.where(swapped, odd, even), tl.where(swapped, even, odd)
    return tl.where(((quarter + 1) & 2) != 0, -cosine, cosine), tl.where((quarter & 2) != 0, -sine, sine)
