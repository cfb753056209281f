"""Hidden states of layers: values, gradients, and where a forward may end."""

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from pyunlearn.model import forward
from pyunlearn.model.forward import layer_number, select_positions, supervised_hidden
from pyunlearn.objectives.definition import DEPTHS

from .variants import SIZES, make


class TestLayers:
    """Hidden states of single layers, against all of them from output_hidden_states."""

    @pytest.mark.parametrize("positions", ["supervised", "real"])
    def test_states_and_gradients(self, variant, batch, positions):
        variant.zero_grad()
        rows = select_positions(batch, positions)[0]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        states = variant(**inputs, output_hidden_states=True).hidden_states
        want = {layer: states[number].flatten(0, 1)[rows] for layer, number in ((1, 1), (2, 2), ("deep", 2), (-1, 2))}
        found = supervised_hidden(variant, batch, positions, layers=want)
        assert list(found.layers) == list(want)
        for layer in want:
            torch.testing.assert_close(found.layers[layer], want[layer])
        torch.testing.assert_close(found.hidden, supervised_hidden(variant, batch, positions).hidden)
        for early in (supervised_hidden(variant, batch, positions, layers=[1], through_head=False), found):
            ours, theirs = early.layers[1].square().sum(), want[1].square().sum()
            parameters = list(variant.parameters())
            options = {"allow_unused": True, "retain_graph": True}
            mine, other = (torch.autograd.grad(loss, parameters, **options) for loss in (ours, theirs))
            assert any(gradient is not None for gradient in mine)
            for one, two in zip(mine, other, strict=True):
                torch.testing.assert_close(one, two)
        assert torch.equal(early.targets, found.targets)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, batch, reentrant):
        gradients = []
        for checkpointing in (False, True):
            model = make("llama").train()
            if checkpointing:
                # transformers 5.x renamed it
                names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
                next(getattr(model, name) for name in names if hasattr(model, name))({"use_reentrant": reentrant})
            for through_head in (False, True):
                found = supervised_hidden(model, batch, layers=[1], through_head=through_head)
                found.layers[1].square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) > 5
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(one, two)

    def test_the_forward_ends_where_nothing_more_is_wanted(self, batch):
        model, calls = make("llama"), []
        for i, block in enumerate(model.model.layers):
            block.register_forward_hook(lambda *_, i=i: calls.append(i))
        hooks = [len(module._forward_pre_hooks) for module in model.modules()]
        expected = supervised_hidden(model, batch).hidden
        calls.clear()
        found = supervised_hidden(model, batch, layers=[1], through_head=False)
        assert calls == [0]
        assert found.hidden is found.layers[1]
        assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
        assert torch.equal(supervised_hidden(model, batch).hidden, expected)
        calls.clear()

        class Wrapper(nn.Module):  # as DDP holds the model and has work to do after its forward
            def __init__(self):
                super().__init__()
                self.module, self.finished = model, 0

            def forward(self, **inputs):
                output = self.module(**inputs)
                self.finished += 1
                return output

        wrapper = Wrapper()
        wrapped = supervised_hidden(wrapper, batch, layers=[1], through_head=False)
        assert (calls, wrapper.finished) == ([0, 1], 1)
        assert torch.equal(wrapped.hidden, found.hidden)

    def test_numbers(self, llama):
        deep = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 32}))
        numbers = {layer: layer_number(deep, layer) for layer in ("shallow", "middle", "deep", 1, 32, -1, -32)}
        assert numbers == {"shallow": 10, "middle": 21, "deep": 32, 1: 1, 32: 32, -1: 32, -32: 1}
        one = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
        assert [layer_number(one, layer) for layer in ("shallow", "middle", "deep")] == [1, 1, 1]
        assert tuple(forward.DEPTHS) == DEPTHS

    @pytest.mark.parametrize("layer", [0, 3, -3, True, 1.0, "centre"])
    def test_layers_that_there_are_not(self, llama, batch, layer):
        with pytest.raises(ValueError, match=f"layer={layer!r}: LlamaForCausalLM has 2 layers, needs 1 to 2, -2 to -1"):
            supervised_hidden(llama, batch, layers=[layer])

    def test_compiled_layers(self, batch):
        model = make("llama")
        model.get_decoder().compile(backend="eager")
        assert supervised_hidden(model, batch, layers=[-1]).layers[-1].shape == (10, 32)
        with pytest.raises(RuntimeError, match="compiled together with its head or a layer whose hidden states"):
            supervised_hidden(model, batch, layers=[1])
