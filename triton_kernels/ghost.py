"""<U_i, V_i> of per-sequence sums of outer products (`pyunlearn.ops.ghost_dot`): a program a tile of positions (t, s).

A tile of left and of right inner products is made on the tensor cores, and their product summed in float64 at once: no
(T, T) matrix is written. Tiles belong to one sequence; where u is v those below the diagonal count for those above.
"""

import triton
import triton.language as tl

GRAM, LOOKUP, MATCH = (tl.constexpr(i) for i in range(3))  # left of u and v: rows both; integers and rows; integers


@triton.jit
def gram(u, v, t, s, t_inside, s_inside, columns, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """(BLOCK, BLOCK): u_t . v_s for rows t, s of two arrays of `columns` columns, whole steps."""
    T: tl.constexpr = u.dtype.element_ty
    SUM: tl.constexpr = tl.float64 if T.is_fp64() else tl.float32
    PRECISION: tl.constexpr = "tf32x3" if T.is_fp32() else "ieee"  # three TF32 products for one
    lane = tl.arange(0, STEP)
    u_at = u + t[:, None] * columns + lane[None, :]
    v_at = v + s[None, :] * columns + lane[:, None]
    total = tl.zeros([BLOCK, BLOCK], SUM)
    for first in range(0, columns, STEP):
        x = tl.load(u_at + first, mask=t_inside[:, None], other=0.0)
        y = tl.load(v_at + first, mask=s_inside[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=SUM)
    return total


@triton.jit(do_not_specialize=["u_tiles", "v_tiles"])  # addresses and columns that 16 divides make wide loads
def tile_kernel(
    u_left, u_right, u_ends, v_left, v_right, v_ends, partials, left_columns, right_columns, u_tiles, v_tiles,
    LEFT: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, LEFT_STEP: tl.constexpr,
    RIGHT_STEP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sequence, tile = program // (u_tiles * v_tiles), (program % (u_tiles * v_tiles)).to(tl.int32)
    i, j = tile // v_tiles, tile % v_tiles
    u_begin, v_begin = tl.load(u_ends + sequence), tl.load(v_ends + sequence)
    u_length = tl.load(u_ends + sequence + 1) - u_begin
    v_length = tl.load(v_ends + sequence + 1) - v_begin
    wanted = (i * BLOCK < u_length) & (j * BLOCK < v_length)
    if SYMMETRIC:
        wanted = wanted & (i <= j)
    if wanted:
        lane = tl.arange(0, BLOCK)
        t_inside, s_inside = i * BLOCK + lane < u_length, j * BLOCK + lane < v_length
        t, s = u_begin + i * BLOCK + lane, v_begin + j * BLOCK + lane  # int64, as where they point to
        if LEFT == GRAM:
            lefts = gram(u_left, v_left, t, s, t_inside, s_inside, left_columns, BLOCK, LEFT_STEP)
        elif LEFT == LOOKUP:
            row = tl.load(u_left + t, mask=t_inside, other=0).to(tl.int64)
            known = (row >= 0) & (row < left_columns)
            at = v_left + s[None, :] * left_columns + row[:, None]
            values = tl.load(at, mask=known[:, None] & s_inside[None, :], other=0.0)
            WIDE: tl.constexpr = tl.float64 if v_left.dtype.element_ty.is_fp64() else tl.float32
            lefts = tl.where(known[:, None], values.to(WIDE), float("nan"))
        else:
            mine = tl.load(u_left + t, mask=t_inside, other=0)
            theirs = tl.load(v_left + s, mask=s_inside, other=0)
            lefts = (mine[:, None] == theirs[None, :]).to(tl.float32)
        rights = gram(u_right, v_right, t, s, t_inside, s_inside, right_columns, BLOCK, RIGHT_STEP)
        product = lefts.to(tl.float64) * rights.to(tl.float64)
        total = tl.sum(tl.sum(product, 1, keep_dims=True), 0)  # (1,): triton 3.6 cannot reduce a vector here on sm_100
        if SYMMETRIC:
            total = tl.where(i == j, total, 2 * total)
        whole = (u_length <= u_tiles * BLOCK) & (v_length <= v_tiles * BLOCK)  # else tiles are missing
        tl.store(partials + program + tl.arange(0, 1), tl.where(whole, total, float("nan")))
