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
            low, high = (x << 16).to(A, bitcast=True), (x & -0x10000).to(A, bitcast=True)
        else:
            low = (x & 0xFFFF).to(tl.uint16).to(T, bitcast=True).to(A)
            high = ((x >> 16) & 0xFFFF).to(tl.uint16).to(T, bitcast=True).to(A)
        return tl.reshape(tl.join(low, high), (x.shape[0], 2 * x.shape[1]))
    else:
        return x.to(A)


@triton.jit
def curve(x, scale, softcap, T: tl.constexpr, A: tl.constexpr, CURVE: tl.constexpr):
    """-> z and tanh(x / softcap), whose square the slope wants. z is rounded (+ 0 leaves nothing to fuse with what
    follows): less the row's maximum it is exactly 0 there."""
    x = opened(x, T, A)
    if CURVE == IDENTITY:
        return x, x
    elif CURVE == SCALED:
        return tl.fma(x, scale, 0.0), x
    else:
        y = tanh(x / softcap)
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
# ALIGNED is what the launcher has looked up: rows start at whole 16 bytes and are a whole number of them. The compiler
# is told, and makes loads and stores that wide.


@triton.jit
def row_of(tensor, row, inner, outer_stride, inner_stride, column, ALIGNED: tl.constexpr):
    """A row's `column`, under two leading dimensions of which the second has size `inner`. The row is 64 bits wide:
    tensors have more than 2^31 elements."""
    start = tensor + ((row // inner) * outer_stride + (row % inner) * inner_stride + column)
    if ALIGNED:
        return tl.multiple_of(start, 16)
    else:
        return start


@triton.jit
def whole(columns, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    if ALIGNED:
        return tl.multiple_of(columns // VEC * VEC, VEC)
    else:
        return columns


@triton.jit
def lanes_of(GROUPS: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """(GROUPS, VEC) columns. A thread holds whole groups: 16 bytes, or lanes that lie side by side across a warp."""
    group, lane = tl.arange(0, GROUPS)[:, None], tl.arange(0, VEC)[None, :]
    if ALIGNED:
        return group * VEC + lane
    else:
        return lane * GROUPS + group


@triton.jit
def fetched(row, start, n, GROUPS: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns `start + lanes_of(...)` of a row, -inf from column n on. 16 bits stay packed: half the registers."""
    T: tl.constexpr = row.dtype.element_ty
    if ALIGNED and T.primitive_bitwidth == 16:
        pairs = start // 2 + lanes_of(GROUPS, VEC // 2, True)
        pointer = tl.multiple_of(row.to(tl.pointer_type(tl.int32), bitcast=True), 16)
        nothing: tl.constexpr = -0x7F0080 if T.is_bf16() else -0x3FF0400  # a pair of -inf
        return tl.load(pointer + pairs, mask=pairs < tl.multiple_of(n // 2, VEC // 2), other=nothing)
    else:
        lanes = start + lanes_of(GROUPS, VEC, ALIGNED)
        return tl.load(row + lanes, mask=lanes < n, other=-INFINITY)
