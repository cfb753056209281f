"""segment_dot on every backend: exact rational arithmetic is the oracle where it can be, float64 elsewhere."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
from contextlib import nullcontext
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyunlearn as pu
from pyunlearn import _C
from pyunlearn.ops.backends import eager, tables

from .conftest import FUSED
from .rows import device_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON = ["triton"] if importlib.util.find_spec("triton") else []


@pytest.fixture(params=dict.fromkeys([*FUSED, *TRITON, "eager"]))
def backend(request):
    with FUSED.get(request.param, partial(nullcontext, request.param))() as name:
        yield name


def exact(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """<a, b>, <a, a>, <b, b> in rational arithmetic, rounded once."""
    x = [Fraction(v) for v in a.double().flatten().tolist()]
    y = [Fraction(v) for v in b.double().flatten().tolist()]
    products = ((x, y), (x, x), (y, y))
    return [float(sum((p * q for p, q in zip(u, v, strict=True)), Fraction(0))) for u, v in products]


def dots(pairs, backend):
    device = device_of(backend)
    result = pu.segment_dot([(a.to(device), b.to(device)) for a, b in pairs], backend=backend)
    assert all(part.dtype == torch.float64 and part.shape == (len(pairs),) for part in result)
    return torch.stack(tuple(result)).cpu()


def check(pairs, backend):
    """Within the error that any summation of n float64 terms may have, and far below it for exact products."""
    got = dots(pairs, backend)
    for i, (a, b) in enumerate(pairs):
        x, y = a.double().flatten(), b.double().flatten()
        bounds = [float((p * q).abs().sum()) * 1e-14 for p, q in ((x, y), (x, x), (y, y))]
        for value, true, bound in zip(got[:, i].tolist(), exact(a, b), bounds, strict=True):
            assert abs(value - true) <= bound, (i, a.dtype, b.dtype, value, true)


@pytest.mark.parametrize("a_type", DTYPES)
@pytest.mark.parametrize("b_type", DTYPES)
def test_every_pair_of_dtypes(a_type, b_type, backend):
    sizes = (1, 7, 8, 16, 33, 1000, 2055)
    check([(torch.randn(n).to(a_type), torch.randn(n).to(b_type)) for n in sizes], backend)


def test_many_pairs_of_mixed_dtypes_and_sizes_at_once(backend):
    pairs = [(torch.randn(37, 11).to(DTYPES[i % 4]), torch.randn(37, 11).to(DTYPES[i // 4 % 4])) for i in range(20)] + [
        (torch.randn(0, 3), torch.randn(0, 3)),
        (torch.tensor(2.0), torch.tensor(-3.0)),
    ]
    check(pairs, backend)


def test_chunks(backend):
    """Segments of several chunks of 65536, of a whole number of them, empty ones in between and at the ends; whole
    numbers, whose sums are exact."""
    sizes = (0, 65536, 65535, 0, 0, 65537, 131072, 200001, 0)
    pairs = [(torch.randint(-99, 100, (n,)).float(), torch.randint(-99, 100, (n,)).bfloat16()) for n in sizes]
    wide = [(a.long(), b.long()) for a, b in pairs]
    sums = [[int(x.dot(y)) for x, y in ((a, b), (a, a), (b, b))] for a, b in wide]
    assert dots(pairs, backend).t().tolist() == sums


def test_near_orthogonal_bfloat16(backend):
    """The dot is a ten-millionth of |a| |b| and exact: no digit may come from rounding (atol is 0)."""
    a = torch.randn(4096).bfloat16()
    b = torch.cat([a[2048:], -a[:2048]]).clone()  # exactly orthogonal
    b[0] = torch.nextafter(b[0], torch.tensor(10.0, dtype=torch.bfloat16))
    true = exact(a, b)
    assert 0 < abs(true[0]) < 1e-5 * true[1]
    got = dots([(a, b)], backend)[:, 0]
    assert abs(got[0].item() - true[0]) <= 1e-10 * abs(true[0])
    assert got[1:].tolist() == pytest.approx(true[1:], rel=1e-15)


def test_range_of_bfloat16(backend):
    """Products far outside of float32's range."""
    a = torch.tensor([1e-30, 3e38], dtype=torch.bfloat16)
    check([(a, a), (a[:1], a[:1])], backend)
    if backend != "triton":  # its interpreter takes bfloat16 denormals for 0
        denormal = torch.tensor([1e-40], dtype=torch.bfloat16)
        check([(denormal, denormal)], backend)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_shows(value, dtype, backend):
    a = torch.ones(100, dtype=dtype)
    a[77] = value
    dot, a_squared, b_squared = dots([(a, torch.ones(100, dtype=dtype)), (torch.ones(5), torch.ones(5))], backend)
    assert not dot[0].isfinite()
    assert not a_squared[0].isfinite()
    assert b_squared[0] == 100
    assert dot[1] == 5


def test_layouts(backend):
    """Transposed, strided, expanded and unaligned tensors; a and b need not lie the same way."""
    whole = torch.randn(40, 30)
    pairs = [
        (whole.T, torch.randn(40, 30).T),
        (whole.T, torch.randn(30, 40)),
        (whole[:, 3:17], torch.randn(40, 14)),
        (whole[::2], whole[1::2].bfloat16()),
        (torch.randn(30).expand(40, 30), whole),
        (whole.view(-1)[1:], whole.view(-1)[:-1]),
        (whole.bfloat16().view(-1)[3:400], whole.half().view(-1)[1:398]),
        (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(2, 3, 4, 5)),
    ]
    check(pairs, backend)


def test_shared_layout_costs_no_copy():
    a, b = torch.randn(8, 5).T, torch.randn(8, 5).T
    assert [t.data_ptr() for t in tables.flat(a, b)] == [a.data_ptr(), b.data_ptr()]


def test_same_bits_on_every_run(backend):
    pairs = [(torch.randn(n), torch.randn(n).bfloat16()) for n in (70000, 5, 140001)]
    assert torch.equal(dots(pairs, backend), dots(pairs, backend))


def test_same_bits_for_threads_and_instruction_sets():
    sizes = (3 * 65536 + 9, 100, 65537)  # of several chunks, of less than one
    pairs = [(torch.randn(n).to(a), torch.randn(n).to(b)) for n in sizes for a in DTYPES for b in DTYPES]
    threads = torch.get_num_threads()
    expected = dots(pairs, "cpu")
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(dots(pairs, "cpu"), expected)
        narrow = torch.tensor([torch.float64 not in (a.dtype, b.dtype) for a, b in pairs])
        for name in ("portable", "avx2"):
            with FUSED[f"cpu-{name}"]():
                assert torch.equal(dots(pairs, "cpu")[:, narrow], expected[:, narrow])
    finally:
        torch.set_num_threads(threads)
        _C.choose_instruction_set("auto")


@given(st.data())
@settings(max_examples=50)
def test_any_pairs(data):
    pairs = []
    for _ in range(data.draw(st.integers(1, 5))):
        n = data.draw(st.integers(0, 300))
        start = data.draw(st.integers(0, 3))
        a, b = (torch.randn(n + 3).to(data.draw(st.sampled_from(DTYPES)))[start : start + n] for _ in "ab")
        pairs.append((a * 10.0 ** data.draw(st.integers(-4, 4)), b))
    check(pairs, "cpu")


def test_eager_by_blocks():
    a, b = torch.randn(1000), torch.randn(1000)
    whole, parts = eager.segment_dot([(a, b)]), eager.segment_dot([(a, b)], block=77)
    torch.testing.assert_close(whole, parts, rtol=1e-13, atol=1e-13)


def test_cosine():
    a, zero = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert pu.segment_dot([(a, 2 * a), (a, -a), (a, zero)]).cosine.tolist() == pytest.approx([1, -1, 0])


def test_no_pairs():
    result = pu.segment_dot([])
    assert all(part.shape == (0,) and part.dtype == torch.float64 for part in result)


def test_no_gradient_flows():
    a = torch.randn(5, requires_grad=True)
    assert not pu.segment_dot([(a, a)]).dot.requires_grad


@pytest.mark.parametrize(
    ("pairs", "error", "match"),
    [
        ([(torch.ones(2), torch.ones(3))], ValueError, r"pairs\[0\]: needs two tensors of one shape, got \(2,\) and"),
        ([(torch.ones(2), torch.ones(2).long())], TypeError, r"pairs\[0\]: needs bfloat16.*got torch.int64"),
        ([(torch.ones(2),)], TypeError, r"pairs\[0\]: needs two tensors \(a, b\), got tuple"),
        (
            [(torch.ones(2), torch.ones(2)), (torch.ones(2), torch.ones(2, device="meta"))],
            ValueError,
            r"pairs\[1\]: needs cpu as pairs\[0\]\[0\], got meta",
        ),
        ([(torch.ones(2).to_sparse(), torch.ones(2))], TypeError, r"pairs\[0\]: needs dense tensors, got torch.sparse"),
    ],
)
def test_bad_input_is_named(pairs, error, match):
    with pytest.raises(error, match=match):
        pu.segment_dot(pairs)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='gpu'"):
        pu.segment_dot([(torch.ones(1), torch.ones(1))], backend="gpu")


def test_compiles():
    pairs = [(torch.randn(40), torch.randn(40))]
    compiled = torch.compile(lambda p: pu.segment_dot(p).dot, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pairs), pu.segment_dot(pairs).dot)


def test_docstring_example():
    result = doctest.testmod(importlib.import_module("pyunlearn.ops.segment_dot"), extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
