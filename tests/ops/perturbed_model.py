"""A model with everything a perturbation may meet, and what has to be as it was."""

from __future__ import annotations

import torch
from torch import nn

import pyunlearn as pu

IN_MEMORY = ("overlay", "copy", "snap")  # modes whose parameters hold the perturbed weights inside the whole block

EVERY = (*IN_MEMORY, "streamed")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x + self.linear(self.norm(x)) * self.scale


class Model(nn.Module):
    """Tied embedding and head, a parameter of the root, frozen and strided ones, a buffer."""

    def __init__(self, width=17, vocabulary=23):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(5, width))
        self.layers = nn.ModuleList([Block(width) for _ in range(3)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.randn(width))
        self.layers[1].linear.weight.data = torch.randn(width, width).t()  # not contiguous
        self.layers[2].requires_grad_(False)

    def forward(self, ids):
        x = self.embedding(ids.to(self.position.device)) + self.position + self.offset
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.arange(10).view(2, 5)


def make(dtype=torch.float32, bfloat16_numbers=False, seed=0):
    torch.manual_seed(seed)
    model = Model()
    if bfloat16_numbers:
        for p in model.parameters():
            p.data.copy_(p.data.bfloat16())
    return model.to(dtype)


def bits(tensor):
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(whole[tensor.element_size()]).clone()


def state(model):
    """All that has to be as it was."""
    return {
        name: (bits(p), p.data_ptr(), p.dtype, p.stride(), p.requires_grad, p.shape)
        for name, p in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    }


def assert_restored(model, before):
    after = state(model)
    assert after.keys() == before.keys()
    for name, (was, *rest) in before.items():
        assert torch.equal(after[name][0], was), name
        assert list(after[name][1:]) == rest, name


def perturbed_weight(name, w, sigma, seed, draw, sign=1):
    wide = torch.promote_types(w.dtype, torch.float32)
    z = pu.gaussian_noise(w.numel(), seed=seed, draw=draw, name=name, device=w.device).view(w.shape).to(wide)
    return w.detach().to(wide) + z * (sign * sigma)
