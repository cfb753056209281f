"""Every kind of layer: its norms are those of a loop over samples, from one backward a batch or from one a sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import (
    MixtralConfig,
    MixtralExperts,
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
)
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.pytorch_utils import Conv1D

from pyunlearn.gradients.per_sample import PerSample, SquaredNorms

B, T, H = 3, 4, 4  # T = H = the channels: what is of axis 1 looks like what is of the last


class Of(nn.Module):
    """A layer, called as a part of a model: float inputs, or ids."""

    def __init__(self, layer, call=None):
        super().__init__()
        self.layer, self.call = layer, call or (lambda layer, x: layer(x))

    def forward(self, x):
        return self.call(self.layer, x)


class BiasOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(H))

    def forward(self, x):
        return x + self.bias


class ChannelNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return F.group_norm(x, 2, self.weight, self.bias)


class BatchwiseNorm(nn.RMSNorm):
    def forward(self, x):
        return self.weight * x / x.square().mean((0, -1), keepdim=True).sqrt()


class CubeNorm(nn.RMSNorm):
    def forward(self, x):
        return self.weight**3 * x


class Twice(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * super().forward(ids.flip(1))


class Squared(nn.Linear):
    def forward(self, x):
        return super().forward(x).square()


class ScalarNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.weight * F.normalize(x, dim=-1)


def doubled(layer):
    layer.register_forward_hook(lambda *args: 2 * args[2])
    return layer


def parts_of(layer, names):
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in names)
    return layer


EXPERTS = MixtralConfig(hidden_size=H, intermediate_size=4, num_local_experts=2, num_experts_per_tok=1)
RIGHT = {
    "linear": lambda: nn.Linear(H, 5),
    "linear, its bias": lambda: parts_of(nn.Linear(H, 5), ["bias"]),
    "linear, twice": lambda: Of(nn.Linear(H, H), lambda layer, x: layer(layer(x).sin())),
    "linear, hooked": lambda: doubled(nn.Linear(H, 5)),
    "conv1d of gpt2": lambda: Conv1D(5, H),
    "layer norm": lambda: nn.LayerNorm(H),
    "layer norm, its bias": lambda: parts_of(nn.LayerNorm(H), ["bias"]),
    "layer norm, twice": lambda: Of(nn.LayerNorm(H), lambda layer, x: layer(layer(x).sin())),
    "rms norm": lambda: nn.RMSNorm(H),
    "llama": lambda: LlamaRMSNorm(H),
    "qwen3": lambda: Qwen3RMSNorm(H),
    "gemma2, 1 + gain": lambda: Gemma2RMSNorm(H),
    "embedding": lambda: nn.Embedding(9, H),
    "embedding, padded": lambda: nn.Embedding(9, H, padding_idx=2),
    "embedding, scaled": lambda: Gemma3TextScaledWordEmbedding(9, H, 0, 2.0),
    "embedding of positions": lambda: Of(OPTLearnedPositionalEmbedding(9, H), lambda layer, x: layer((x > 3).long())),
    "falcon": lambda: FalconLinear(H, 5),
}
ALONE = {
    "group norm": (lambda: nn.GroupNorm(2, T), "weight, bias"),
    "group norm, not torch's": (lambda: ChannelNorm(T), "weight, bias"),
    "norm over the batch": (lambda: BatchwiseNorm(H), "weight"),
    "batch norm": (lambda: nn.BatchNorm1d(T), "weight, bias"),
    "sync batch norm": (lambda: nn.SyncBatchNorm(T).eval(), "weight, bias"),
    "instance norm": (lambda: nn.InstanceNorm1d(T, affine=True), "weight, bias"),
    "layer norm of two axes": (lambda: nn.LayerNorm((T, H)), "weight, bias"),
    "1 + gain inside": (lambda: NemotronLayerNorm1P(H), "weight, bias"),
    "scalar gain": (ScalarNorm, "weight"),
    "conv": (lambda: nn.Conv1d(T, T, 1), "weight, bias"),
    "bilinear": (lambda: Of(nn.Bilinear(H, H, 5), lambda layer, x: layer(x, x)), "layer.weight, layer.bias"),
    "bias alone": (BiasOnly, "bias"),
    "experts": (lambda: MixtralSparseMoeBlock(EXPERTS), "gate.weight, experts.gate_up_proj, experts.down_proj"),
    "attention of torch": (
        lambda: Of(nn.MultiheadAttention(H, 2, batch_first=True), lambda layer, x: layer(x, x, x)[0]),
        "layer.in_proj_weight, layer.in_proj_bias",
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(H, 5)),
        "parametrizations.weight.original0",
    ),
    "embedding by frequency": (lambda: nn.Embedding(9, H, scale_grad_by_freq=True), "weight"),
    "embedding of a length": (lambda: nn.Embedding(9, H, max_norm=1.0), "weight"),
    "embedding, looked up twice": (lambda: Twice(9, H), "weight"),
    "linear, squared": (lambda: Squared(H, 5), "weight, bias"),
    "tokens as one list": (lambda: Of(nn.Linear(H, 5), lambda layer, x: layer(x.flatten(0, 1)).view(-1, T, 5)), "list"),
    "a gain of the cube": (lambda: CubeNorm(H), "weight"),
    "used outside": (lambda: Of(nn.Linear(H, 5), lambda layer, x: layer(x) * layer.bias), "layer.bias"),
}


def inputs(layer):
    generator = torch.Generator().manual_seed(1)
    if any(isinstance(module, nn.Embedding) for module in layer.modules()):
        return torch.randint(0, 9, (B, T), generator=generator)
    return torch.randn(B, T, H, dtype=torch.float64, generator=generator)


def losses(layer, x):
    return layer(x).sin().flatten(1).cumsum(1).square().sum(1)  # no two places alike


def one_by_one(layer, x):
    """(B,) squared norms: a backward a sample."""
    chosen = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    expected = []
    for i in range(B):
        gradients = torch.autograd.grad(losses(layer, x[i : i + 1]).sum(), chosen)
        expected.append(sum(gradient.square().sum() for gradient in gradients))
    return torch.stack(expected)


def check(layer, reason):
    x = inputs(layer)
    expected = one_by_one(layer, x)
    with PerSample(layer) as tap:
        found = tap.collect(B, lambda rows: losses(layer, x[rows]).sum(), SquaredNorms)
        assert torch.equal(found, tap.collect(B, lambda rows: losses(layer, x[rows]).sum(), SquaredNorms))
    # transformers' norms go through float32
    torch.testing.assert_close(found, expected, rtol=1e-5 if "Norm" in str(layer) else 1e-10, atol=0)
    assert tap.declined is reason is None or reason in tap.declined


@pytest.mark.parametrize("gains", ["default", "other"])
@pytest.mark.parametrize("name", RIGHT)
def test_of_a_batch(name, gains):
    torch.manual_seed(0)
    layer = RIGHT[name]().double()
    if gains == "other":
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter))
    check(layer, None)


@pytest.mark.parametrize("name", ALONE)
def test_of_each_sample(name):
    torch.manual_seed(0)
    build, reason = ALONE[name]
    layer = build().double()  # gains of one, which hide what axis they are of
    for module in layer.modules():
        if isinstance(module, MixtralTopKRouter | MixtralExperts):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter)
    check(layer, reason)


@pytest.mark.parametrize("name", RIGHT)
def test_no_samples_and_no_tokens(name):
    layer = RIGHT[name]().double()
    x = inputs(layer)
    with PerSample(layer) as tap:
        none = tap.collect(0, lambda rows: losses(layer, x[rows]).sum(), SquaredNorms)
        unscored = tap.collect(B, lambda rows: layer(x[rows])[:, :0].sum(), SquaredNorms)
    assert none.shape == (0,)
    assert none.dtype == torch.float64
    assert torch.equal(unscored, torch.zeros(B, dtype=torch.float64))
