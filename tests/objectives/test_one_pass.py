import doctest
import importlib
import math

import pytest
import torch

import pyunlearn as pu
from pyunlearn.objectives import REDUCTIONS, TokenInputs, get, names, one_pass, register, register_preset
from pyunlearn.ops import TokenRule

from .straight import PRESETS

module = importlib.import_module("pyunlearn.objectives.one_pass")
CASES = [(name, preset) for name, preset in PRESETS if get(name, preset=preset).variant.slope is not None]
OPTIONS = {  # other than the defaults
    "wga": {"alpha": 0.3},
    "satimp": {"beta1": 0.5, "beta2": 2.0},
    "tnpo": {"beta": 1.5, "epsilon": 0.02},
    "wtnpo": {"alpha": 0.5, "beta": 2.0, "epsilon": 0.02},
}


def problem(objective, count=None, flat=False):
    """d(logits) of the objective's loss by autograd, and by one pass."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, 40, generator=g, dtype=torch.float64)
    reference = logits + torch.randn(3, 5, 40, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 40, (3, 5), generator=g)
    mask = torch.rand(3, 5, generator=g) < 0.7
    mask[1] = False
    targets = targets.masked_fill(~mask, -100)
    layout = {}
    if flat:
        layout = {"sequence_ids": torch.arange(3).repeat_interleave(5), "num_sequences": 3}
        logits, reference, targets, mask = (tensor.flatten(0, 1) for tensor in (logits, reference, targets, mask))
    ref_logp = pu.token_stats(reference, targets).logp
    x = logits.clone().requires_grad_()
    stats = pu.token_stats(x, targets, objective.outputs, reference=reference)
    inputs = TokenInputs(stats.as_dict(), ref_logp=ref_logp, mask=mask, vocab_size=40, **layout)
    (by_autograd,) = torch.autograd.grad(objective({objective.batches[0]: inputs}, count), x)
    arguments = one_pass(objective, mask, ref_logp, count=count, **layout)
    return by_autograd, pu.value_and_grad(logits, targets, reference=reference, **arguments)[1]


@pytest.mark.parametrize(("name", "preset"), CASES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("count", [None, 17])
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_gradient_is_the_objectives(name, preset, reduction, count, flat):
    for options in ({}, OPTIONS.get(name, {})):
        by_autograd, ours = problem(get(name, preset=preset, reduction=reduction, **options), count, flat)
        torch.testing.assert_close(ours, by_autograd, atol=1e-7, rtol=1e-5)
        assert by_autograd.abs().max() > 0


def test_every_token_separable_objective_has_its_slope():
    separable = [
        (name, preset)
        for name, preset in PRESETS
        if get(name).definition.level == "token"
        and get(name, preset=preset).layer is None
        and len(get(name, preset=preset).outputs) == 1  # of one statistic
        and not get(name, preset=preset).lowered  # no reference of value_and_grad is
    ]
    assert separable == CASES
    options = {name: get(name, preset=preset).options.keys() - {"positions"} for name, preset in CASES}
    assert set(OPTIONS) == {name for name in options if options[name]}


class TestOwn:
    @pytest.fixture(autouse=True)
    def _own(self, own_registry):
        pass

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_takes_the_fast_path(self, reduction):
        @register("focal_tnpo", slope=-0.5, rule=lambda o: TokenRule(alpha=o["alpha"], gamma=1.0, beta=o["beta"]))
        def focal_tnpo(logp, ref_logp, *, alpha=0.5, beta=2.0):
            p, q = logp.detach().exp(), ref_logp.exp()
            return -(p ** (alpha + beta)) * (1 - p) / (p**beta + q**beta) * logp

        @register("hide", slope=3.0)
        def hide(uniform_ce, *, vocab_size):
            return 3 * uniform_ce / 1.0 - vocab_size

        for name in ("focal_tnpo", "hide"):
            by_autograd, ours = problem(get(name, reduction=reduction))
            torch.testing.assert_close(ours, by_autograd, atol=1e-7, rtol=1e-5)
            assert by_autograd.abs().max() > 0

    def test_a_presets_own_formula_has_its_own_slope_or_none(self):
        register_preset("ga", "half", formula="mean of -l_t / 2", slope=0.5)(lambda logp: logp / 2)
        register_preset("ga", "squared", formula="mean of -l_t^2")(lambda logp: -logp.square())
        by_autograd, ours = problem(get("ga", preset="half"))
        torch.testing.assert_close(ours, by_autograd, atol=1e-7, rtol=1e-5)
        with pytest.raises(ValueError, match="ga, preset='squared': needs a token-separable objective such as ga, wga"):
            problem(get("ga", preset="squared"))

    @pytest.mark.parametrize(
        ("how", "function"),
        [
            ({"slope": -1.0}, lambda logp, *, alpha=1.0: logp),  # the wrong sign
            ({"slope": 1.0}, lambda logp, *, alpha=1.0: (alpha * logp.detach()).exp() * logp),  # no rule
            ({"slope": 1.0, "rule": lambda o: TokenRule(alpha=1.0)}, lambda logp, *, alpha=2.0: logp.exp() ** alpha),
            ({"slope": 1.0}, lambda logp, *, alpha=1.0: logp.roll(1)),  # another token's
            ({"slope": 1.0, "rule": lambda o: TokenRule(alpha=1.0)}, lambda entropy, *, alpha=1.0: entropy),
            ({"slope": 1.0, "rule": lambda o: TokenRule(beta=1.0)}, lambda logp, ref_logp, *, alpha=1.0: logp),
        ],
    )
    def test_a_wrong_one_is_told_where_it_is_registered(self, how, function):
        told = r"slope=.* need to be d\(loss of a token\)/d\("
        with pytest.raises(ValueError, match=rf"^mine, preset='paper': {told}"):
            register("mine", **how)(function)
        assert "mine" not in names()
        if "rule" not in how:
            register("own")(lambda logp, *, alpha=1.0: -logp)
            with pytest.raises(ValueError, match=rf"^own, preset='half': {told}"):
                register_preset("own", "half", formula="", **how)(function)

    def test_where_it_runs_does_not_matter(self):
        """Neither the caller's default device nor its grad mode."""
        with torch.device("meta"), torch.inference_mode():
            register("mine", slope=1.0, rule=lambda o: TokenRule(alpha=2.0))(
                lambda logp: (2 * logp.detach()).exp() * logp
            )
        by_autograd, ours = problem(get("mine"))
        torch.testing.assert_close(ours, by_autograd, atol=1e-7, rtol=1e-5)

    def test_a_rule_that_forgets_an_option_is_told_where_it_matters(self):
        def mine(logp, *, alpha=1.0):
            return (alpha * logp.detach()).exp() * logp

        register("mine", slope=1.0, rule=lambda o: TokenRule(alpha=1.0))(mine)
        problem(get("mine"))
        with pytest.raises(ValueError, match=r"mine.*for {'alpha': 2.0}: \["):
            problem(get("mine", alpha=2))
        register("mine", slope=1.0, rule=lambda o: TokenRule(alpha=o["alpha"]))(mine)
        problem(get("mine", alpha=2))

    @pytest.mark.parametrize(
        ("how", "function", "message"),
        [
            ({"rule": lambda o: TokenRule()}, lambda logp: logp, "rule needs a slope"),
            ({"slope": "1"}, lambda logp: logp, "slope='1': needs a finite number"),
            ({"slope": math.inf}, lambda logp: logp, "slope=inf: needs a finite number"),
            (
                {"slope": 1.0, "rule": TokenRule()},
                lambda logp: logp,
                "rule=TokenRule.*: needs a function of the options",
            ),
            ({"slope": 1.0, "rule": lambda o: None}, lambda logp: logp, "its rule needs to give a TokenRule, got None"),
            ({"slope": 1.0, "rule": lambda o: o["a"]}, lambda logp: logp, r"its rule fails for {}: KeyError\('a'\)"),
            ({"slope": 1.0, "rule": lambda o: TokenRule(beta=1.0)}, lambda logp: logp, "slope=1.0 and rule=TokenRule"),
            ({"slope": 1.0, "level": "sequence"}, lambda logp: logp, "mine: slope needs level='token'"),
            ({"slope": 1.0}, lambda logp, entropy: logp, "mine: slope needs .* one statistic a token"),
            ({"slope": 1.0}, lambda hidden: hidden.sum(-1), "mine: slope needs .* one statistic a token"),
        ],
    )
    def test_what_cannot_have_a_slope(self, how, function, message):
        with pytest.raises(ValueError, match=message):
            register("mine", **how)(function)


def test_bad_input():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"npo, preset='paper': needs a token-separable objective such as .* by slope="
    ):
        one_pass(get("npo"), mask)
    with pytest.raises(
        ValueError, match=r"tnpo needs ref_logp, .* got None; it is token_stats_of\(frozen, batch\).logp"
    ):
        one_pass(get("tnpo"), mask)
    with pytest.raises(TypeError, match=r"ref_logp: needs .*float32.*, got torch.bool"):
        one_pass(get("tnpo"), mask, mask)
    with pytest.raises(ValueError, match=r"ref_logp: needs the shape of mask, \(2, 3\), got \(2,\)"):
        one_pass(get("tnpo"), mask, torch.zeros(2))
    with pytest.raises(TypeError, match="mask: needs a bool tensor, shaped like the targets, got NoneType"):
        one_pass(get("wga"), None)
    with pytest.raises(TypeError, match=r"objective: needs an Objective, as objectives\.get gives it, got str"):
        one_pass("wga", mask)


def test_docstring_example():
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert (result.attempted > 0, result.failed) == (True, 0)


@pytest.mark.parametrize(("name", "preset"), CASES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float64_has_all_its_digits(name, preset, reduction):
    by_autograd, at_once = problem(get(name, preset=preset, reduction=reduction))
    assert (at_once - by_autograd).abs().max() <= 1e-14 * by_autograd.abs().max()
