"""What a program may do to a model inside `perturbed`: it is refused, or undone and told; never kept without a word."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import pyunlearn as pu

from .perturbed_model import EVERY, IDS, IN_MEMORY, assert_restored, make, state

TOLD = "were written to, converted or replaced inside the block; they are restored"


REFUSED = {
    "state_dict": lambda model: model.state_dict(),
    "of a part": lambda model: model.layers[0].state_dict(),
    "of a module around it": lambda model: nn.Sequential(model).state_dict(),
    "load_state_dict": lambda model: model.load_state_dict(make(seed=1).state_dict()),
    "load_state_dict, assigned": lambda model: model.load_state_dict(make(seed=1).state_dict(), assign=True),
    "deepcopy": copy.deepcopy,
    "deepcopy of a part": lambda model: copy.deepcopy(model.layers),
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("mode", EVERY)
def test_saving_loading_and_copying_are_refused(mode, what):
    model = make(bfloat16_numbers=True)
    before = state(model)
    with torch.no_grad(), pu.perturbed(model, sigma=0.1, mode=mode):
        moved = model(IDS)
        with pytest.raises(RuntimeError, match="needs its block to be left before the model's weights are saved"):
            REFUSED[what](model)
        assert torch.equal(model(IDS), moved)
    assert_restored(model, before)
    copy.deepcopy(model).load_state_dict(model.state_dict())


@pytest.mark.parametrize("mode", EVERY)
def test_save_pretrained_writes_nothing(mode, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=20)
    model = LlamaForCausalLM(LlamaConfig(**size)).bfloat16().float()
    with pu.perturbed(model, mode=mode), pytest.raises(RuntimeError, match="needs its block to be left"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def step(model, **options):
    weights = [p for p in model.parameters() if p.requires_grad]
    for p in weights:
        p.grad = torch.ones_like(p)
    torch.optim.SGD(weights, lr=0.5, **options).step()
    model.zero_grad()


def edit(model):
    with torch.no_grad():
        model.position.mul_(2)


def exchange(model):
    model.layers[0].linear.weight = nn.Parameter(torch.zeros(17, 17))


def assign(model):
    model.position.data = torch.zeros(5, 17)


def half_with_new_parameters(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.half()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def half_with_swapped_parameters(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.half()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES = {  # and the first parameter that is told of
    "half": (lambda model: model.half(), "'position'"),
    "half, new parameters": (half_with_new_parameters, "'position'"),
    "half, swapped parameters": (half_with_swapped_parameters, "'position'"),
    "double": (lambda model: model.to(torch.float64), "'position'"),
    "meta": (lambda model: model.to("meta"), "'position'"),
    "replaced": (exchange, "'layers.0.linear.weight'"),
    "assigned": (assign, "'position'"),
}
WRITES = {"step": step, "fused step": partial(step, fused=True), "edit": edit}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("mode", EVERY)
def test_a_conversion_is_told_and_undone(mode, what):
    """Bit by bit, at the end of the block and at the next draw."""
    change, name = CHANGES[what]
    model = make(bfloat16_numbers=True)
    model.register_buffer("offset", None)  # buffers are not perturbed, and stay converted
    before = state(model)
    with pytest.raises(RuntimeError, match=f"perturbed: {name}.* {TOLD}"), pu.perturbed(model, sigma=0.1, mode=mode):
        change(model)
    assert_restored(model, before)
    it = pu.perturbed(model, sigma=0.1, mode=mode)

    def draw_after_change():
        with it:
            change(model)
            it.to(1)

    with pytest.warns(UserWarning, match=f"perturbed: {name}"):  # noqa: SIM117
        with pytest.raises(RuntimeError, match=rf"to\(\) needs weights that it alone changes; {name}"):
            draw_after_change()
    assert_restored(model, before)


@pytest.mark.parametrize("what", WRITES)
@pytest.mark.parametrize("mode", IN_MEMORY)
def test_a_write_is_told_and_undone(mode, what):
    model = make(bfloat16_numbers=True)
    before = state(model)
    untouched = {"layers.2.linear.weight"} if "step" in what else before.keys() - {"position"}
    with pytest.raises(RuntimeError, match=f"perturbed: '.*{TOLD}"), pu.perturbed(model, sigma=1e-3, mode=mode):
        WRITES[what](model)
    if mode != "snap":
        return assert_restored(model, before)
    # It keeps no copy: what was written stays, without the noise.
    plain = make(bfloat16_numbers=True)
    WRITES[what](plain)
    for name, p in model.named_parameters():
        assert torch.equal(p, p.bfloat16().float())
        if name != "layers.1.linear.weight":  # not contiguous: of this one there is a copy
            torch.testing.assert_close(p, plain.get_parameter(name), atol=4e-3, rtol=0.01)
        assert name not in untouched or torch.equal(p, plain.get_parameter(name))
    return None


def test_snap_says_that_it_keeps_no_copy():
    model = make(bfloat16_numbers=True)
    with (
        pytest.raises(RuntimeError, match=r"'position' .*restored, but for what was written over"),
        pu.perturbed(model, mode="snap"),
    ):
        edit(model)


def test_a_write_before_an_error_is_told_beside_it():
    model = make()
    before = state(model)

    def fail():
        with pu.perturbed(model, mode="copy"):
            edit(model)
            _ = 1 // 0

    with pytest.warns(UserWarning, match=TOLD), pytest.raises(ZeroDivisionError):
        fail()
    assert_restored(model, before)


@pytest.mark.parametrize("mode", IN_MEMORY)
def test_blocks_in_blocks_tell_their_own_changes_from_others(mode):
    model = make(bfloat16_numbers=True)
    before = state(model)
    around, inside = (partial(pu.perturbed, model, sigma=s, mode=mode) for s in (1e-3, 1e-2))
    if mode == "snap":  # what it takes are bfloat16 numbers, which the block around has moved
        inside = partial(inside, mode="copy")
    with around() as outer:
        once = {name: p.detach().clone() for name, p in model.named_parameters()}
        with inside() as inner:
            inner.to(5)
            with pytest.raises(RuntimeError, match="needs the blocks that were entered later"):
                outer.to(1)
        for name, p in model.named_parameters():
            assert torch.equal(p, once[name])
        outer.to(1)
    assert_restored(model, before)
    with around() as outer:
        edit(model)
        with pytest.raises(RuntimeError, match="needs weights that it alone changes; 'position' were"):
            inside().__enter__()
        with pytest.raises(RuntimeError, match=TOLD):
            outer.__exit__(None, None, None)


@pytest.mark.parametrize("mode", EVERY)
def test_a_block_inside_a_streamed_one_is_refused(mode):
    model = make(bfloat16_numbers=True)
    before = state(model)
    with pu.perturbed(model, mode="streamed"):
        with pytest.raises(RuntimeError, match="the block around it, of mode 'streamed', hides them"):
            pu.perturbed(model, mode=mode).__enter__()
        with pu.perturbed(model, mode=mode, parameters=[]):
            pass
    assert_restored(model, before)


def test_a_resident_layer_follows_the_draws():
    model = make()
    with torch.no_grad(), pu.perturbed(model, sigma=0.1, mode="streamed") as it, it.resident(model.head):
        it.to(3)
        with pu.perturbed(make(), sigma=0.1, draw=3) as other:
            assert torch.equal(model.head.weight, other.model.head.weight)


def test_a_compiled_model_runs_inside():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    compiled, x = torch.compile(model, backend="eager"), torch.ones(1, 4)
    with torch.no_grad(), pu.perturbed(model, sigma=0.1) as it:
        assert torch.equal(compiled(x), model(x))
        it.to(1)
        assert torch.equal(compiled(x), model(x))
