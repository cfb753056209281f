"""Matrix products with nothing rounded to less than float32 on the way."""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 256  # columns that are widened at a time
FLOAT32_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads()  # torch >= 2.8, and only its GPU kernels


def product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a @ b, or out += a @ b with nothing rounded to less than out's dtype on the way."""
    if not add and a.dtype == b.dtype:
        torch.mm(a, b, out=out)
    elif not add and b.numel() <= out.numel():  # a is wider than b and out: rows of out at a time
        b = b.to(a.dtype)
        for part in slices(out.size(0), STEP):
            out[part] = a[part] @ b
    elif not add:
        wide = out.new_zeros(out.shape, dtype=a.dtype)
        product(a, b, wide, True)
        out.copy_(wide)
    elif out.dtype == a.dtype == b.dtype:
        out.addmm_(a, b)
    elif out.is_cuda and a.dtype == b.dtype and FLOAT32_PRODUCTS:
        out += wide_product(a, b)
    else:  # half precision is exact in float32, and in TF32 where a GPU may use it
        for part in slices(a.size(1), STEP):
            out.addmm_(a[:, part].to(out.dtype), b[part].to(out.dtype))


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, two matrices or two batches of them, with nothing rounded to less than float32 on the way."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if a.is_cuda and a.dtype == b.dtype != wide and FLOAT32_PRODUCTS:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def slices(size: int, width: int) -> list[slice]:
    return [slice(i, min(i + width, size)) for i in range(0, size, max(1, width))]
