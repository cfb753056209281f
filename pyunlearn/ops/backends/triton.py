"""The Triton backend: CUDA tensors, or CPU tensors where TRITON_INTERPRET=1 was set before triton was first imported.

A program streams one row; where rows are too few to fill the device, a part of one, and parts merge in their order.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_kernels import ghost as ghost_kernels
from ...triton_kernels import lanes, token_gradient
from ...triton_kernels import perturb as perturb_kernels
from ...triton_kernels import segment_dot as segment_kernels
from ...triton_kernels import token_stats as kernels
from ...triton_kernels import topk as topk_kernels
from ..contract import NEEDS_REFERENCE, OUTPUTS, SAVED, Options, check_range, statistics_dtype
from ..outer_sum import OuterSum, packed
from ..pieces import Noise, Piece
from . import tables

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.int32: tl.int32,
}
LAUNCH = dict(num_warps=lanes.THREADS.value // 32, enable_fp_fusion=True)
# Programs that fill an SM to the end of a launch, and columns below which a part of a row is not worth one.
PROGRAMS, PART = 16, 4096


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def parts_of(rows: int, columns: int, device: torch.device) -> int:
    wanted = triton.cdiv(PROGRAMS * multiprocessors(device), max(rows, 1))
    return max(1, min(wanted, triton.cdiv(columns, PART)))


def part_columns(columns: int, parts: int) -> int:
    """Columns a part, a whole number of every kernel's chunks."""
    return triton.cdiv(triton.cdiv(columns, parts), PART) * PART


def place(tensor: Tensor, columns: bool = True) -> tuple[Tensor, int, int]:
    """The tensor and the strides of its leading dimensions, at most two."""
    strides = tensor.stride()[:-1] if columns else tensor.stride()
    outer, inner = (0, 0, *strides)[-2:]
    return tensor, outer, inner


def in_phase(tensors: Sequence[Tensor], pack: int) -> bool:
    """Whether a row begins as many lanes after a whole number of packs in one tensor as in another."""
    starts = ((t.data_ptr() // t.element_size(), *t.stride()[:-1]) for t in tensors)
    return len({tuple(start % pack for start in of_tensor) for of_tensor in starts}) == 1


def inner_rows(targets: Tensor) -> int:
    return max(1, targets.size(-1)) if targets.dim() else 1


def lines(options: Options) -> int:
    """The line of each output in the stacked statistics, counted from 1, four bits each; 0 where it has none."""
    held = sum(line << 4 * OUTPUTS.index(name) for line, name in enumerate(options.outputs, 1))
    return held | 1 << 62  # the interpreter gives an integer the type that its value asks for: 64 bits


def needs_reference(options: Options) -> bool:
    return not NEEDS_REFERENCE.isdisjoint(options.outputs)


def read_by(logits: Tensor, reference: Tensor | None, options: Options) -> list[Tensor]:
    """What a kernel reads: the logits, and the reference where an output needs it."""
    return [logits] if reference is None or not needs_reference(options) else [logits, reference]


def transform(options: Options) -> tuple[float, float]:
    return 1 / options.temperature, options.softcap or 1.0


def compiled_for(options: Options, read: Sequence[Tensor], written: Sequence[Tensor] = ()) -> dict[str, int]:
    """How z comes from the logits, how wide loads are, and the lanes a program works on at a time."""
    curve = lanes.SCALED if options.temperature != 1 else lanes.IDENTITY
    size = read[0].element_size()
    wide = in_phase([*read, *written], 16 // size)
    whole = wide and size < 8 and not options.softcap  # else half as much at a time, for the registers
    return dict(
        CURVE=(lanes.SOFTCAPPED if options.softcap else curve).value,
        WIDE=wide,
        VEC=16 // size,
        BLOCK=lanes.THREADS.value * kernels.BYTES // size // len(read) // (1 if whole else 2),
    )


def new_state(like: Tensor, rows: int, columns: int) -> Tensor:
    """Streaming state, (rows, parts, fields); parts of a row are accumulated side by side and merged in order."""
    parts = parts_of(rows, columns, like.device)
    return like.new_empty(rows, parts, kernels.FIELDS.value, dtype=statistics_dtype(like))


def accumulate(
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    state: Tensor,
    options: Options,
    first: int,
    vocabulary: int,
    fresh: bool,
) -> None:
    """Merges columns [first, first + logits.size(-1)) of every row into `state`, or starts it afresh."""
    rows, parts, columns = state.size(0), state.size(1), logits.size(-1)
    if fresh and not logits.is_cuda:
        check_range(targets, vocabulary, options.ignore_index)
    if rows == 0:
        return
    wanted, read = set(options.outputs), read_by(logits, reference, options)
    with torch.cuda.device_of(logits):
        kernels.accumulate_kernel[rows, parts](
            *place(logits), *place(read[-1]), *place(targets, columns=False), state, int(fresh), inner_rows(targets),
            columns, part_columns(columns, parts), first, options.ignore_index, *transform(options),
            MOMENTS=not wanted.isdisjoint({"entropy", "variance"}), SQUARES="variance" in wanted,
            UNIFORM="uniform_ce" in wanted, PQ="kl_pq" in wanted, QP="kl_qp" in wanted,
            **compiled_for(options, read), maxnreg=kernels.REGISTERS, **LAUNCH,
        )  # fmt: skip


def finish(
    state: Tensor, targets: Tensor, has_reference: bool, options: Options, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Merges the parts of every state in order -> (stats (outputs, *targets.shape), saved (SAVED, *targets.shape))."""
    stats = state.new_empty(len(options.outputs), *targets.shape)
    saved = state.new_empty(SAVED, *targets.shape)
    rows, block, compared = targets.numel(), 128, has_reference and needs_reference(options)
    if rows:
        with torch.cuda.device_of(state):
            kernels.finish_kernel[(triton.cdiv(rows, block),)](
                state, state.size(1), *place(targets, columns=False), stats, saved, rows, inner_rows(targets),
                lines(options), int(compared), vocabulary, options.ignore_index, BLOCK=block, **LAUNCH,
            )  # fmt: skip
    return stats, saved


def topk(logits: Tensor, targets: Tensor, stats: Tensor, saved: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Fills the topk line of `stats`; returns the lanes and their renormalised beliefs, (rows, k) or (rows, 0)."""
    k, rows, columns = options.k if "topk" in options.outputs else 0, targets.numel(), logits.size(-1)
    index, belief = targets.new_empty(rows, k, dtype=torch.int32), stats.new_empty(rows, k)
    if k and rows:
        line = stats[options.outputs.index("topk")]
        with torch.cuda.device_of(logits):
            topk_kernels.topk_kernel[(rows,)](
                *place(logits), *place(targets, columns=False), line, saved, index, belief, k, rows,
                inner_rows(targets), columns, options.ignore_index, *transform(options),
                K=max(16, triton.next_power_of_2(k)), **compiled_for(options, [logits]), **LAUNCH,
            )  # fmt: skip
    return index, belief


def backward(
    grad_stats: Tensor,
    stats: Tensor,
    saved: Tensor,
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    index: Tensor | None,
    belief: Tensor | None,
    options: Options,
    grad_logits: Tensor,
    first: int = 0,
    vocabulary: int | None = None,
) -> Tensor:
    """Writes d(logits) into `grad_logits`, which may be `logits` itself, and returns it."""
    rows, columns = targets.numel(), logits.size(-1)
    if rows == 0:
        return grad_logits
    grad, stats, saved = (t.to(saved.dtype).contiguous() for t in (grad_stats, stats, saved))
    wanted, read = set(options.outputs), read_by(logits, reference, options)
    k = 0 if index is None else index.size(-1)
    parts = parts_of(rows, columns, logits.device)
    with torch.cuda.device_of(logits):
        token_gradient.backward_kernel[rows, parts](
            grad, stats, saved, rows, lines(options), *place(logits), *place(read[-1]), *place(targets, columns=False),
            index if k else saved, belief if k else saved, k, *place(grad_logits), inner_rows(targets), columns,
            part_columns(columns, parts), first, vocabulary or columns, options.ignore_index, *transform(options),
            LOGS=not wanted.isdisjoint({"entropy", "kl_pq"}), REFERENCE=len(read) == 2,
            K=max(16, triton.next_power_of_2(k)) if k else 0,
            **compiled_for(options, read, written=[grad_logits]), **LAUNCH,
        )  # fmt: skip
    return grad_logits


# ---- noise -----------------------------------------------------------------------------------------------------------


def perturb(pieces: Sequence[Piece], table: Tensor, seed: int, add: Noise | None, remove: Noise | None) -> None:
    """One pass over the table of chunks (tables.py) of pieces that are of one kind."""
    _, source, target = pieces[0].kind
    with torch.cuda.device_of(table):
        perturb_kernels.perturb_kernel[(len(table),)](
            table, signed(seed & 0xFFFFFFFF), signed(seed >> 32), *as_bits(remove), *as_bits(add),
            SOURCE=None if source is None else TYPES[source], TARGET=TYPES[target],
            WIDE=tl.float64 if target == torch.float64 else tl.float32, WORDS=target == torch.int32,
            REMOVE=remove is not None, ADD=add is not None, BLOCKS=perturb_kernels.BLOCKS, num_warps=4,
            enable_fp_fusion=False,  # noise is rounded before it is added; the polynomials say fma
        )  # fmt: skip


def as_bits(noise: Noise | None) -> tuple[int, int]:
    """The draw as int32, the scale's float64 as int64: the kernel's arguments never change their types."""
    draw, scale = noise or (0, 1.0)
    return signed(draw), struct.unpack("<q", struct.pack("<d", scale))[0]


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


# ---- inner products --------------------------------------------------------------------------------------------------


def segment_dot(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(3, pairs) float64 of flat pairs: <a, b>, <a, a>, <b, b>. A launch over the chunks for every pair of dtypes."""
    aligned: dict[tuple[torch.dtype, torch.dtype], bool] = {}  # whether all of them begin at whole 16 bytes
    for a, b in pairs:
        starts = a.data_ptr() % 16 == 0 and b.data_ptr() % 16 == 0
        aligned[a.dtype, b.dtype] = aligned.get((a.dtype, b.dtype), True) and starts
    table, partials, sums = tables.segment_table(pairs)
    segments, chunks, chunk = table.size(0), partials.size(0), tables.SEGMENT_CHUNK
    with torch.cuda.device_of(table):
        for (a_type, b_type), wide in aligned.items() if chunks else ():
            segment_kernels.chunk_kernel[chunks,](
                table, segments, chunk, partials, A=TYPES[a_type], B=TYPES[b_type], A_TYPE=tables.TYPES[a_type],
                B_TYPE=tables.TYPES[b_type], ALIGNED=wide, BLOCK=1024, num_warps=4,
            )  # fmt: skip
        segment_kernels.finish_kernel[segments,](table, segments, chunk, partials, sums, BLOCK=128, num_warps=4)
    return sums


def ghost_dot(u: OuterSum, v: OuterSum | None) -> Tensor:
    """(B,) float64 of OuterSums of one dtype; v None: of u with itself. Integers alone are u's."""
    GRAM, LOOKUP, MATCH = ghost_kernels.GRAM, ghost_kernels.LOOKUP, ghost_kernels.MATCH
    symmetric, u = v is None, packed(u)
    v = u if v is None else packed(v)
    left = GRAM if not u.one_hot else MATCH if v.one_hot else LOOKUP
    u_left, u_right = in_steps(u.left) if left is GRAM else u.left, in_steps(u.right)
    v_left, v_right = u_left, u_right
    if not symmetric:
        v_left, v_right = in_steps(v.left) if left is GRAM else v.left, in_steps(v.right)
    widest = u_right.dtype if v.one_hot else torch.promote_types(u_right.dtype, v_left.dtype)
    assert u.max_seqlen is not None
    assert v.max_seqlen is not None
    block, warps = tile_of(widest, max(u.max_seqlen, v.max_seqlen), left is MATCH)
    u_tiles, v_tiles = triton.cdiv(u.max_seqlen, block), triton.cdiv(v.max_seqlen, block)
    partials = u.right.new_zeros(u.num_sequences, u_tiles * v_tiles, dtype=torch.float64)
    with torch.cuda.device_of(partials):
        if partials.numel():
            ghost_kernels.tile_kernel[partials.numel(),](
                u_left, u_right, u.cu_seqlens, v_left, v_right, v.cu_seqlens, partials,
                0 if v.one_hot else v_left.size(-1), u_right.size(-1), u_tiles, v_tiles,
                LEFT=left.value, SYMMETRIC=symmetric, BLOCK=block, LEFT_STEP=step_of(v_left),
                RIGHT_STEP=step_of(v_right), num_warps=warps,
            )  # fmt: skip
    return partials.sum(1)


def tile_of(dtype: torch.dtype, longest: int, match: bool) -> tuple[int, int]:
    """(positions on a side, warps): what registers hold of two tiles, operands and the sum in float64, unspilled."""
    if dtype.itemsize == 2 and longest > 256 and not match and architecture() >= 90:
        return 128, 8
    return 64, 4 if dtype.itemsize == 2 else 8


def architecture() -> int:
    return 0 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch


def step_of(rows: Tensor) -> int:
    """Columns of a step."""
    return {2: 64, 4: 16, 8: 16}[rows.itemsize]


def in_steps(rows: Tensor) -> Tensor:
    """With columns of 0 up to whole steps, on 16 bytes."""
    if triton.knobs.runtime.interpret and rows.dtype == torch.bfloat16:
        rows = rows.float()  # its tl.dot would take the bits for integers
    more = -rows.size(-1) % step_of(rows)
    return torch.nn.functional.pad(rows, (0, more)) if more or rows.data_ptr() % 16 else rows
