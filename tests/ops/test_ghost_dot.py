"""ghost_dot on every backend: the matrices themselves, in float64, are the oracle."""

from __future__ import annotations

import doctest
import importlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyunlearn as pu
from pyunlearn.ops import OuterSum, ghost_dot
from pyunlearn.ops.backends import blocks, kernels
from pyunlearn.ops.ghost import dots_of

from .rows import device_of, interpreted

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
P, D = 37, 20
NAN = float("nan")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several blocks and tiles a sequence, also of a few positions; of one size, so that padding is all there is.

    Patched, for Triton's interpreter takes minutes over sequences of several tiles of 64 x 64 in all these tests;
    test_blocks_and_tiles_as_they_are takes some.
    """
    monkeypatch.setattr(blocks, "BLOCK", 16)
    monkeypatch.setattr(kernels("triton"), "tile_of", lambda dtype, longest, match: (16, 4))


def rows(length, dtype, one_hot=False, batch=3):
    left = torch.randint(0, P, (batch, length)) if one_hot else torch.randn(batch, length, P).to(dtype)
    return OuterSum(left, torch.randn(batch, length, D).to(dtype))


def pack(x, lengths):
    """The first positions of every sequence, one after another."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    left, right = (torch.cat([part[i, :n] for i, n in enumerate(lengths)]) for part in x[:2])
    return OuterSum(left, right, ends)


def matrices(x):
    """(B, p, d) float64"""
    left = torch.nn.functional.one_hot(x.left.long(), P) if x.one_hot else x.left
    left, right = left.double(), x.right.double()
    if x.cu_seqlens is None:
        return left.mT @ right
    return torch.stack([left[a:b].T @ right[a:b] for a, b in pairwise(x.cu_seqlens.tolist())])


def to(x, device):
    return None if x is None else OuterSum(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in x))


def on(backend, u, v=None):
    device = device_of(backend)
    dots = ghost_dot(to(u, device), to(v, device), backend=backend)
    assert dots.dtype == torch.float64
    return dots.cpu()


def check(backend, u, v=None):
    """|ours - fp64| <= |eager - fp64| + tol |U| |V|; tol: float32 inner products of 64 products at most."""
    one, two = matrices(u), matrices(u if v is None else v)
    true = (one * two).sum((1, 2))
    # what inner products are made of, without cancellation
    size = (matrices(absolute(u)) * matrices(absolute(u if v is None else v))).sum((1, 2))
    double = u.right.dtype == torch.float64
    theirs = (on("eager", u, v) - true).abs()
    mine = (on(backend, u, v) - true).abs()
    assert bool((mine <= theirs + (1e-15 if double else 5e-7) * size).all()), (mine, theirs, size)


def absolute(x):
    return x._replace(left=x.left.abs(), right=x.right.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", ["rows", "integers", "rows, rows", "integers, rows", "rows, integers"])
def test_against_the_matrices(dtype, kinds, backend):
    first, *second = (kind == "integers" for kind in kinds.split(", "))
    u = rows(33, dtype, first)
    check(backend, u, rows(21, dtype, *second) if second else None)


@pytest.mark.parametrize("one_hot", [False, True])
def test_packed_sequences(one_hot, backend):
    """Empty ones, of one position, of a whole tile, and long ones; against another packing and against padding."""
    u, v = rows(40, torch.float32, one_hot, batch=5), rows(40, torch.float32, batch=5)
    one, other = pack(u, [0, 40, 16, 1, 17]), pack(v, [3, 0, 33, 1, 16])
    check(backend, one)
    check(backend, one, other)
    check(backend, one._replace(max_seqlen=64, cu_seqlens=one.cu_seqlens.int()), v)
    assert on(backend, one)[0] == 0


def test_lefts_and_rights_of_several_dtypes(backend):
    u, v = rows(20, torch.bfloat16), rows(20, torch.float32)
    check(backend, u._replace(right=u.right.float()), v)
    check(backend, u, v._replace(right=v.right.half()))


@pytest.mark.parametrize("backend", ["cpu", "eager", "triton"])
@pytest.mark.parametrize("large", [1.0, 1e15])
def test_adversarial_rows(backend, large):
    """Offsets that make both inner products large while their sums nearly cancel; rows of every size."""
    left, right = torch.randn(1, 48, P) + 30, torch.randn(1, 48, D) + 300
    left = left * torch.tensor([1.0, -1.0]).repeat(24)[:, None]
    check(backend, OuterSum(left * large, right / large))
    check(backend, OuterSum(left, right * torch.logspace(-12, 3, 48)[:, None]))


def test_orthogonal_gradients_are_orthogonal(backend):
    """Small integers: everything is exact."""
    u = OuterSum(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[3.0, 1.0], [1.0, -1.0]]]))
    v = OuterSum(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, -1.0], [-2.0, 0.0]]]))
    assert on(backend, u, v).tolist() == [0.0]
    assert on(backend, u).tolist() == [18.0]


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_not_finite_shows_in_its_sequence_alone(value, backend):
    u = rows(20, torch.float32)
    u.right[1, 17, 3] = value
    assert on(backend, u).isfinite().tolist() == [True, False, True]
    packed = pack(u, [20, 20, 20])
    assert on(backend, packed).isfinite().tolist() == [True, False, True]


def test_same_bits_on_every_run(backend):
    u, v = rows(50, torch.float32), rows(30, torch.bfloat16, True)
    assert torch.equal(on(backend, u, v), on(backend, u, v))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing(shape, backend):
    u = OuterSum(torch.randn(*shape, P), torch.randn(*shape, D))
    assert on(backend, u).tolist() == [0.0] * shape[0]
    assert on(backend, OuterSum(torch.randn(0, P), torch.randn(0, D), torch.tensor([0]))).shape == (0,)


def test_strided_and_shared_inputs(backend):
    whole = torch.randn(2, 18, 2 * P)
    u = OuterSum(whole[..., ::2], torch.randn(18, D).expand(2, 18, D))
    check(backend, u)
    check(backend, OuterSum(whole[:, 1:, 1 : P + 1], torch.randn(D, 17, 2).transpose(0, 2)))


def test_blocks_and_tiles_as_they_are(backend, monkeypatch):
    """One position less than two of them, two, and one more."""
    monkeypatch.undo()
    side = 64 if interpreted(backend) else 256
    lengths = (2 * side + 1,) if interpreted(backend) else (2 * side - 1, 2 * side, 2 * side + 1)
    for length in lengths:
        u, v = rows(length, torch.float32, batch=2), rows(side + 1, torch.float32, batch=2)
        check(backend, u)
        check(backend, pack(u, [length, 1]), v)


def test_a_block_and_no_more_is_held(monkeypatch):
    """(T, T) of 16 MB is never there: the profiler's peak stays below a quarter of it."""
    from benchmarks.measure import peak_bytes

    monkeypatch.undo()
    u = OuterSum(torch.randn(1, 2048, 8), torch.randn(1, 2048, 8))
    assert peak_bytes(lambda: ghost_dot(u, backend="cpu"), "cpu") < 4 * 1024 * 1024


@given(st.data())
@settings(max_examples=40)
def test_any_shapes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, dtype = draw(0, 4), data.draw(st.sampled_from(DTYPES))
    u, v = (rows(draw(0, 40), dtype, data.draw(st.booleans()), batch) for _ in "uv")
    if data.draw(st.booleans()):
        u = pack(u, [draw(0, u.right.size(1)) for _ in range(batch)]) if batch else u
    check("cpu", u, data.draw(st.sampled_from([None, v])))


def test_integers_out_of_range(backend):
    u, v = rows(5, torch.float32, True), rows(5, torch.float32)
    u.left[1, 2] = P
    if device_of(backend) == "cpu":
        with pytest.raises(IndexError, match="left: needs integers below p=37, got 37"):
            ghost_dot(v, u, backend=backend)
    u, v = to(u, device_of(backend)), to(v, device_of(backend))  # as on a GPU, where no check waits for it
    assert dots_of(*u, *v, backend).isnan().tolist() == [False, True, False]


def test_max_seqlen_that_is_too_small():
    u = pack(rows(20, torch.float32), [4, 20, 16])._replace(max_seqlen=16)
    with pytest.raises(ValueError, match=r"u.max_seqlen=16: needs that of the longest, 20"):
        ghost_dot(u)
    u = to(u, device_of("triton"))
    assert dots_of(*u, *[None] * 4, "triton").isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("u", "v", "error", "match"),
    [
        (OuterSum(torch.ones(2, 3, 4), torch.ones(2, 3)), None, ValueError, r"u.right: needs \(B, T, d\), got"),
        (OuterSum(torch.ones(2, 4, 4), torch.ones(2, 3, 4)), None, ValueError,
         r"u.left: needs the rows .* got \(2, 4, 4\)"),
        (OuterSum(torch.ones(2, 3), torch.ones(2, 3, 4)), None, ValueError, r"u.left: needs the rows .* got \(2, 3\)"),
        (OuterSum(torch.ones(2, 3).short(), torch.ones(2, 3, 4)), None, TypeError, "u.left: needs .* got torch.int16"),
        (rows(3, torch.float32), rows(3, torch.float32, batch=2), ValueError, "v: needs the 3 sequences of u, got 2"),
        (OuterSum(torch.ones(1, 1, 2), torch.ones(1, 1, 3)), OuterSum(torch.ones(1, 1, 2), torch.ones(1, 1, 4)),
         ValueError, "v.right: needs d=3 as u.right, got d=4"),
        (OuterSum(torch.ones(1, 1, 2), torch.ones(1, 1, 3)), OuterSum(torch.ones(1, 1, 4), torch.ones(1, 1, 3)),
         ValueError, "v.left: needs p=2 as u.left, got p=4"),
        (OuterSum(torch.ones(4, 2), torch.ones(4, 3), torch.tensor([0, 5])), None, ValueError, "rise from 0 to 4"),
        (OuterSum(torch.ones(4, 2), torch.ones(4, 3), torch.ones(2)), None, ValueError, r"u.cu_seqlens: needs \(B"),
        (OuterSum(torch.ones(1, 1, 2), torch.ones(1, 1, 3)),
         OuterSum(torch.ones(1, 1, 2), torch.ones(1, 1, 3, device="meta")), ValueError,
         "v: needs cpu as u.right, got cpu and meta"),
    ],
)  # fmt: skip
def test_bad_input_is_named(u, v, error, match):
    with pytest.raises(error, match=match):
        ghost_dot(u, v)


def test_compiles():
    u, v = rows(5, torch.float32), rows(5, torch.float32)
    compiled = torch.compile(lambda a, b: ghost_dot(OuterSum(*a), OuterSum(*b)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(u[:2], v[:2]), ghost_dot(u, v))


def test_docstring_example():
    result = doctest.testmod(importlib.import_module("pyunlearn.ops.ghost"), extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
    assert pu.ghost_dot is ghost_dot
