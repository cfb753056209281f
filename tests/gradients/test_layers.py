"""Every kind of layer: its ghost norms are those of a loop over samples, or it is refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
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
}
REFUSED = {
    "group norm": (lambda: nn.GroupNorm(2, T), "weight, bias: no ghost norm rule"),
    "group norm, not torch's": (lambda: ChannelNorm(T), "ChannelNorm: its output is not affine"),
    "norm over the batch": (lambda: BatchwiseNorm(H), "BatchwiseNorm: its output is not affine"),
    "batch norm": (lambda: nn.BatchNorm1d(T), "weight, bias: no ghost norm rule"),
    "sync batch norm": (lambda: nn.SyncBatchNorm(T).eval(), "weight, bias: no ghost norm rule"),
    "instance norm": (lambda: nn.InstanceNorm1d(T, affine=True), "weight, bias: no ghost norm rule"),
    "layer norm of two axes": (lambda: nn.LayerNorm((T, H)), "weight, bias: no ghost norm rule"),
    "1 + gain inside": (lambda: NemotronLayerNorm1P(H), "weight, bias: no ghost norm rule"),
    "scalar gain": (ScalarNorm, "ScalarNorm: its output is not affine"),
    "conv": (lambda: nn.Conv1d(T, T, 1), "weight, bias: no ghost norm rule"),
    "bilinear": (lambda: Of(nn.Bilinear(H, H, 5), lambda layer, x: layer(x, x)), "layer.weight, layer.bias: no ghost"),
    "bias alone": (BiasOnly, "bias: no ghost norm rule"),
    "experts": (lambda: MixtralSparseMoeBlock(EXPERTS), r"gate\.weight.*: no ghost norm rule"),
    "attention of torch": (
        lambda: Of(nn.MultiheadAttention(H, 2, batch_first=True), lambda layer, x: layer(x, x, x)[0]),
        "layer.in_proj_weight.*: no ghost norm rule",
    ),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(H, 5)), "parametrizations.* no ghost norm"),
    "embedding by frequency": (lambda: nn.Embedding(9, H, scale_grad_by_freq=True), "weight: no ghost norm rule"),
    "embedding of a length": (lambda: nn.Embedding(9, H, max_norm=1.0), "weight: no ghost norm rule"),
    "embedding, scaled": (lambda: Gemma3TextScaledWordEmbedding(9, H, 0, 2.0), "weight: no ghost norm rule"),
    "embedding of positions": (lambda: OPTLearnedPositionalEmbedding(9, H), "weight: no ghost norm rule"),
}


def inputs(layer):
    generator = torch.Generator().manual_seed(1)
    if any(isinstance(module, nn.Embedding) for module in layer.modules()):
        return torch.randint(0, 9, (B, T), generator=generator)
    return torch.randn(B, T, H, dtype=torch.float64, generator=generator)


def losses(layer, x):
    return layer(x).sin().flatten(1).cumsum(1).square().sum(1)  # no two places alike


@pytest.mark.parametrize("gains", ["default", "other"])
@pytest.mark.parametrize("name", RIGHT)
def test_right(name, gains):
    torch.manual_seed(0)
    layer = RIGHT[name]().double()
    if gains == "other":
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter))
    x = inputs(layer)
    chosen = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    expected = []
    for i in range(B):
        gradients = torch.autograd.grad(losses(layer, x[i : i + 1]).sum(), chosen)
        expected.append(sum(gradient.square().sum() for gradient in gradients))
    with PerSample(layer) as tap:
        found = tap.collect(B, lambda: losses(layer, x).sum(), SquaredNorms())
    # transformers' norms go through float32
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5 if "Norm" in str(layer) else 1e-10, atol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, message = REFUSED[name]
    layer = build().double()  # gains of one, which hide what axis they are of
    with pytest.raises(TypeError, match=message), PerSample(layer) as tap:
        tap.collect(B, lambda: losses(layer, inputs(layer)).sum(), SquaredNorms())


@pytest.mark.parametrize("name", RIGHT)
def test_no_samples_and_no_tokens(name):
    layer = RIGHT[name]().double()
    x = inputs(layer)
    with PerSample(layer) as tap:
        none = tap.collect(0, lambda: losses(layer, x[:0]).sum(), SquaredNorms())
        unscored = tap.collect(B, lambda: layer(x)[:, :0].sum(), SquaredNorms())
    assert none.shape == (0,)
    assert none.dtype == torch.float64
    assert torch.equal(unscored, torch.zeros(B, dtype=torch.float64))
