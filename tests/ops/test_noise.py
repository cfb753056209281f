import doctest
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import pyunlearn as pu
from pyunlearn import _C
from pyunlearn.ops import noise
from pyunlearn.ops.backends import eager, kernels
from pyunlearn.ops.noise import Noise, Piece, Plan, fill, parameter_id

from .conftest import FUSED
from .rows import device_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
INSTRUCTION_SETS = ("auto", "avx2", "portable")
# (source, target) dtypes the kernels serve
PAIRS = [
    *((dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    *((dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16)),
]
KNOWN_ANSWERS = [  # counter, key, words: philox4x32, 10 rounds
    ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**32 - 1,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.fixture(params=[*INSTRUCTION_SETS, "eager"])
def backend(request):
    """Every code path: the instruction sets this CPU has, and the eager twin."""
    if request.param == "eager":
        yield "eager"
        return
    try:
        _C.choose_instruction_set(request.param)
        yield "cpu"
    except ValueError:
        pytest.skip(f"no {request.param} on this CPU")
    finally:
        _C.choose_instruction_set("auto")


def philox(counter, key):
    """The definition, in whole numbers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p, q = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = q >> 32 ^ c1 ^ k0, q & 0xFFFFFFFF, p >> 32 ^ c3 ^ k1, p & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def words_of(numel, seed, draw, parameter, offset, backend=None):
    out = torch.empty(numel, dtype=torch.int32)
    fill(out, seed, draw, parameter, offset, backend)
    return [word & 0xFFFFFFFF for word in out.tolist()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = [int(word, 16) for word in expected.split()]
    assert list(philox(counter, key)) == words
    assert _C.philox(counter, key) == words
    assert [int(word) for word in eager.philox([torch.tensor(word) for word in counter], key)] == words


@settings(max_examples=60)
@given(
    numel=st.integers(1, 150),
    offset=st.integers(0, 2**40) | st.integers(2**34 - 100, 2**34 + 100) | st.integers(0, 2**62 - 150),
    seed=st.integers(0, 2**64 - 1),
    draw=st.integers(0, 2**32 - 1),
    parameter=st.integers(0, 2**32 - 1),
)
def test_words_are_philox(numel, offset, seed, draw, parameter):
    """Every backend's integers, for any counter: element i gets word i % 4 of block i // 4."""
    expected = []
    for i in range(offset, offset + numel):
        block = i // 4
        expected.append(philox((block & 0xFFFFFFFF, block >> 32, draw, parameter), seed)[i % 4])
    for name in INSTRUCTION_SETS:
        try:
            _C.choose_instruction_set(name)
            assert words_of(numel, seed, draw, parameter, offset, "cpu") == expected
        except ValueError:
            continue
        finally:
            _C.choose_instruction_set("auto")
    assert words_of(numel, seed, draw, parameter, offset, "eager") == expected


def test_normals_are_box_muller(backend):
    z = pu.gaussian_noise(8, seed=3, draw=2, name="layer.weight", offset=4, backend=backend).tolist()
    for block in (1, 2):
        words = philox((block, 0, 2, parameter_id("layer.weight")), 3)
        for i, (x, y) in enumerate((words[:2], words[2:])):
            radius, angle = math.sqrt(-2 * math.log((x + 0.5) / 2**32)), 2 * math.pi * (y + 0.5) / 2**32
            at = 4 * (block - 1) + 2 * i
            assert z[at : at + 2] == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], abs=1e-6)


def test_error_against_float64(backend):
    """1e-6 over four million normals, where u is within 1e-6 of 1 too."""
    n = 1 << (22 if backend == "cpu" else 18)
    oracle = pu.gaussian_noise(n, seed=11, name="w", dtype=torch.float64)
    error = (pu.gaussian_noise(n, seed=11, name="w", backend=backend).double() - oracle).abs()
    assert float(error.max()) < 1e-6
    assert float(oracle.abs().max()) < noise.LARGEST < 6.77


def test_instruction_sets_agree_bitwise():
    results = []
    for name in INSTRUCTION_SETS:
        try:
            _C.choose_instruction_set(name)
            results.append(pu.gaussian_noise(200_003, seed=5, draw=9, name="w", offset=2**33 + 1))
        except ValueError:
            continue
        finally:
            _C.choose_instruction_set("auto")
    assert len(results) >= 2
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("numel", "offset"), [(1, 0), (5, 3), (1000, 0), (4099, 2**34 - 5), (40001, 2**34 - 2000), (4096, 2**62 - 4096)]
)
@pytest.mark.parametrize(("name", "tolerance"), [("cuda", 2e-5), ("triton", 1e-6)])
def test_gpu_kernels(name, tolerance, numel, offset):
    """The same integers as everywhere, normals to `tolerance`; on the GPU, or as they run on the CPU."""
    seed, draw = 2**63 + 12345, 4000000000
    eager = torch.empty(numel, dtype=torch.int32)
    fill(eager, seed, draw, parameter_id("w"), offset, "eager")
    expected = pu.gaussian_noise(numel, seed, draw, "w", offset, dtype=torch.float64)
    with FUSED[name]() as backend:
        words = torch.empty(numel, dtype=torch.int32, device=device_of(backend))
        fill(words, seed, draw, parameter_id("w"), offset, backend)
        z = torch.empty(numel, device=words.device)
        fill(z, seed, draw, parameter_id("w"), offset, backend)
    assert torch.equal(words.cpu(), eager)
    assert float((z.cpu().double() - expected).abs().max()) < tolerance


@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_change_nothing(backend, threads):
    """Of more than a chunk, 2^15 elements (2^20 of the eager twin), and in pieces of any length."""
    n = (1 << 20) + 1001 if backend == "eager" else (1 << 16) + 1001
    whole = pu.gaussian_noise(n, seed=1, name="w", offset=2**34 - 1500, backend=backend)
    before, parts, at = torch.get_num_threads(), [], 0
    try:
        torch.set_num_threads(threads)
        for length in (0, 1, 7, 64, 1000, 430, 1 << 15, n):
            length = min(length, n - at)
            parts.append(pu.gaussian_noise(length, seed=1, name="w", offset=2**34 - 1500 + at, backend=backend))
            at += length
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_float32(dtype):
    assert torch.equal(pu.gaussian_noise(999, dtype=dtype), pu.gaussian_noise(999).to(dtype))


# ---- what noise has to be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "draw", "name"), [(0, 0, ""), (1, 7, "lm_head.weight"), (2**64 - 1, 2**32 - 1, "w")])
def test_is_standard_normal(seed, draw, name):
    n = 1 << 20
    z = pu.gaussian_noise(n, seed=seed, draw=draw, name=name).double().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-4
    for lane in range(4):
        assert stats.kstest(z[lane::4], "norm").pvalue > 1e-4
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (5, 0), (6, 15)):
        spread = math.sqrt((math.prod(range(2 * power - 1, 0, -2)) - moment**2) / n)
        assert abs(np.mean(z**power) - moment) < 5 * spread, power
    for lag in (1, 2, 3, 4, 64, 4096):
        assert abs(np.mean(z[lag:] * z[:-lag])) < 5 / math.sqrt(n - lag), lag
        assert abs(np.mean(z[lag:] ** 2 * z[:-lag] ** 2) - 1) < 5 * math.sqrt(8 / (n - lag)), lag


def test_streams_are_independent():
    """Across seeds, draws, names and distant offsets; none is a copy or the negative of another."""
    n = 1 << 18
    far = dict(offset=2**34), dict(offset=4 * n)
    seeds = dict(seed=1), dict(seed=1 << 32), dict(seed=2**64 - 1)
    others = dict(draw=1), dict(draw=2**32 - 1), dict(name="a"), dict(name="b")
    streams = [pu.gaussian_noise(n, **options).double() for options in (dict(), *seeds, *others, *far)]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert float(correlation.abs().max()) < 5 / math.sqrt(n)
    squares = torch.corrcoef(torch.stack(streams).square()) - torch.eye(len(streams))
    assert float(squares.abs().max()) < 5 / math.sqrt(n)


def test_global_generators_are_untouched():
    torch.manual_seed(4)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for backend in ("cpu", "eager"):
        pu.gaussian_noise(1000, seed=0, backend=backend)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


# ---- kernels over tables of chunks -----------------------------------------------------------------------------------


def check_pairs(run, device="cpu"):
    """`run(pieces, seed, add, remove)` against sums of `gaussian_noise`, on tensors at odd addresses and elements."""
    g = torch.Generator(device).manual_seed(0)
    for source, target in PAIRS:
        for first, skip, n in ((0, 0, 4096), (3, 0, 1000), (8, 1, 777), (2**34 - 2, 5, 64), (1, 0, 1), (6, 3, 3)):
            w = torch.randn(n + skip, generator=g, device=device).to(source)[skip:]
            z = pu.gaussian_noise(n, seed=9, draw=4, name="p", offset=first, device=device)
            wide = torch.promote_types(source, torch.float32)
            noisy = w.to(wide) + (z.to(wide) * -0.01)
            for add, expected in ((Noise(4, -0.01), noisy), (None, w.to(wide))):
                out = torch.full((n + skip + 8,), 7.0, dtype=target, device=device)
                run([Piece(w, out[skip : skip + n], parameter_id("p"), torch.tensor([first]), n)], 9, add, None)
                tolerance = 0 if add is None else 2e-7 if wide == target else torch.finfo(target).eps * 4
                torch.testing.assert_close(out[skip : skip + n], expected.to(target), atol=tolerance, rtol=tolerance)
                assert (out[:skip] == 7).all()
                assert (out[skip + n :] == 7).all()
    # remove and add in one pass, in place; bfloat16 numbers come back
    w = torch.randn(5000, generator=g, device=device).bfloat16().float()
    p = w.clone()
    piece = Piece(p, p, parameter_id("p"), torch.tensor([5]), 5000)
    run([piece], 9, Noise(0, 1e-2), None)
    for draw in range(1, 4):
        run([piece], 9, Noise(draw, 1e-2), Noise(draw - 1, 1e-2))
        z = pu.gaussian_noise(5000, seed=9, draw=draw, name="p", offset=5, device=device)
        torch.testing.assert_close(p, w + 1e-2 * z, atol=2e-7, rtol=2e-7)
    run([piece], 9, None, Noise(3, 1e-2))
    assert torch.equal(p, w)


def test_every_pair_of_dtypes(backend):
    check_pairs(lambda pieces, seed, add, remove: Plan(pieces, backend).run(seed, add, remove))


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_every_pair_of_dtypes_by_gpu_kernels(name):
    """On the GPU, or as they run on the CPU."""
    with FUSED[name]() as backend:
        check_pairs(lambda pieces, seed, add, remove: Plan(pieces, backend).run(seed, add, remove), device_of(backend))


def test_sums_are_rounded_apart_from_the_noise():
    """w + scale * z has the bits of float32 arithmetic in two steps, whatever the instruction set."""
    w = torch.randn(3333)
    out = torch.empty_like(w)
    Plan([Piece(w, out, parameter_id("p"), torch.tensor([0]), 3333)], "cpu").run(1, Noise(2, 1e-3))
    assert torch.equal(out, w + pu.gaussian_noise(3333, seed=1, draw=2, name="p") * 1e-3)


def test_pieces_of_many_parameters_and_runs(backend):
    """One plan, several parameters and runs; the same elements get the same noise as in one run."""
    whole = pu.gaussian_noise(100, seed=2, name="a", backend=backend)
    a, b = torch.empty(30), torch.empty(40)
    starts = torch.tensor([50, 3, 81])
    pieces = [
        Piece(None, a, parameter_id("a"), starts, 10),
        Piece(None, b, parameter_id("b"), torch.tensor([7]), 40),
        Piece(None, torch.empty(0), parameter_id("c"), torch.tensor([0]), 0),
    ]
    Plan(pieces, backend).run(2, add=Noise(0, 1.0))
    assert torch.equal(a, torch.cat([whole[s : s + 10] for s in starts.tolist()]))
    assert torch.equal(b, pu.gaussian_noise(47, seed=2, name="b", backend=backend)[7:])


def test_unserved_dtypes_are_refused():
    table = torch.zeros(0, 5, dtype=torch.int64)
    for source, target, remove in (
        (torch.float32, torch.bfloat16, None),
        (None, torch.bfloat16, None),
        (torch.int64, torch.int64, None),
        (torch.bfloat16, torch.float32, (0, 1.0)),
    ):
        weights = None if source is None else torch.empty(0, dtype=source)
        piece = Piece(weights, torch.empty(0, dtype=target), 0, torch.tensor([0]), 0)
        with pytest.raises(ValueError, match="perturb: "):
            kernels("cpu").perturb([piece], table, 0, None, remove)


# ---- Triton ----------------------------------------------------------------------------------------------------------

# The kernel for float32 in place, compiled for a GPU that need not be there.
COMPILED = """
import re, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pyunlearn.triton_kernels import perturb

constants = dict(SOURCE=tl.float32, TARGET=tl.float32, WIDE=tl.float32, WORDS=False, REMOVE=True, ADD=True)
constants["BLOCKS"] = perturb.BLOCKS
types = dict(table="*i64", remove_scale="i64", add_scale="i64") | {name: "constexpr" for name in constants}
names = perturb.perturb_kernel.arg_names
source = ASTSource(
    perturb.perturb_kernel,
    {name: types.get(name, "i32") for name in names},
    {(names.index(name),): value for name, value in constants.items()},
    {(0,): [["tt.divisibility", 16]]},
)
options = dict(num_warps=4, enable_fp_fusion=False)
for capability in (80, 90, 100):
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    assert re.search(r"ld\\.global(\\.\\w+)*\\.v4", ptx), capability
    assert re.search(r"st\\.global(\\.\\w+)*\\.v4", ptx), capability
    assert "local" not in re.sub(r"//.*", "", ptx), capability
print("right")
"""


def test_triton_as_compiled(tmp_path):
    """16-byte accesses and no local memory; in a process of its own, where triton does not interpret."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    (tmp_path / "script.py").write_text(COMPILED)
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout.strip() == "right", done.stderr[-3000:]


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(numel=-1), "numel=-1"),
        (dict(seed=-1), "seed=-1: needs 0 <= seed < 2\\^64"),
        (dict(seed=2**64), "seed=18446744073709551616"),
        (dict(draw=-1), "draw=-1"),
        (dict(draw=2**32), "draw=4294967296: needs 0 <= draw < 2\\^32"),
        (dict(offset=-4), "offset=-4"),
        (dict(offset=2**62), "offset=4611686018427387904"),
        (dict(backend="gpu"), "backend='gpu'"),
    ],
)
def test_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        pu.gaussian_noise(**{"numel": 4, **options})


def test_wrong_types():
    with pytest.raises(TypeError, match="dtype: needs bfloat16"):
        pu.gaussian_noise(4, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"seed=1\.5: needs a whole number, got float"):
        pu.gaussian_noise(4, seed=1.5)
    with pytest.raises(TypeError, match="draw=True"):
        pu.gaussian_noise(4, draw=True)


def test_nothing_is_nothing():
    assert pu.gaussian_noise(0).shape == (0,)
    assert pu.gaussian_noise(0, dtype=torch.float64, backend="eager").shape == (0,)


def test_docstring_example():
    result = doctest.testmod(noise, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
