"""torch.library registration: opcheck, torch.compile, and what happens where the native module is missing."""

import doctest
import importlib
import subprocess
import sys

import pytest
import torch

import pyunlearn as pu
from pyunlearn.ops import OUTPUTS, backends
from pyunlearn.ops.contract import Options
from pyunlearn.ops.from_logits import _flat, _token_stats_backward_op, _token_stats_op

from .rows import device_of, rows


@pytest.mark.parametrize("outputs", [("logp",), ("logp", "entropy", "kl_pq", "topk")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(outputs, dtype, fused):
    logits, reference, targets = (t.to(device_of(fused)) for t in rows("random", 2, 33))
    logits = logits.to(dtype).requires_grad_()
    ref = reference.to(dtype) if "kl_pq" in outputs else None
    flat = _flat(Options(outputs, 0.7, 5.0, k=3))
    torch.library.opcheck(_token_stats_op, (logits, targets, ref, *flat, fused))
    out = _token_stats_op(logits.detach(), targets, ref, *flat, fused)
    stats, saved, index, belief = out
    args = (torch.randn_like(stats), stats, saved, logits.detach(), targets, ref, index, belief, *flat, fused)
    torch.library.opcheck(_token_stats_backward_op, args)


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
    torch.testing.assert_close(got.logp, expected.logp)
    with pytest.raises(RuntimeError, match="backend='cpu' is not available: the native module did not load"):
        pu.token_stats(logits, targets, backend="cpu")


def test_backends_explain_themselves(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert backends.choose(None, cpu) == "cpu"
    with pytest.raises(ValueError, match="cannot take tensors on cuda"):
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
    with pytest.raises(ValueError, match="backend='triton': cannot take tensors on cpu"):
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
