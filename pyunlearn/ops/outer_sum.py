"""OuterSum: a matrix for every sequence, the sum over its positions of left_t right_t'."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import DTYPES, check_layout


class OuterSum(NamedTuple):
    """For every sequence the (p, d) matrix sum_t left_t right_t' over its positions. Padded: (B, T, ...); padding that
    is 0 on one side counts nothing. Packed: (N, ...), sequence i has positions cu_seqlens[i] to cu_seqlens[i + 1]."""

    left: Tensor  # (B, T, p), or (B, T) integers, rows of a one-hot matrix; packed (N, p) or (N,)
    right: Tensor  # (B, T, d); packed (N, d)
    cu_seqlens: Tensor | None = None  # packed: (B + 1,) int32 or int64, from 0 to N, on right's device or the CPU
    max_seqlen: int | None = None  # packed: no sequence is longer; None: looked up, which waits for a GPU

    @property
    def num_sequences(self) -> int:
        return self.right.size(0) if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @property
    def one_hot(self) -> bool:
        return not self.left.is_floating_point()


def packed(x: OuterSum) -> OuterSum:
    """Padded or packed -> packed, every field there, rows contiguous, cu_seqlens int64 on the device."""
    right = x.right.reshape(-1, x.right.size(-1)).contiguous()
    left = x.left.reshape(right.size(0), *(() if x.one_hot else x.left.shape[-1:])).contiguous()
    if x.cu_seqlens is None:
        batch, length = x.right.shape[:2]
        return OuterSum(left, right, length * torch.arange(batch + 1, device=right.device), length)
    longest = x.max_seqlen
    if longest is None:
        longest = int(x.cu_seqlens.diff().max()) if x.num_sequences else 0
    return OuterSum(left, right, x.cu_seqlens.to(right.device, torch.int64).contiguous(), longest)


def of_one_dtype(u: OuterSum, v: OuterSum) -> tuple[OuterSum, OuterSum]:
    """Both lefts, where they meet, and both rights."""
    right = torch.promote_types(u.right.dtype, v.right.dtype)
    left = u.left.dtype if u.one_hot else torch.promote_types(u.left.dtype, v.left.dtype)
    u_left, v_left = (u.left, v.left) if u.one_hot else (u.left.to(left), v.left.to(left))
    return u._replace(left=u_left, right=u.right.to(right)), v._replace(left=v_left, right=v.right.to(right))


# ---- checks at the border: TypeError, ValueError or IndexError with the argument's name ------------------------------


def check(name: str, x: OuterSum, device: torch.device) -> None:
    packed = x.cu_seqlens is not None
    if x.right.dtype not in DTYPES:
        raise TypeError(f"{name}.right: needs bfloat16, float16, float32 or float64, got {x.right.dtype}")
    if x.left.dtype not in (*DTYPES, torch.int32, torch.int64):
        raise TypeError(f"{name}.left: needs floating point, int32 or int64, got {x.left.dtype}")
    check_layout(f"{name}.right", x.right)
    check_layout(f"{name}.left", x.left)
    if x.right.dim() != 3 - packed:
        raise ValueError(f"{name}.right: needs {'(N, d)' if packed else '(B, T, d)'}, got {tuple(x.right.shape)}")
    if x.left.shape[: 2 - packed] != x.right.shape[:-1] or x.left.dim() != x.right.dim() - x.one_hot:
        raise ValueError(
            f"{name}.left: needs the rows of {name}.right {tuple(x.right.shape)}, got {tuple(x.left.shape)}"
        )
    if x.left.device != device or x.right.device != device:
        raise ValueError(f"{name}: needs {device} as u.right, got {x.left.device} and {x.right.device}")
    if packed:
        check_packing(name, x, device)


def check_packing(name: str, x: OuterSum, device: torch.device) -> None:
    ends = x.cu_seqlens
    assert ends is not None
    if ends.dtype not in (torch.int32, torch.int64) or ends.dim() != 1 or ends.numel() < 1:
        raise ValueError(f"{name}.cu_seqlens: needs (B + 1,) int32 or int64, got {tuple(ends.shape)} {ends.dtype}")
    if ends.device not in (device, torch.device("cpu")):
        raise ValueError(f"{name}.cu_seqlens: needs {device} or the CPU, got {ends.device}")
    if ends.is_cuda or torch.compiler.is_compiling():
        return  # nothing waits for the device
    lengths = ends.diff()
    if ends[0] != 0 or ends[-1] != x.right.size(0) or bool((lengths < 0).any()):
        raise ValueError(f"{name}.cu_seqlens: needs to rise from 0 to {x.right.size(0)}, got {ends.tolist()[:8]}")
    if x.max_seqlen is not None and lengths.numel() and int(lengths.max()) > x.max_seqlen:
        raise ValueError(f"{name}.max_seqlen={x.max_seqlen}: needs that of the longest, {int(lengths.max())} positions")


def check_fit(u: OuterSum, v: OuterSum) -> None:
    if u.num_sequences != v.num_sequences:
        raise ValueError(f"v: needs the {u.num_sequences} sequences of u, got {v.num_sequences}")
    if u.right.size(-1) != v.right.size(-1):
        raise ValueError(f"v.right: needs d={u.right.size(-1)} as u.right, got d={v.right.size(-1)}")
    if not (u.one_hot or v.one_hot) and u.left.size(-1) != v.left.size(-1):
        raise ValueError(f"v.left: needs p={u.left.size(-1)} as u.left, got p={v.left.size(-1)}")
    if u.one_hot != v.one_hot and not u.right.is_cuda and not torch.compiler.is_compiling():
        ids, rows = (u.left, v.left.size(-1)) if u.one_hot else (v.left, u.left.size(-1))
        wrong = ids[(ids < 0) | (ids >= rows)]
        if wrong.numel():
            raise IndexError(f"left: needs integers below p={rows}, got {int(wrong[0])}")
