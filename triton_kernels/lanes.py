"""What the kernels of this folder share: arithmetic on lanes, and where lanes are in memory."""

import inspect
from typing import Any

import triton
import triton.language as tl

# How z comes from the logits x: x, x * scale, or softcap * tanh(x / softcap) * scale.
IDENTITY, SCALED, SOFTCAPPED = (tl.constexpr(i) for i in range(3))

INFINITY = tl.constexpr(float("inf"))


def kernel(fn: Any) -> Any:
    """jit, compiled for dtypes and constexpr arguments alone: no other argument's value or alignment is looked at."""
    names = inspect.signature(fn).parameters
    return triton.jit(fn, do_not_specialize=[n for n in names if fn.__annotations__.get(n) is not tl.constexpr])


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def exp(x):
    """One ex2 in single precision."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def log1p(x):
    """log(u) * x / (u - 1), u = 1 + x: the quotient undoes the rounding of u (Kahan)."""
    u = x + 1
    return tl.where(u == 1, x, tl.log(u) * (x / (u - 1)))


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e), e = e^(-2|x|), and where 1 - e cancels its odd series; in double precision expm1 by Kahan."""
    if x.dtype == tl.float64:
        a = tl.minimum(tl.abs(x), 20.0, propagate_nan=tl.PropagateNan.ALL)
        e = exp(-2 * a)
        minus = tl.where(e == 1, -2 * a, (e - 1) * (-2 * a / tl.log(e)))
        y = -minus / (2 + minus)
    else:
        a = tl.abs(x)
        e = exp(-2 * a)
        s = a * a
        p = s * -0.00665356731 + 0.0213016998
        p = p * s - 0.0538999699
        p = p * s + 0.133329704
        p = p * s - 0.333333284
        y = tl.where(a < 0.5, a + a * s * p, (1 - e) / (1 + e))
    return tl.where(x < 0, -y, y)


@triton.jit
def softplus(u):
    return tl.maximum(u, 0.0) + log1p(exp(-tl.abs(u)))


@triton.jit
def log_softplus(u):
    return tl.where(u < -15, u - exp(u) / 2, tl.log(softplus(u)))


@triton.jit
def times(weight, value):
    """A weight of 0 adds nothing, even to an infinite value."""
    return weight * tl.where(weight == 0, 0.0, value)


@triton.jit
def finite(x):
    return tl.where(tl.abs(x) < INFINITY, x, 0.0)


@triton.jit
def opened(x, T: tl.constexpr, A: tl.constexpr):
    """Loaded logits of dtype T, or pairs of them packed in 32 bits, in the statistics' type A."""
    if x.dtype == tl.int32:
        if T.is_bf16():
            low = (x << 16).to(tl.float32, bitcast=True).to(A)
            high = (x & -0x10000).to(tl.float32, bitcast=True).to(A)
        else:
            low = (x & 0xFFFF).to(tl.uint16).to(T, bitcast=True).to(A)
            high = ((x >> 16) & 0xFFFF).to(tl.uint16).to(T, bitcast=True).to(A)
        return together(low, high)
    else:
        return x.to(A)


@triton.jit
def curve(x, scale, softcap, T: tl.constexpr, A: tl.constexpr, CURVE: tl.constexpr, COARSE: tl.constexpr = False):
    """-> z and tanh(x / softcap), whose square the slope wants. z is rounded (+ 0 leaves nothing to fuse with what
    follows): less the row's maximum it is exactly 0 there. COARSE: tanh to 3e-7, enough for a gradient in 16 bits."""
    x = opened(x, T, A)
    if CURVE == IDENTITY:
        return x, x
    elif CURVE == SCALED:
        return tl.fma(x, scale, 0.0), x
    else:
        if COARSE:
            y = 1 - 2 / (1 + exp(x * (2 / softcap)))
        elif A.is_fp64():
            y = tanh(x / softcap)
        else:
            y = tanh(x * (1 / softcap))
        return tl.fma(softcap * y, scale, 0.0), y


@triton.jit
def slope(dz, y, scale, CURVE: tl.constexpr):
    """d(x) from d(z)."""
    if CURVE == IDENTITY:
        return dz
    elif CURVE == SCALED:
        return dz * scale
    else:
        return dz * scale * (1 - y * y)


# ---- where lanes are -------------------------------------------------------------------------------------------------
# A thread has PACKS times VEC lanes of a chunk. WIDE is what the launcher has looked up: a row begins as far into 16
# bytes in all of its tensors. Then packs are whole 16 bytes, as the compiler is told, and those at a row's ends may
# have lanes that are not its own: they are read and left out. Else lanes side by side go to a warp's threads.

THREADS = tl.constexpr(128)


@triton.jit
def row_of(tensor, row, inner, outer_stride, inner_stride, column):
    """A row's `column`, under two leading dimensions of which the second has size `inner`. The row is 64 bits wide:
    tensors have more than 2^31 elements."""
    return tensor + ((row // inner) * outer_stride + (row % inner) * inner_stride + column)


@triton.jit
def phase_of(row, VEC: tl.constexpr, WIDE: tl.constexpr):
    """How many lanes a row begins after the last multiple of VEC."""
    if WIDE:
        SIZE: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
        return (row.to(tl.int64) // SIZE % VEC).to(tl.int32)
    else:
        return tl.full((), 0, tl.int32)


@triton.jit
def moved_to_pack(row, lanes, VEC: tl.constexpr, WIDE: tl.constexpr):
    """A row `lanes` further on, where the compiler is told that packs begin."""
    if WIDE:
        SIZE: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
        return tl.multiple_of(row + lanes, VEC * SIZE if VEC * SIZE < 16 else 16)
    else:
        return row + lanes


@triton.jit
def lanes_of(PACKS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr):
    """(PACKS, THREADS, VEC): the lanes of a chunk."""
    pack, thread = tl.arange(0, PACKS)[:, None, None], tl.arange(0, THREADS)[None, :, None]
    lane = tl.arange(0, VEC)[None, None, :]
    if WIDE:
        return (pack * THREADS + thread) * VEC + lane
    else:
        return (pack * VEC + lane) * THREADS + thread


@triton.jit
def fetched(row, start, n, PACKS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Lanes `start + lanes_of(...)`; from lane n on anything. 16 bits stay packed: half the registers."""
    T: tl.constexpr = row.dtype.element_ty
    if WIDE:
        pack = tl.arange(0, PACKS)[:, None, None] * THREADS + tl.arange(0, THREADS)[None, :, None]
        pack = tl.minimum(start // VEC + pack, (n - 1) // VEC).to(tl.int64)  # an address in one instruction
        if T.primitive_bitwidth == 16:
            pairs = tl.multiple_of(row.to(tl.pointer_type(tl.int32), bitcast=True), 2 * VEC if VEC < 8 else 16)
            return tl.load(pairs + (pack * (VEC // 2) + tl.arange(0, VEC // 2)[None, None, :]))
        else:
            return tl.load(row + (pack * VEC + tl.arange(0, VEC)[None, None, :]))
    else:
        lanes = start + lanes_of(PACKS, VEC, WIDE)
        return tl.load(row + lanes, mask=lanes < n, other=0.0)


@triton.jit
def largest(chunk):
    """(THREADS,): of each thread's lanes."""
    return tl.max(tl.max(chunk, 2), 0)


@triton.jit
def added(chunk):
    return tl.sum(tl.sum(chunk, 2), 0)


@triton.jit
def least_of(a, b):
    """NaN is least."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def apart(chunk):
    """The larger and the smaller of lanes side by side."""
    a, b = tl.split(tl.reshape(chunk, (chunk.shape[0], chunk.shape[1], chunk.shape[2] // 2, 2)))
    return tl.maximum(a, b), least_of(a, b)


@triton.jit
def together(a, b):
    return tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1], 2 * a.shape[2]))


@triton.jit
def swapped(chunk, hand):
    """-> what the chunk has but for its largest lanes, which the new hand holds, and what they have put out of it."""
    large, small = apart(chunk)
    if large.shape[2] > hand.shape[2]:
        large, less = apart(large)
        return together(small, together(less, least_of(hand, large))), tl.maximum(hand, large)
    else:
        return together(small, least_of(hand, large)), tl.maximum(hand, large)
