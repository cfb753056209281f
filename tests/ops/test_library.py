"""torch.library registration: opcheck, torch.compile, and what happens where the native module is missing."""

import doctest
import importlib
import subprocess
import sys

import pytest
import torch

import pyunlearn as pu
from pyunlearn.ops import OUTPUTS, OuterSum, backends, schemas
from pyunlearn.ops.contract import Options

from .rows import device_of, rows


def token_stats_arguments(backend, outputs, dtype):
    """Of an op and of its backward."""
    logits, reference, targets = (t.to(device_of(backend)) for t in rows("random", 2, 33))
    logits = logits.to(dtype)
    ref = reference.to(dtype) if "kl_pq" in outputs else None
    flat = Options(outputs, 0.7, 5.0, k=3).flat()
    forward = (logits, targets, ref, *flat, backend)
    stats, saved, index, belief = schemas.token_stats(*forward)
    return forward, (torch.randn_like(stats), stats, saved, logits, targets, ref, index, belief, *flat, backend)


@pytest.mark.parametrize("outputs", [("logp",), ("logp", "entropy", "kl_pq", "topk")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(outputs, dtype, fused):
    forward, backward = token_stats_arguments(fused, outputs, dtype)
    torch.library.opcheck(schemas.token_stats, (forward[0].clone().requires_grad_(), *forward[1:]))
    torch.library.opcheck(schemas.token_stats_backward, backward)


@pytest.mark.parametrize("name", ["cpu", "eager"])
def test_opcheck_of_every_op(name):
    """None is left out: they are looked up where torch keeps them."""
    u = OuterSum(torch.randn(3, 5, 7), torch.randn(3, 5, 4))
    v = OuterSum(torch.randint(0, 7, (3, 6)), torch.randn(3, 6, 4).bfloat16())
    packed = OuterSum(torch.randn(8, 7), torch.randn(8, 4), torch.tensor([0, 1, 6, 8]))
    forward, backward = token_stats_arguments("cpu", ("logp", "entropy", "topk"), torch.float32)
    pairs = [torch.randn(5), torch.randn(2, 3).bfloat16()], [torch.randn(5).half(), torch.randn(2, 3)]
    samples = {
        "token_stats": [forward],
        "token_stats_backward": [backward],
        "segment_dot": [(*pairs, name)],
        "ghost_dot": [(*u, *[None] * 4, name), (*packed, *v, name)],
    }
    registered = {op.split("::")[1] for op in torch._C._dispatch_get_all_op_names() if op.startswith("pyunlearn::")}
    assert samples.keys() == registered
    for op, arguments in samples.items():
        for sample in arguments:
            torch.library.opcheck(getattr(torch.ops.pyunlearn, op).default, sample)


def test_compile_fullgraph_equals_eager():
    logits, reference, targets = rows("random", 6, 100)
    logits, reference, targets = logits.view(2, 3, 100), reference.view(2, 3, 100), targets.view(2, 3)

    def loss(x):
        stats = pu.token_stats(x, targets, ("logp", "entropy", "kl_pq"), reference=reference)
        return (stats.logp.exp().detach() * stats.logp - stats.entropy + stats.kl_pq).sum()

    x = logits.requires_grad_()
    expected = torch.autograd.grad(loss(x), x)[0]
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)[0]
    assert torch.equal(got, expected)


def test_linear_compiles():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.tensor([0, 29, -100, 4, 5])

    def loss(h, w):
        return pu.linear_token_stats(h, w, targets, outputs="entropy").entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        torch.autograd.grad(compiled(hidden, weight), (hidden, weight)),
        torch.autograd.grad(loss(hidden, weight), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_missing_native_module_falls_back_and_says_so(monkeypatch):
    logits, _, targets = rows("random", 3, 20)
    expected = pu.token_stats(logits, targets, ("logp", "greedy"))
    monkeypatch.setattr(backends.native, "unavailable", "the native module did not load (gone); build it")
    got = pu.token_stats(logits, targets, ("logp", "greedy"))
    assert got.declined == {"fused kernels": "the native module did not load (gone); build it"}
    torch.testing.assert_close(got.logp, expected.logp)
    with pytest.raises(RuntimeError, match="backend='cpu' is not available: the native module did not load"):
        pu.token_stats(logits, targets, backend="cpu")


def test_a_module_of_other_sources_is_not_used():
    """Its bits of outputs would be others: in a process of its own, before anything is imported."""
    code = (
        "import sys, types; sys.modules['pyunlearn._C'] = types.SimpleNamespace(outputs=9, cuda_archs='');"
        "import pyunlearn, torch; stats = pyunlearn.token_stats(torch.zeros(1, 2), torch.zeros(1).long());"
        "print(stats.declined['fused kernels'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("the native module was built from other sources; build it again")


def test_backends_explain_themselves(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert backends.choose(None, cpu) == "cpu"
    with pytest.raises(ValueError, match=r"backend='cpu': needs one of .* for tensors on cuda"):
        backends.choose("cpu", cuda)
    with pytest.raises(ValueError, match="backend='cudnn': needs one of 'triton', 'cuda', 'cpu', 'eager' or None"):
        backends.choose("cudnn", cpu)
    monkeypatch.setattr(backends.native._C, "cuda_archs", "90a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device is visible"):
        backends.choose("cuda", cpu)
    monkeypatch.setattr(backends.native._C, "cuda_archs", "")
    monkeypatch.setattr(backends.native._C, "cuda_reason", "nvcc was not found at build time")
    with pytest.raises(RuntimeError, match="the CUDA part is not built: nvcc was not found"):
        backends.choose("cuda", cpu)


def test_triton_serves_cuda_tensors_and_says_why_it_cannot(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.choose(None, cuda) == backends.choose("triton", cuda) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose(None, cpu) == "cpu"
    assert backends.choose("triton", cpu) == "triton"  # by name alone
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"backend='triton': needs one of .* for tensors on cpu"):
        backends.choose("triton", cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"'triton' is not available: no CUDA device .*TRITON_INTERPRET=1"):
        backends.choose("triton", cuda)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed: pip install triton"):
        backends.choose("triton", cuda)
    assert backends.choose(None, cuda) == "eager"


def test_importing_pyunlearn_imports_no_triton():
    code = "import sys, pyunlearn; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["pyunlearn.ops.from_logits", "pyunlearn.ops.from_hidden"])
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(module), extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def test_outputs_are_documented():
    for name in OUTPUTS:
        assert f"\n{name} " in pu.ops.contract.__doc__
