"""Ghost norms against the gradients themselves, sample by sample, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyunlearn import _declined
from pyunlearn.gradients import per_sample as ghost
from pyunlearn.gradients.per_sample import Dots, PerSample, SquaredNorms, SquaredNormsByParameter
from pyunlearn.ops import ghost_dot

from ..float64 import MODELS, make_model


class PlusOneRMSNorm(nn.RMSNorm):
    """As in Gemma: the gain is 1 + weight."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return make_model(request.param)


def batch_of(rows, seed=1):
    """Right-padded rows; tokens repeat, so that embedding rows meet several positions."""
    lengths = [11, 7, 4, 9][:rows]
    ids = torch.randint(1, 8, (rows, max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, length in enumerate(lengths):
        labels[row, :2], labels[row, length:], mask[row, length:], ids[row, length:] = -100, -100, 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses(model, batch):
    """(B,) sums of the answers' log(-log p), by the textbook path."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logp = -F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return torch.where(batch["labels"][:, 1:] != -100, (-logp).log(), 0).sum(1)


def summed(model, batch):
    return lambda rows: losses(model, {name: tensor[rows] for name, tensor in batch.items()}).sum()


def per_sample(model, batch, parameters=None):
    """(B,) squared norms: a backward a sample."""
    chosen = [p for n, p in model.named_parameters() if parameters is None or n in parameters]
    norms = []
    for i in range(len(batch["input_ids"])):
        gradients = torch.autograd.grad(losses(model, batch)[i], chosen, allow_unused=True)
        norms.append(sum((g.square().sum() for g in gradients if g is not None), torch.zeros((), dtype=torch.float64)))
    return torch.stack(norms)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_norms_by_parameter(model):
    batch = batch_of(4)
    with PerSample(model) as tap:
        found = tap.collect(4, summed(model, batch), SquaredNormsByParameter)
        close(sum(found.values()), tap.collect(4, summed(model, batch), SquaredNorms))
    for name, squared in found.items():
        close(squared, per_sample(model, batch, [name]))
    assert found.keys() <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("way", ["gram", "direct", "either"])
def test_norms_equal_those_of_the_gradients(model, rows, way, monkeypatch):
    if way != "either":
        direct = lambda use: torch.stack([(l.t() @ r).square().sum() for l, r in zip(*use[:2], strict=True)])  # noqa: E731
        both = {"gram": ghost_dot, "direct": lambda use: ghost_dot(use) if use.one_hot else direct(use)}
        monkeypatch.setattr(ghost, "squared_norm", both[way])
    batch = batch_of(rows)
    with PerSample(model) as tap:
        found = tap.collect(rows, summed(model, batch), SquaredNorms)
        assert torch.equal(found, tap.collect(rows, summed(model, batch), SquaredNorms))
    assert found.dtype == torch.float64
    close(found, per_sample(model, batch))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model, reentrant):
    batch = batch_of(4)
    expected = per_sample(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()  # neither has dropout that is not 0, apart from gpt2's
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    try:
        with PerSample(model) as tap:
            found = tap.collect(4, summed(model, batch), SquaredNorms)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    close(found, expected)


def test_only_the_parameters_that_are_named(model):
    batch = batch_of(4)
    for part in ("norm", "ln_", "embed", "wpe", "bias", "mlp"):
        names = [name for name, _ in model.named_parameters() if part in name]
        if names:
            with PerSample(model, names) as tap:
                found = tap.collect(4, summed(model, batch), SquaredNorms)
            close(found, per_sample(model, batch, names))


class Several(nn.Module):
    """One linear layer used twice, one embedding used twice, norms of every kind, one of them on heads."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 8, padding_idx=0)
        self.linear = nn.Linear(8, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.rms_norm = nn.RMSNorm(8)
        self.plus_one = PlusOneRMSNorm(8, eps=1e-6)
        self.head_norm = nn.RMSNorm(4)
        self.unused = nn.Linear(8, 8)

    def forward(self, ids):
        x = self.embedding(ids) + self.embedding((ids + 3) % 9)
        x = x + self.linear(self.layer_norm(x))
        x = self.plus_one(x + self.linear(self.rms_norm(x)).tanh())
        self.unused(x)
        return self.head_norm(x.unflatten(-1, (2, 4))).sin().sum((1, 2, 3))


class Dense:
    """A collector of one's own: whole gradients of every sample."""

    def __init__(self, shapes):
        self.shapes, self.gradients = shapes, {}

    def expect(self, name):
        pass

    def matrix(self, name, use):
        left = F.one_hot(use.left, self.shapes[name][0]).to(use.right.dtype) if use.one_hot else use.left
        self.vector(name, left.mT @ use.right)

    def vector(self, name, gradients):
        self.gradients[name] = self.gradients[name] + gradients if name in self.gradients else gradients

    def whole(self, name, gradient):
        self.vector(name, gradient.unsqueeze(0))

    def result(self, num_samples, device):
        return self.gradients


def test_a_tap_does_not_know_what_is_collected(model):
    batch = batch_of(4)
    with PerSample(model) as tap:
        loss = summed(model, batch)
        whole = tap.collect(4, loss, lambda: Dense({name: p.shape for name, p in model.named_parameters()}))
        squared = tap.collect(4, loss, SquaredNorms)
        directions = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        dots = tap.collect(4, loss, lambda: Dots(directions))
    close(squared, sum(g.flatten(1).square().sum(1) for g in whole.values()))
    assert dots.keys() == whole.keys()
    for name, gradients in whole.items():
        torch.testing.assert_close(dots[name], (gradients * directions[name]).flatten(1).sum(1), rtol=1e-8, atol=1e-10)
    for i in range(4):
        names, parameters = zip(*model.named_parameters(), strict=True)
        for name, gradient in zip(names, torch.autograd.grad(losses(model, batch)[i], parameters), strict=True):
            torch.testing.assert_close(whole[name][i], gradient, rtol=1e-8, atol=1e-10)


def test_parameters_used_several_times():
    torch.manual_seed(0)
    model = Several().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    ids = torch.randint(0, 9, (4, 6))
    expected = []
    for i in range(4):
        gradients = torch.autograd.grad(model(ids)[i], tuple(model.parameters()), allow_unused=True)
        expected.append(sum(g.square().sum() for g in gradients if g is not None))
    with PerSample(model) as tap:
        found = tap.collect(4, lambda rows: model(ids[rows]).sum(), SquaredNorms)
    close(found, torch.stack(expected))


def test_half_precision_is_summed_in_float32():
    """A bfloat16 layer's norms are those of its own inputs and output gradients, exact in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).bfloat16()
    x, weights = torch.randn(3, 20, 64).bfloat16(), torch.randn(3, 20, 48).bfloat16()
    with PerSample(layer) as tap:
        found = tap.collect(3, lambda rows: (layer(x[rows]) * weights[rows]).sum(), SquaredNorms)
    b, a = weights.double(), x.double()
    expected = (b.mT @ a).square().sum((1, 2)) + b.sum(1).square().sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


class Odd(nn.Module):
    """A gain outside of any layer; an embedding that some samples do not reach, tied to what is no layer either."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.rare = nn.Parameter(torch.ones(4))

    def forward(self, ids):
        x = self.linear(self.embedding(ids)) * self.scale
        for row in (ids == 8).any(1).nonzero():
            x = x + self.rare * (torch.arange(len(ids)) == row).view(-1, 1, 1)
        return (x @ self.embedding.weight.T).sin().square().sum((1, 2))


def test_parameters_without_a_rule(caplog):
    torch.manual_seed(0)
    _declined._logged.clear()
    model, ids = Odd().double(), torch.tensor([[1, 2, 3], [8, 1, 1], [4, 4, 4]])
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
        parameter.requires_grad_(name != "linear.bias")
    before = {name: (p.grad, p.requires_grad) for name, p in model.named_parameters()}
    loss = lambda rows: model(ids[rows]).sum()  # noqa: E731
    directions = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    with caplog.at_level("INFO", "pyunlearn"), PerSample(model) as tap:
        assert tap.declined == "no ghost norm rule covers scale, rare"
        squared = tap.collect(3, loss, SquaredNormsByParameter)
        dots = tap.collect(3, loss, lambda: Dots(directions))
    assert caplog.text.count("one backward a batch is not used: no ghost norm rule covers scale, rare") == 1
    assert {name: (p.grad, p.requires_grad) for name, p in model.named_parameters()} == before
    assert squared.keys() == dots.keys() == directions.keys()
    chosen = [model.get_parameter(name) for name in directions]
    for i in range(3):
        gradients = torch.autograd.grad(model(ids[i : i + 1]).sum(), chosen, allow_unused=True)
        for (name, direction), gradient in zip(directions.items(), gradients, strict=True):
            gradient = torch.zeros_like(direction) if gradient is None else gradient
            torch.testing.assert_close(squared[name][i], gradient.square().sum(), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(dots[name][i], (gradient * direction).sum(), rtol=1e-10, atol=1e-12)


class Again(nn.Module):
    """A parameter without a rule that is used in two segments."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        for reentrant in self.reentrant:
            x = checkpoint(lambda x: (self.linear(x) * self.scale).sin(), x, use_reentrant=reentrant)
        return x.square().sum((1, 2))


def test_gradients_in_parts():
    model, x = Again().double(), torch.randn(3, 2, 4).double()
    model.reentrant = (False, False)
    expected = []
    for i in range(3):
        gradients = torch.autograd.grad(model(x[i : i + 1]).sum(), tuple(model.parameters()))
        expected.append(sum(gradient.square().sum() for gradient in gradients))
    with PerSample(model) as tap:
        close(tap.collect(3, lambda rows: model(x[rows]).sum(), SquaredNorms), torch.stack(expected))
    model.reentrant = (True, True)
    x.requires_grad_()
    with PerSample(model) as tap, pytest.raises(RuntimeError, match="scale: its gradient comes in parts, needs check"):
        tap.collect(3, lambda rows: model(x[rows]).sum(), SquaredNorms)


def test_what_cannot_be_asked_for():
    odd = Odd()
    odd.scale.register_post_accumulate_grad_hook(print)
    with pytest.raises(ValueError, match="scale: has a post-accumulate-grad hook, which would be set off"):
        PerSample(odd)
    model, x = nn.Linear(4, 4), torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="none of the name 'nothing'"):
        PerSample(model, ["nothing"])
    with PerSample(model), pytest.raises(RuntimeError, match="within collect"):
        model(x)
    assert model.weight.requires_grad
    with pytest.raises(ValueError, match="nothing to differentiate"):
        PerSample(model.requires_grad_(False))


def test_an_exception_leaves_the_model_as_it_was():
    model = nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="shapes"), PerSample(model) as tap:
        tap.collect(2, lambda rows: model(torch.randn(2, 5)).sum(), SquaredNorms)
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_sharded_parameter_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        model = nn.Linear(4, 4)
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh, [Shard(0)]))
        with pytest.raises(TypeError, match="weight: is sharded"):
            PerSample(model)
    finally:
        torch.distributed.destroy_process_group()
