"""Compiled blocks say what blocks say, by one graph for all of them and for rows of any lengths, or are not used."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil

import peft
import pytest
import torch
import torch._inductor.compile_fx
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.utils import fresh_cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pyunlearn import _declined
from pyunlearn.model import compiled as module
from pyunlearn.model.compiled import COMPILED, Compiling, agree
from pyunlearn.model.forward import supervised_hidden
from pyunlearn.model.packing import Packing

from .test_packing import gradients, make_batch
from .zoo import make

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
POSITIONS = {"forget": "supervised", "retain": "real"}
LENGTHS = [  # of forget rows, of retain rows, what they begin with alike
    ((9, 6, 8), (7, 10), 4), ((12, 6, 8, 11), (7, 10), 3), ((5, 6), (9, 5, 13), 1), ((7,), (9,), 0),
    ((30, 4), (4, 4), 2),
]  # fmt: skip


def batches_of(forget, retain, prefix, seed=0, more=1):
    return {
        "forget": make_batch(forget, prefix, seed, more=more),
        "retain": make_batch(retain, prefix, seed + 1, more=more),
    }


def run(model, batches, compiling=None, packing=None):
    """Last hidden states and gradients, of a step as a training takes it."""
    torch.manual_seed(0)
    compiled = contextlib.nullcontext() if compiling is None else compiling(model, packing)
    with packing or contextlib.nullcontext(), compiled:
        if packing is not None:
            found = packing.hidden(model, batches, POSITIONS)
        else:
            found = {kind: supervised_hidden(model, batch, POSITIONS[kind]) for kind, batch in batches.items()}
        states = [own.hidden for own in found.values()]
        return torch.cat([x.detach().flatten() for x in states]), gradients(model, *states)


def check(model, compiling, packing, lengths=LENGTHS, tolerance=1e-5, more=1):
    for seed, each in enumerate(lengths):
        batches = batches_of(*each, seed, more)
        (states, found), (expected, own) = (run(model, batches, how, packing) for how in (compiling, None))
        torch.testing.assert_close(states, expected, rtol=tolerance, atol=tolerance)
        assert found.keys() == own.keys()
        for name, gradient in found.items():
            assert (gradient - own[name]).norm() <= tolerance * own[name].norm() + 1e-9, name


@pytest.fixture
def traced(monkeypatch):
    """Graphs are made, but not compiled: seconds less, and as many of them."""
    monkeypatch.setattr(
        torch._inductor.compile_fx, "compile_fx", lambda graph, inputs, config_patches: aot_eager(graph, inputs)
    )


@needs_compiler
def test_one_graph_serves_all_blocks_and_lengths_and_is_no_further_from_float64():
    model, exact = (make("llama", dtype, num_hidden_layers=3).train() for dtype in (torch.float32, torch.float64))
    compiling, packing = Compiling(), Packing()
    check(model, compiling, packing)
    assert compiling.as_dict() == {"used": True, "declined": {}}
    assert compiling.graphs == 1
    assert compiling.seconds > 0
    batches = batches_of(*LENGTHS[0])
    truth = run(exact, batches, None, Packing())
    ours, theirs = (run(model, batches, how, packing) for how in (compiling, None))
    assert (ours[0] - truth[0]).norm() <= 1.5 * (theirs[0] - truth[0]).norm() + 1e-6 * truth[0].norm()
    for name, exactly in truth[1].items():
        error, other = ((way[1][name].double() - exactly).norm() for way in (ours, theirs))
        assert error <= 1.5 * other + 1e-6 * exactly.norm(), name
    again = run(model, batches, compiling, packing)
    assert torch.equal(again[0], ours[0])
    assert all(torch.equal(again[1][name], gradient) for name, gradient in ours[1].items())


def test_graphs_of_a_model_in_eval_mode(traced):
    model, compiling = make("llama", num_hidden_layers=3).eval(), Compiling()
    check(model, compiling, Packing())
    assert compiling.graphs == 1


def test_graphs_of_rows_that_are_padded(traced):
    """One for rows with a mask, and one for those that need none."""
    model, compiling = make("llama", num_hidden_layers=3).train(), Compiling()
    check(model, compiling, None, LENGTHS[:3])
    assert compiling.graphs == 1
    check(model, compiling, None, [((n, n), (n + 1, n + 1), 2) for n in (6, 9, 11, 14)], more=0)
    assert compiling.graphs == 2


def test_graphs_of_adapters(traced):
    """The first block's input needs no gradient: a graph of its own. Dropout draws the same."""
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.5)
    model = peft.get_peft_model(make("llama", num_hidden_layers=3), adapter).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    compiling = Compiling()
    check(model, compiling, Packing())
    assert compiling.as_dict() == {"used": True, "declined": {}}
    assert compiling.graphs == 2


def test_graphs_of_activations_that_are_computed_again(traced):
    model = make("llama", num_hidden_layers=3).train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)

    def kept(compiling, packing):
        """Numbers of activations, up to the backward: a graph's weights are saved too."""
        numbers, weights = [], {parameter.data_ptr() for parameter in model.parameters()}

        def keep(x):
            if x.is_floating_point() and x.data_ptr() not in weights:
                numbers.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            run(model, batches_of(*LENGTHS[4]), compiling, packing)
        return sum(numbers)

    compiling, packing = Compiling(), Packing()
    whole = kept(None, packing)
    enable({"use_reentrant": False})
    check(model, compiling, packing)
    assert compiling.as_dict() == {"used": True, "declined": {}}
    assert compiling.graphs == 1
    assert kept(compiling, packing) < 0.4 * whole
    enable({"use_reentrant": True})
    compiling = Compiling()
    check(model, compiling, packing, LENGTHS[:1], 0)
    assert "use_reentrant=True" in compiling.declined[COMPILED]


def test_blocks_that_give_more_than_states_and_are_not_packed(traced):
    model, compiling, packing = make("bloom").train(), Compiling(), Packing()
    batches = batches_of(*LENGTHS[0])
    with packing, compiling(model, packing):
        assert not packing.hidden(model, batches, POSITIONS)
        made = compiling.graphs
        check(model, compiling, None, LENGTHS[:2])
    assert compiling.as_dict() == {"used": True, "declined": {}}
    assert compiling.graphs == made == 1


def test_in_ddp(traced, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        compiling, model = Compiling(), make("llama").train()
        model.lm_head.requires_grad_(False)  # which these losses do not go through
        check(torch.nn.parallel.DistributedDataParallel(model), compiling, Packing(), LENGTHS[:2])
        assert compiling.as_dict() == {"used": True, "declined": {}}
    finally:
        torch.distributed.destroy_process_group()


# ---- what is not used is told ----------------------------------------------------------------------------------------


def declined(model, compiling=None):
    """Why, after a step that has gone on as if nothing were."""
    compiling = Compiling() if compiling is None else compiling
    check(model, compiling, Packing(), LENGTHS[:2], 0)
    assert not compiling.as_dict()["used"]
    return compiling.declined[COMPILED]


@pytest.mark.parametrize("what", ["hidden states", "gradients"])
def test_a_graph_that_says_otherwise_is_found_out(monkeypatch, caplog, what):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * (1.001 if what == "hidden states" else 1)

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    def backend(graph, inputs, config_patches):
        return lambda *args: tuple(Wrong.apply(x) for x in graph(*args))

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", backend)
    _declined._logged.clear()
    with caplog.at_level(logging.INFO, "pyunlearn"):
        reason = declined(make("llama").train())
    assert reason == f"the {what} of LlamaDecoderLayer are others"
    assert f"compiled blocks is not used: {reason}" in caplog.text


def test_without_a_compiler():
    with fresh_cache(), torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        reason = declined(make("llama").train())
    assert reason.startswith("LlamaDecoderLayer does not compile (")
    assert "C++ compiler" in reason


def test_blocks_that_are_no_longer_their_own():
    model = make("llama").train()
    block = model.model.layers[1]
    block.forward = block.forward
    assert "other forwards" in declined(model)
    assert "forward" in vars(block)
    compiling, model = Compiling(), make("llama").train()
    model.model.layers[0].compile(backend="eager")
    with compiling(model):
        assert "is compiled already" in compiling.declined[COMPILED]


def test_a_model_is_left_as_found_and_forwards_without_gradients_are_its_own(traced):
    model, compiling = make("llama").train(), Compiling()
    batch = batches_of(*LENGTHS[0])["retain"]
    with torch.no_grad():
        expected = supervised_hidden(model, batch).hidden
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    with contextlib.suppress(KeyError), compiling(model, Packing()):
        assert all("forward" in vars(block) for block in model.model.layers)
        with torch.no_grad():
            assert torch.equal(supervised_hidden(model, batch).hidden, expected)
        assert compiling.graphs == 1
        assert not compiling.as_dict()["used"]
        raise KeyError
    assert not any("forward" in vars(block) for block in model.model.layers)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_more_graphs_than_are_made(monkeypatch, traced):
    """It ends with the blocks themselves, and says so."""
    monkeypatch.setattr(module, "LIMIT", 1)
    model, compiling = make("llama").train(), Compiling()
    check(model, compiling, None, [((9, 6), (7, 10), 4), ((9, 9), (8, 8), 2)], more=0)
    assert "RecompileLimit" in compiling.declined[COMPILED]


def test_a_graph_for_every_length_is_none(monkeypatch, traced):
    """As a recurrence would need that goes from token to token in Python."""
    own = LlamaDecoderLayer.forward

    def forward(self, hidden_states, **kwargs):
        found = own(self, hidden_states, **kwargs)
        return torch.cat([found[:, t : t + 1] for t in range(found.size(1))], 1)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    monkeypatch.setattr(module, "TRIED", ((3, 9), (3, 8)))
    model, compiling = make("llama").train(), Compiling()
    check(model, compiling, None, LENGTHS[:2], 0)
    assert compiling.declined[COMPILED] == "LlamaForCausalLM needs a graph for each length of rows"
    assert compiling.graphs == 2


def test_small_gradients_are_held_to_the_others():
    large, small = torch.full((4,), 3.0), torch.full((4,), 1e-7)
    assert agree([large, small], [large, -small])
    assert not agree([large, large * 1.001], [large, large])
    assert not agree([large, small + 0.01], [large, small])
    assert not agree([large], [large[:3]])
    assert not agree([large * float("nan")], [large])
