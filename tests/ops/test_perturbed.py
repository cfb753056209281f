"""`perturbed`: what is seen inside, and what is there again after it."""

from __future__ import annotations

import doctest
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyunlearn as pu
from benchmarks.kernels.cases import fused
from pyunlearn.ops import noise, parameters, perturbation

from .perturbed_model import EVERY, IDS, IN_MEMORY, assert_restored, bits, make, perturbed_weight, state

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, params=DEVICES)
def device(request):
    """Where models and tensors are made."""
    with nullcontext() if request.param == "cpu" else torch.device(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("mode", "dtype"), [(mode, dtype) for mode in IN_MEMORY for dtype in (DTYPES[:1] if mode == "snap" else DTYPES)]
)
def test_weights_are_w_plus_sigma_z(mode, dtype):
    """By element, name and draw; tied ones once, frozen ones too, strided ones in logical order, buffers never."""
    model = make(dtype, bfloat16_numbers=mode == "snap")
    before, clean = state(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    with pu.perturbed(model, sigma=1e-2, seed=3, draw=5, mode=mode) as it:
        assert it.mode == mode
        for draw, sign in ((5, 1), (6, 1), (6, -1), (2**32 - 1, 1), (5, 1)):
            it.to(draw, sign)
            for name, p in model.named_parameters():
                expected = perturbed_weight(name, clean[name], 1e-2, 3, draw, sign)
                assert p.dtype == (dtype if mode == "copy" else expected.dtype)
                assert torch.equal(p, expected.to(p.dtype)), (name, draw, sign)
        assert model.head.weight is model.embedding.weight
        it.to(None)
        for name, p in model.named_parameters():
            assert torch.equal(p, clean[name].to(p.dtype))
        assert torch.equal(bits(model.offset), before["offset"][0])
    assert_restored(model, before)


def test_eager_backend_agrees(device):
    model = make(bfloat16_numbers=True)
    for mode in EVERY:
        outputs = []
        for backend in (*fused(device), "eager"):
            with torch.no_grad(), pu.perturbed(model, sigma=1e-2, mode=mode, backend=backend) as it:
                it.to(3)
                outputs.append(model(IDS))
        assert len(outputs) >= 2
        for output in outputs:
            torch.testing.assert_close(output, outputs[-1], atol=2e-6, rtol=2e-6)


def test_wrappers_change_nothing(device):
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("DataParallel takes no model on the CPU where there is a GPU")
    model = make()
    with torch.no_grad(), pu.perturbed(model, sigma=1e-2):
        expected = model(IDS)
    for wrapped in (
        torch.compile(model, backend="eager"),
        nn.DataParallel(model),
        nn.DataParallel(torch.compile(model)),
    ):
        with torch.no_grad(), pu.perturbed(wrapped, sigma=1e-2) as it:
            assert [weight.name for weight in it.weights] == [name for name, _ in model.named_parameters()]
            assert torch.equal(model(IDS), expected)


def test_memory_shared_by_two_parameters_is_perturbed_once():
    """Tied by their data, not as one object."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight.data = model["a"].weight.data
    before = state(model)
    for mode in ("overlay", "copy"):
        with pu.perturbed(model, sigma=0.1, mode=mode):
            assert model["a"].weight.data_ptr() == model["b"].weight.data_ptr()
            assert not torch.equal(bits(model["b"].weight), before["b.weight"][0])
        assert_restored(model, before)


def test_names_choose_parameters():
    model = make()
    clean = {name: p.detach().clone() for name, p in model.named_parameters()}
    for asked, moved in (
        (["head.weight", "position"], {"embedding.weight", "position"}),  # the tied one has its first name
        ([name for name, p in model.named_parameters() if p.requires_grad], None),
        ([], set()),
    ):
        moved = set(asked) if moved is None else moved
        with pu.perturbed(model, sigma=0.1, parameters=asked):
            for name, p in model.named_parameters():
                expected = perturbed_weight(name, clean[name], 0.1, 0, 0) if name in moved else clean[name]
                assert torch.equal(p, expected), name


@pytest.mark.parametrize("mode", EVERY)
def test_two_hundred_draws_leave_no_trace(mode):
    model = make(bfloat16_numbers=True)
    before = state(model)
    with torch.no_grad(), pu.perturbed(model, sigma=1e-5, mode=mode) as it:
        for draw in range(200):
            it.to(draw, 1 - 2 * (draw % 2))
        chained = model(IDS)
    assert_restored(model, before)
    with torch.no_grad(), pu.perturbed(model, sigma=1e-5, draw=199, sign=-1, mode=mode):
        assert torch.equal(model(IDS), chained)  # history plays no part
    assert_restored(model, before)


@pytest.mark.parametrize("mode", ["overlay", "copy"])
def test_gradients_are_those_of_the_perturbed_weights(mode):
    model = make()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pu.perturbed(model, sigma=0.1, mode=mode):
        grads = torch.autograd.grad(model(IDS).square().mean(), parameters)
        moved = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = make()
    other.load_state_dict(moved, strict=False)
    expected = torch.autograd.grad(other(IDS).square().mean(), [p for p in other.parameters() if p.requires_grad])
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("mode", IN_MEMORY)
def test_a_graph_does_not_outlive_its_weights(mode):
    """No silent gradient of other weights than those of the forward."""
    model = make(bfloat16_numbers=True)
    loss = model(IDS).square().mean()
    with pu.perturbed(model, mode=mode) as it:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        loss = model(IDS).square().mean()
        it.to(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        loss = model(IDS).square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(IDS).square().mean().backward()


def test_inference_tensors():
    with torch.inference_mode():
        model = make()
        before = state(model)
        with pu.perturbed(model, sigma=0.1):
            assert not torch.equal(bits(model.position), before["position"][0])
        assert_restored(model, before)


@given(st.data())
@settings(max_examples=100)
def test_runs_of_a_box(data):
    whole = data.draw(st.lists(st.integers(1, 6), max_size=4))
    offset = [data.draw(st.integers(0, n - 1)) for n in whole]
    shape = [data.draw(st.integers(1, n - o)) for n, o in zip(whole, offset, strict=True)]
    starts, length = parameters.runs(whole, shape, offset)
    elements = torch.arange(max(1, torch.Size(whole).numel())).view(whole)
    for d, (o, n) in enumerate(zip(offset, shape, strict=True)):
        elements = elements.narrow(d, o, n)
    assert torch.equal((starts[:, None] + torch.arange(length)).flatten(), elements.flatten())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sigma=0), "sigma=0: needs a finite number > 0"),
        (dict(sigma=-1e-5), "sigma=-1e-05"),
        (dict(sigma=float("nan")), "sigma=nan"),
        (dict(sigma=float("inf")), "sigma=inf"),
        (dict(sigma=1e-46), "sigma=1e-46"),
        (dict(sigma=1e38), "sigma=1e\\+38"),
        (dict(seed=-1), "seed=-1: needs 0 <= seed < 2\\^64"),
        (dict(seed=2**64), "seed="),
        (dict(draw=2**32), "draw=4294967296: needs 0 <= draw < 2\\^32"),
        (dict(draw=-1), "draw=-1"),
        (dict(sign=0), "sign=0: needs \\+1 or -1"),
        (dict(mode="inplace"), "mode='inplace': needs one of"),
        (dict(mode="snap"), "mode='snap': needs float32 parameters that hold bfloat16 numbers; 'position'"),
        (dict(parameters=["position", "nobody"]), "parameters: the model has none of the name 'nobody'"),
        (dict(backend="gpu"), "backend='gpu'"),
    ],
)
def test_bad_arguments(options, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message), pu.perturbed(model, **options):
        pass
    assert_restored(model, before)


def test_bad_models():
    integers = nn.ParameterDict({"a": nn.Parameter(torch.ones(2)), "q": nn.Parameter(torch.ones(2).int(), False)})
    with pytest.raises(TypeError, match=r"q: needs bfloat16, float16, float32 or float64, got torch\.int32"):
        pu.perturbed(integers).__enter__()
    with pu.perturbed(integers, sigma=1.0, parameters=["a"]):
        assert integers["q"].tolist() == [1, 1]
        assert integers["a"].tolist() != [1, 1]
    with pytest.raises(ValueError, match="weight: needs loaded weights, is on the meta device"):
        pu.perturbed(nn.Linear(2, 2, device="meta")).__enter__()
    with pytest.raises(TypeError, match="parameters='weight': needs a collection"):
        pu.perturbed(nn.Linear(2, 2), parameters="weight").__enter__()


def test_names_with_one_id():
    """CRC-32 of "plumless" is that of "buckeroo"."""
    assert noise.parameter_id("plumless") == noise.parameter_id("buckeroo")
    model = nn.ParameterDict({"plumless": torch.ones(2), "buckeroo": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'(plumless|buckeroo)' and '(plumless|buckeroo)': their names have one"):
        pu.perturbed(model).__enter__()
    with pu.perturbed(model, parameters=["plumless"]):
        pass


def test_use_outside_of_the_block():
    it = pu.perturbed(make())
    with pytest.raises(RuntimeError, match="needs to be called inside the with block"):
        it.to(1)
    with it, pytest.raises(RuntimeError, match="is entered already"):
        it.__enter__()
    with it:  # again, after it was left
        it.to(3)


def test_docstring_example():
    names = {"torch": torch, "nn": nn, "gaussian_noise": pu.gaussian_noise}
    with torch.device("cpu"):
        result = doctest.testmod(perturbation, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0
