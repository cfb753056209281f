"""Every estimator against the exact gradient and the exact Hessian of models with about 4,000 parameters, in float64.

With S(z) = sum_t (1 - L_t(w + sigma z) / L_t(w)), g = grad sum_t log L_t and M = sum_t Hess(L_t) / L_t, both exact:
S(z) = -sigma g.z - sigma^2 z'Mz / 2 + O(sigma^3), for the very z that pu.gaussian_noise gives.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch

import pyunlearn as pu

from .conftest import LENGTHS, make_rows, nlls, pad

SIGMA, SEED, DRAWS, PAIRS = 1e-5, 3, 200, 60


class Exact:
    """g (samples, d), M (samples, d, d), and z (draws, d), parameters in their order, tied ones once."""

    def __init__(self, model, batch):
        names = [name for name, _ in model.named_parameters()]
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        shapes = [p.shape for p in model.parameters()]

        def one(row, at):
            parts = at.split([math.prod(shape) for shape in shapes])
            named = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
            sample = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            return nlls(lambda **inputs: torch.func.functional_call(model, named, (), inputs), sample)[0]

        gradients, traces, self.hessians = [], [], []
        for row in range(len(batch["input_ids"])):
            base = one(row, flat).detach()
            gradients.append(torch.func.grad(lambda at, row=row: one(row, at).log().sum())(flat))
            relative = torch.func.grad(lambda at, row=row, base=base: (one(row, at) / base).sum())
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                hessian = torch.func.jacrev(relative, chunk_size=256)(flat)
            assert torch.allclose(hessian, hessian.T, atol=1e-9 * float(hessian.abs().max()))
            self.hessians.append(hessian)
            traces.append(hessian.trace())
        self.gradients, self.traces, self.size = torch.stack(gradients), torch.stack(traces), len(flat)
        self.z = torch.stack(
            [
                torch.cat(
                    [pu.gaussian_noise(math.prod(s), SEED, k, n) for n, s in zip(names, shapes, strict=True)]
                ).double()
                for k in range(DRAWS)
            ]
        )

    @property
    def slopes(self):
        """g.z: (draws, samples)."""
        return self.z @ self.gradients.T

    @property
    def bends(self):
        """z'Mz: (draws, samples)."""
        return torch.stack([((self.z @ hessian) * self.z).sum(1) for hessian in self.hessians], 1)


@pytest.fixture(scope="module")
def exact(any_model, batch):
    found = Exact(any_model, batch)
    assert 3000 < found.size < 8000
    return found


@functools.cache
def score(model, estimator):
    draws = PAIRS if estimator in ("definition", "hutchinson") else DRAWS
    return pu.mrd(model, [pad(make_rows(), max(LENGTHS))], estimator, draws, SIGMA, SEED, progress=False)


def test_gradient_is_the_leading_order_of_algorithm_1(any_model, exact):
    result = score(any_model, "gradient")
    expected = SIGMA * math.sqrt(2 / math.pi) * exact.gradients.norm(dim=1)
    torch.testing.assert_close(result.value, expected, rtol=1e-10, atol=0)
    assert torch.equal(result.standard_error, torch.zeros(3, dtype=torch.float64))
    assert result.draws is None


def test_every_draw_of_algorithm_1_is_the_expansion_in_sigma(any_model, exact):
    result = score(any_model, "algorithm1")
    expected = -SIGMA * exact.slopes - SIGMA**2 / 2 * exact.bends
    scale = float(expected.abs().max())
    torch.testing.assert_close(result.draws, expected, rtol=0, atol=3e-6 * scale)  # the third order
    torch.testing.assert_close(result.value, result.draws.abs().mean(0))
    torch.testing.assert_close(result.standard_error, result.draws.abs().std(0) / math.sqrt(DRAWS))


def test_algorithm_1_is_within_four_standard_errors_of_the_gradient(any_model, exact):
    result = score(any_model, "algorithm1")
    leading = SIGMA * math.sqrt(2 / math.pi) * exact.gradients.norm(dim=1)
    assert bool(((result.value - leading).abs() <= 4 * result.standard_error).all())
    # sqrt(pi / 2 - 1) / sqrt(K)
    relative = result.standard_error / result.value
    torch.testing.assert_close(relative, torch.full((3,), 0.756 / math.sqrt(DRAWS)).double(), rtol=0.2, atol=0)
    assert bool(result.linear_ok.all())
    told = result.diagnostics
    assert told["sigma_ratio"] == pytest.approx(told["expected_ratio"], rel=1e-3)
    assert told["noise_share"] < 2e-3  # sigma / 1024 itself


def test_hutchinson_draws_are_exact(any_model, exact):
    result = score(any_model, "hutchinson")
    scale = float(exact.bends.abs().max())
    torch.testing.assert_close(result.draws, exact.bends[:PAIRS], rtol=0, atol=1e-9 * scale)
    expected = SIGMA**2 / 2 * exact.traces.abs()
    assert bool(((result.value - expected).abs() <= 4 * result.standard_error).all())


def test_definition_3_1_is_hutchinsons_and_the_trace(any_model, exact):
    definition, trace = score(any_model, "definition"), score(any_model, "hutchinson")
    # The same draws: what differs is the fourth order of sigma_eval.
    torch.testing.assert_close(definition.draws * (-2 / 3e-4**2), trace.draws, rtol=0, atol=0.05 * trace.draws.std())
    for value, other in zip(definition.value, trace.value, strict=True):
        assert abs(value - other) <= 0.05 * max(value, other)
    expected = SIGMA**2 / 2 * exact.traces.abs()
    assert bool(((definition.value - expected).abs() <= 4 * definition.standard_error).all())
    assert definition.diagnostics["sigma_ratio"] == pytest.approx(4, rel=0.05)


def test_naive_definition_3_1_is_algorithm_1_over_root_k(any_model, exact):
    """|mean S| over plain draws at sigma = 1e-5 is the noise of its first order, far above the quantity itself."""
    algorithm1 = score(any_model, "algorithm1")
    naive = algorithm1.draws.mean(0).abs()
    truth = SIGMA**2 / 2 * exact.traces.abs()
    assert float((naive / truth).median()) > 20
    ratio = naive / (algorithm1.value / math.sqrt(DRAWS))
    assert bool((ratio < 4).all())
    assert float(ratio.max()) > 0.1
