"""Matrix products with nothing rounded to less than float32 on the way."""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 256  # columns that are widened at a time
FLOAT32_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads()  # torch >= 2.8, and only its GPU kernels
FLOAT32_SUMS = torch.__version__ >= "2.10"  # they also add to float32


def product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a @ b, or out += a @ b, with nothing rounded to less than out's dtype on the way.

    Where the GEMM adds up itself there is no memory beyond `out`; else there is that of STEP columns or rows.
    """
    if out.dtype == a.dtype == b.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif out.is_cuda and out.dtype == torch.float32 and a.dtype == b.dtype and FLOAT32_PRODUCTS:
        if not add:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        elif FLOAT32_SUMS:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            out += wide_product(a, b)
    elif add:  # half precision is exact in float32, and in TF32 where a GPU may use it
        for part in slices(a.size(1), STEP):
            out.addmm_(a[:, part].to(out.dtype), b[part].to(out.dtype))
    else:
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), out.dtype)
        if out.dtype == wide or b.numel() <= out.numel():  # whole sums: one over parts is rounded more often
            b = b.to(wide)
            for part in slices(out.size(0), STEP):
                out[part] = a[part].to(wide) @ b
        else:
            sums = out.new_zeros(out.shape, dtype=wide)
            product(a, b, sums, True)
            out.copy_(sums)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, two matrices or two batches of them, with nothing rounded to less than float32 on the way."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if a.is_cuda and a.dtype == b.dtype != wide and FLOAT32_PRODUCTS:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def slices(size: int, width: int) -> list[slice]:
    return [slice(i, min(i + width, size)) for i in range(0, size, max(1, width))]
