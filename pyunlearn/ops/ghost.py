"""ghost_dot: inner products of per-sequence gradients sum_t left_t right_t' that are never formed.

    <sum_t l_t r_t', sum_s m_s q_s'> = sum_ts (l_t . m_s)(r_t . q_s)

A linear layer's gradient of sequence i is such a sum (left: gradient at its output, right: its input), an embedding's
too (left: one-hot rows, given by their integers). T^2 (p + d) products instead of T p d, so: for T (p + d) < p d.

Neither (T, T) matrix of inner products is ever whole: Triton makes a tile of both on the tensor cores, multiplies them
in registers and keeps one float64 number; the other backends go by blocks (backends/blocks.py). Where u is v only half
of the tiles are made. (Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .backends import choose, kernels
from .first_order import refuse_functions, refuse_tangents
from .outer_sum import OuterSum, check, check_fit, of_one_dtype


def ghost_dot(u: OuterSum, v: OuterSum | None = None, backend: str | None = None) -> Tensor:
    """<U_i, V_i> of every sequence i, U and V the matrices that u and v describe; without v the squared norms of U.

    Inner products of two positions are float32 sums of exact products (bfloat16, float16) or of float32's (Triton: each
    of three TF32 products), or float64; their product and all sums beyond are float64, in a fixed order: the same bits
    on every run. Memory: one block, or one number a tile, whatever the length.

    Args:
        u, v: see OuterSum; bfloat16, float16, float32 or float64, on one device, p and d and the number of sequences
            alike. u and v may have other positions, one may be one-hot and the other not.
        backend: None (the device's default), "triton" (fused tiles), "cuda", "cpu" or "eager" (blocks by BLAS; float32
            products then follow torch's matmul precision).

    Returns:
        (num_sequences,) float64 on right's device; not differentiable.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; the message names the argument. IndexError: on a CPU, an
        integer that is no row of the other's left (on a GPU: NaN). ValueError: on a CPU, sequences longer than
        max_seqlen (on a GPU: NaN). RuntimeError: a backend that is not available here, or torch.func's transforms.

    >>> a, b = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.tensor([[[1.0], [3.0]]])
    >>> ghost_dot(OuterSum(b, a)), (b[0].T @ a[0]).square().sum()
    (tensor([26.], dtype=torch.float64), tensor(26.))
    """
    check("u", u, u.right.device)
    if v is not None:
        check("v", v, u.right.device)
        check_fit(u, v)
    tensors = (u.left, u.right) if v is None else (u.left, u.right, v.left, v.right)
    refuse_tangents("ghost_dot", *tensors)
    refuse_functions("ghost_dot", *tensors)
    backend = choose(backend, u.right.device)
    other = (None,) * 4 if v is None else v
    run: Callable[..., Tensor] = torch.ops.pyunlearn.ghost_dot.default if torch.compiler.is_compiling() else dots_of
    return run(*u, *other, backend)


def dots_of(
    u_left: Tensor,
    u_right: Tensor,
    u_ends: Tensor | None,
    u_longest: int | None,
    v_left: Tensor | None,
    v_right: Tensor | None,
    v_ends: Tensor | None,
    v_longest: int | None,
    backend: str,
) -> Tensor:
    """(B,) float64; arguments were checked."""
    u = OuterSum(u_left.detach(), u_right.detach(), u_ends, u_longest)
    symmetric = v_left is None or v_right is None
    v = u if v_left is None or v_right is None else OuterSum(v_left.detach(), v_right.detach(), v_ends, v_longest)
    if v.one_hot and not u.one_hot:
        u, v = v, u
    with torch.autocast(u.right.device.type, enabled=False):
        u, v = of_one_dtype(u, v)
        return kernels(backend).ghost_dot(u, None if symmetric else v)
