"""The modes of `perturbed`: the same bits, each within its means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyunlearn as pu
from benchmarks.measure import peak_bytes
from pyunlearn.ops import modes

from .perturbed_model import EVERY, IDS, Block, assert_restored, bits, make, perturbed_weight, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mode_gives_the_same_forward(dtype):
    """In float32 to the last bit, streamed too; the baseline as well."""
    model = make(dtype, bfloat16_numbers=True)
    before, results = state(model), {}
    for mode in EVERY if dtype == torch.float32 else ("overlay", "streamed"):
        with torch.no_grad(), pu.perturbed(model, sigma=1e-2, draw=None, mode=mode) as it:
            outputs = [model(IDS)]
            for draw in (0, 1, 0):
                it.to(draw)
                outputs.append(model(IDS))
        results[mode] = outputs
        assert_restored(model, before)
    for outputs in results.values():
        assert all(map(torch.equal, outputs, results["overlay"]))
        assert all(output.dtype == torch.float32 for output in outputs)
        assert not torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[1], outputs[3])


LAYOUTS = {  # of a (rows, columns) weight
    "contiguous": lambda w: w,
    "transposed": lambda w: w.t().contiguous().t(),
    "columns of a wider one": lambda w: torch.cat([w, w], 1)[:, : w.size(1)],
    "rows of a longer one": lambda w: torch.cat([w, w])[w.size(0) :],
    "transposed rows": lambda w: torch.cat([w, w]).t().contiguous().t()[w.size(0) :],
    "every other": lambda w: w.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "expanded": lambda w: w[:1].expand_as(w),
}


@pytest.fixture(params=[1, 2])
def threads(request):
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(usual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mode_gives_the_same_bits_for_any_strides(layout, dtype, threads):
    """The baseline those of the model itself: BLAS sums products with a transpose in another order."""
    wide = torch.promote_types(dtype, torch.float32)

    def products(mode):
        with torch.no_grad(), pu.perturbed(layer, sigma=0.1, draw=None, mode=mode) as it:
            return [product for draw in (None, 3, 4) for product in (it.to(draw), layer(one), layer(many))[1:]]

    for rows, columns in ((17, 17), (64, 64), (300, 257)):
        many = torch.randn(33, columns, dtype=wide)
        one, layer = many[:1], nn.Linear(columns, rows, bias=False)
        layer.weight.data = w = LAYOUTS[layout](torch.randn(rows, columns).bfloat16().to(dtype))
        first = products("overlay")
        for mode in EVERY:
            if (mode == "snap" and dtype != torch.float32) or (mode == "copy" and dtype == torch.bfloat16):
                continue
            if mode in ("snap", "copy") and layout == "expanded":
                with pytest.raises(ValueError, match=f"mode='{mode}': needs weights whose elements lie apart"):
                    products(mode)
                continue
            assert all(map(torch.equal, products(mode), first)), mode
        assert dtype != wide or layout == "expanded" or torch.equal(layer(many), first[1])
        assert layer.weight.stride() == w.stride()


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [(mode, dtype) for mode in EVERY for dtype in (torch.float32, torch.bfloat16)[: 1 if mode == "snap" else 2]],
)
def test_odd_weights_come_back_bitwise(mode, dtype):
    """NaN with its payload, infinities, both zeros, the smallest and the largest numbers."""
    layer = nn.Linear(256, 256, bias=False)
    patterns = torch.arange(65536, dtype=torch.int32) << 16  # every bfloat16 number there is
    layer.weight.data = patterns.view(torch.float32).view(256, 256).to(dtype)
    before = state(layer)
    for sigma in (1e-5, 1.0, 1e30, 1e-37):
        with torch.no_grad(), pu.perturbed(layer, sigma=sigma, mode=mode) as it:
            for draw in range(3):
                it.to(draw)
        assert_restored(layer, before)


@settings(max_examples=80)
@given(
    scale=st.floats(-12, 3), sigma=st.floats(-8, 2), draws=st.lists(st.integers(0, 2**32 - 1), max_size=4),
    numel=st.integers(1, 400), seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_snap_is_exact_at_any_scale(scale, sigma, draws, numel, seed):
    """Weights of 10^scale, noise of 10^sigma: also where many of them have to be kept aside."""
    w = (torch.randn(numel, generator=torch.Generator().manual_seed(seed % 2**31)) * 10**scale).bfloat16().float()
    holder = nn.ParameterDict({"w": nn.Parameter(w.clone())})
    with pu.perturbed(holder, sigma=10**sigma, seed=seed, mode="snap") as it:
        for draw in draws:
            it.to(draw)
            assert torch.equal(holder["w"], perturbed_weight("w", w, 10**sigma, seed, draw))
    assert torch.equal(bits(holder["w"]), bits(w))


def test_few_weights_are_kept_aside():
    """Weights like those of a model: less than one in a million needs it."""
    w = (torch.randn(1 << 21) * 0.02).bfloat16().float()
    w[:1000] = 0
    assert modes.lost_by_rounding(w, 1e-5).numel() <= 2
    assert modes.lost_by_rounding(-w[:1000], 1e-5).tolist() == list(range(1000))  # -0


def test_auto(monkeypatch):
    def mode_of(model):
        with torch.no_grad(), pu.perturbed(model) as it:
            return it.mode

    numbers, whole, half = make(bfloat16_numbers=True), make(), make(torch.bfloat16)
    assert [mode_of(model) for model in (numbers, whole, half)] == ["overlay"] * 3
    size = sum(p.numel() + -p.numel() % 16 for p in whole.parameters()) * 4
    monkeypatch.setattr(modes, "free_bytes", lambda device: 2 * size)  # the machine's memory, which no argument sets
    assert mode_of(whole) == "overlay"
    monkeypatch.setattr(modes, "free_bytes", lambda device: 2 * size - 1)
    assert [mode_of(model) for model in (numbers, whole, half)] == ["snap", "streamed", "streamed"]
    numbers.position.data.mul_(-0.0)  # too many to keep aside
    assert mode_of(numbers) == "streamed"


def test_streamed_holds_one_layer():
    """Its scratch is as large as the largest unit, and what the root itself holds; overlay's as the whole model."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(64, 256))
            self.first = nn.Linear(256, 128, bias=False)
            self.layers = nn.ModuleList([nn.Linear(256, 256, bias=False) for _ in range(6)])

        def forward(self, x):
            self.first(x)
            for layer in self.layers:
                x = layer(x + self.position[0])
            return x

    model, x = Deep().bfloat16(), torch.ones(1, 256)

    def call(mode):
        with torch.no_grad(), pu.perturbed(model, mode=mode):
            return model(x)

    root, layer = 4 * 64 * 256, 4 * 256 * 256
    streamed, overlay = peak_bytes(lambda: call("streamed"), "cpu"), peak_bytes(lambda: call("overlay"), "cpu")
    assert root + layer <= streamed < 1.05 * (root + layer)
    assert root + layer // 2 + 6 * layer <= overlay


def test_streamed_says_where_it_cannot_serve():
    model = make()
    before = state(model)
    with pu.perturbed(model, mode="streamed"):
        with pytest.raises(RuntimeError, match=r"needs torch.no_grad\(\)"):
            model(IDS)
        with torch.no_grad(), pytest.raises(RuntimeError):  # a weight outside of its module's forward is empty
            nn.functional.linear(torch.ones(1, 17), model.head.weight)
    assert_restored(model, before)

    class Caller(Block):
        def forward(self, x):
            return self.other[0](x)

    model.layers[0].__class__ = Caller
    model.layers[0].other = [model.layers[1]]  # a list hides it from nn.Module
    with torch.no_grad(), pu.perturbed(model, mode="streamed"):
        with pytest.raises(RuntimeError, match="a layer called by another one \\(Block inside Caller\\)"):
            model(IDS)
        model.layers[0].other = [nn.Identity()]
        model(IDS)
    assert_restored(model, before)


def test_resident_shows_a_weight_outside_of_a_forward():
    model = make()
    with pu.perturbed(model, sigma=0.1):
        expected = model.embedding.weight.detach().clone()
    with torch.no_grad(), pu.perturbed(model, sigma=0.1, mode="streamed") as it:
        with it.resident(model.head):
            assert torch.equal(model.head.weight, expected)
        assert model.head.weight.numel() == 0
        with pytest.raises(ValueError, match="resident: Linear is not streamed as one module"):
            it.resident(model.layers[0].linear).__enter__()
    with pu.perturbed(model, sigma=0.1) as it, it.resident(model.head):
        assert torch.equal(model.head.weight, expected)


def test_streamed_layers_in_lists_of_lists():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.groups = nn.ModuleList([nn.ModuleList([nn.Linear(3, 3)]), nn.ModuleDict({"a": nn.Linear(3, 3)})])

        def forward(self, x):
            return self.groups[1]["a"](self.groups[0][0](x))

    model, x = Nested(), torch.ones(2, 3)
    with torch.no_grad():
        with pu.perturbed(model, sigma=0.1):
            expected = model(x)
        with pu.perturbed(model, sigma=0.1, mode="streamed"):
            assert torch.equal(model(x), expected)
