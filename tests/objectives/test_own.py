"""Objectives of one's own: registered, found by name, and what registration refuses."""

from __future__ import annotations

import pytest
import torch

from pyunlearn import objectives as o
from pyunlearn.objectives import TokenInputs

LOGP = -torch.rand(2, 3)


MASK = torch.ones(2, 3, dtype=torch.bool)


FLAT = LOGP.flatten()


IDS = torch.tensor([0, 0, 0, 1, 1, 1])


class TestOwn:
    @pytest.fixture(autouse=True)
    def _own(self, own_registry):
        pass

    def test_three_lines(self):
        @o.register("focal_ga", source="mine")
        def focal_ga(logp, *, gamma=2.0):
            return (1 - logp.exp()).detach() ** gamma * logp

        assert o.names("forget")[-1] == "focal_ga"
        mask = torch.tensor([[True, False, True], [False, False, False]])
        want = ((1 - LOGP.exp()) * LOGP)[mask].mean()
        torch.testing.assert_close(focal_ga(LOGP, mask, gamma=1.0), want)
        flat = TokenInputs({"logp": LOGP[mask]})
        torch.testing.assert_close(o.get("focal_ga", gamma=1)({"answer": flat}), want)
        assert o.get("focal_ga").options == {"gamma": 2.0}
        assert o.table()[-5].summary == "focal_ga"

    def test_sequence_level_with_ranges_and_presets(self):
        @o.register(
            "hinge",
            role="retain",
            level="sequence",
            formula="mean of relu(margin - (L° - L)/n)",
            presets={"wide": {"margin": 2.0}},
        )
        def hinge(logp, ref_logp, *, num_tokens, margin: o.NonNegative = 1.0):
            """Stay within a margin of the reference."""
            return (margin - (logp - ref_logp) / num_tokens).relu()

        assert o.get("hinge").reduction == "sequence_mean"
        assert o.get("hinge", preset="wide").options == {"margin": 2.0}
        assert hinge(LOGP, LOGP, preset="wide").item() == 2.0
        assert hinge(FLAT, FLAT + 0.5, sequence_ids=IDS).item() == pytest.approx(1.5)
        with pytest.raises(ValueError, match="hinge: margin=-1: needs a finite number >= 0"):
            o.get("hinge", margin=-1)

    def test_another_formula_for_a_preset(self):
        @o.register_preset("gd", "entropy", formula="mean of H_t", positions="all")
        def gd_entropy(entropy):
            return entropy

        assert o.get("gd", preset="entropy").outputs == ("entropy",)
        assert o.get("gd", preset="entropy").positions == "all"
        assert "entropy: loss = mean of H_t; positions = all" in o.gd.__doc__
        torch.testing.assert_close(o.gd(LOGP, preset="entropy"), LOGP.mean())

    def test_options_of_other_types(self):
        @o.register("switched")
        def switched(logp, *, positive=False, mode="plain"):
            return -logp if positive else logp

        torch.testing.assert_close(switched(LOGP, positive=True), -LOGP.mean())
        with pytest.raises(ValueError, match=r"switched: positive=1: needs a bool"):
            o.get("switched", positive=1)
        with pytest.raises(ValueError, match=r"switched: mode=1: needs a str"):
            o.get("switched", mode=1)

    def test_the_same_cell_may_run_twice(self):
        for factor in (1.0, 2.0):

            @o.register("again")
            def again(logp, *, by=factor):
                return by * logp

        assert o.get("again").options == {"by": 2.0}

    @pytest.mark.parametrize(
        ("options", "function", "message"),
        [
            ({"name": "ga"}, lambda logp: 0.0, "name='ga' is taken by pyunlearn.objectives.forget.ga"),
            ({"role": "forgett"}, lambda logp: 0.0, "role='forgett': did you mean forget"),
            ({"level": "word"}, lambda logp: 0.0, "level='word': needs one of token, sequence"),
            ({"positions": "rael"}, lambda logp: 0.0, "did you mean real"),
            ({"batch": "refusals"}, lambda logp: 0.0, "did you mean refusal"),
            (
                {"reduction": "mean"},
                lambda logp: 0.0,
                "reduction='mean': did you mean token_mean",
            ),
            ({"presets": {"x": {"gama": 1}}}, lambda logp, *, gamma=1.0: 0.0, "did you mean gamma"),
            ({}, lambda logpp: 0.0, "parameter='logpp': did you mean logp"),
            ({}, lambda logp, gamma=2.0: 0.0, "parameter 'gamma' needs to be"),
            ({}, lambda *, gamma=2.0: 0.0, "needs a positional parameter named after a statistic"),
            ({}, lambda refusal_logp, answer_logp: 0.0, "need level='sequence'"),
            ({}, lambda logp, *, num_tokens: 0.0, "num_tokens needs level='sequence'"),
            ({"slope": 1.0}, lambda logp, *, inverse_length: 0.0, "inverse_length needs level='token' and no slope"),
            (
                {},
                lambda logp: logp.mean(),
                r"mine, preset='paper': needs to return the loss of each token, \(4,\) for four",
            ),
            ({"level": "sequence"}, lambda logp: 0.0, "needs to return the loss of each sequence, .* got float"),
            ({}, lambda hidden: hidden, r"got shape \(4, 1\)"),
            ({}, lambda logp: logp.neg_log(), r"mine, preset='paper': fails on four tokens for {}: AttributeError"),
            (
                {"presets": {"x": {"a": 0.0}}},
                lambda logp, *, a=1.0: logp if a else a,
                "mine, preset='x': needs to return",
            ),
        ],
    )
    def test_what_cannot_be_registered(self, options, function, message):
        with pytest.raises(ValueError, match=message):
            o.register(**{"name": "mine", **options})(function)
        assert "mine" not in o.names()

    def test_preset_of_an_unknown_objective(self):
        with pytest.raises(ValueError, match="objective='gdd': did you mean gd"):
            o.register_preset("gdd", "mine", formula="")(lambda logp: logp)
