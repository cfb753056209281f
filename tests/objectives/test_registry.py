"""Names, options, presets, documentation, and objectives of one's own."""

from __future__ import annotations

import copy
import doctest
import inspect
import math
import pickle
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from pyunlearn import objectives as o
from pyunlearn.objectives.registry import OF_ANY
from pyunlearn.objectives.representation import BY_SIZE, PLAIN, check_layers, check_scale
from pyunlearn.objectives.stub import stub
from pyunlearn.ops import TokenRule

from .straight import BROADCAST, NAMES, PADDED, PRESETS


def test_names():
    assert o.names() == (*o.names("forget"), *o.names("retain"))
    first = ("ga", "wga", "npo", "tnpo", "wtnpo", "simnpo", "satimp", "me", "bst", "undial", "ce_u", "pdu")
    assert o.names("forget") == (*first, "altpo", "whp", "rmu", "idk", "dpo", "flat")
    assert o.names("retain") == ("rr", "gd", "kl", "ap")
    assert all(getattr(o, name).__name__ == name for name in o.names())


def test_get_keeps_what_is_chosen():
    chosen = o.get("wga", alpha=5, reduction="sequence_mean")
    assert (chosen.name, chosen.preset, chosen.reduction) == ("wga", "paper", "sequence_mean")
    assert chosen.options == {"alpha": 5.0}
    assert o.get("wga", alpha=5, reduction="sequence_mean") == chosen != o.get("wga")
    assert hash(chosen) == hash(copy.deepcopy(chosen))
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    with pytest.raises(AttributeError):
        chosen.name = "ga"


DEFAULTS = {
    "ga": {},
    "wga": {"alpha": 1.0},
    "npo": {"beta": 0.1},
    "tnpo": {"beta": 4.0, "epsilon": 0.0},
    "wtnpo": {"alpha": 1.5, "beta": 5.0, "epsilon": 0.0},
    "simnpo": {"beta": 4.5, "margin": 0.0},
    "satimp": {"beta1": 5.0, "beta2": 0.1},
    "me": {"positions": "real"},
    "idk": {},
    "dpo": {"beta": 0.1, "factor": 2.0},
    "altpo": {"beta": 0.1, "factor": 2.0, "alternates": 5, "sampling_temperature": 1.0, "max_new_tokens": 200},
    "whp": {},
    "gd": {},
    "kl": {},
    "ap": {"beta": 0.1},
    "rmu": {"c": 2.0, "layer": "middle", "seed": 0},
    "rr": {"layer": "middle"},
    "bst": {"lam": 0.2, "k": 20},
    "undial": {"b": 10.0},
    "ce_u": {"skip": 0},
    "pdu": {},
    "flat": {"divergence": "tv"},
}


@pytest.mark.parametrize("name", NAMES)
def test_defaults(name):
    assert o.get(name).options == DEFAULTS[name]


@pytest.mark.parametrize(
    ("name", "preset", "changed"),
    [
        ("wga", "g_effect_code", {"alpha": 5.0}),
        ("npo", "g_effect_code", {"beta": 0.5}),
        ("tnpo", "g_effect_code", {"epsilon": 1e-5}),
        ("wtnpo", "g_effect_code", {"beta": 4.0, "epsilon": 1e-5}),
        ("satimp", "open_unlearning", {"beta2": 1.0}),
        ("dpo", "standard", {"factor": 1.0}),
        ("rmu", "wmdp", {"c": 20.0, "layer": 8}),
        ("rmu", "wmdp_paper", {"c": 6.5, "layer": 8}),
        ("bst", "bs_code", {}),
        ("bst", "bstw", {"beta": 0.1}),
        ("undial", "open_unlearning", {}),
        ("ce_u", "open_unlearning", {"skip": 1}),
        ("flat", "flat_code", {}),
        ("rmu", "open_unlearning", {"layer": 8}),
        ("rr", "wmdp", {"layer": 8}),
        ("rr", "wmdp_paper", {"layer": 8}),
        ("rr", "g_effect_code", {}),
        ("rr", "uwc_code", {}),
        ("rr", "open_unlearning", {"layer": 8}),
        ("dpo", "closer_look_code", {}),
    ],
)
def test_presets_change_defaults_that_are_not_given(name, preset, changed):
    assert o.get(name, preset=preset).options == {**DEFAULTS[name], **changed}
    for option in changed:
        other = 3 if option in ("layer", "skip") else 0.25
        assert o.get(name, preset=preset, **{option: other}).options[option] == other


def test_the_page_of_options_has_those_of_every_objective():
    page = (Path(__file__).parents[2] / "docs" / "options.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1] for row in page.split("##")[0].splitlines() if row.startswith("| `")]
    keys = re.findall(r"`(\w+)`", " ".join(rows))
    assert keys == ["coefficient", *OF_ANY]
    assert {*OF_ANY} == inspect.signature(o.get).parameters.keys() - {"name", "options"}


def test_rmu_and_rr_are_of_one_scale_under_one_name():
    """A pair by the same preset: its two losses are of squares over H, or of their mean, and at one layer."""
    rmu, rr = (o.get(name).definition.variants for name in ("rmu", "rr"))
    assert rmu.keys() == rr.keys() == {*PLAIN, *BY_SIZE}
    hidden = torch.ones(1, 1, 8)
    for preset in rmu:
        one, other = o.get("rmu", preset=preset, c=0.0), o.get("rr", preset=preset)
        assert one.layer == other.layer
        assert (one.positions, one.reduction) == (other.positions, other.reduction)
        pair = float(o.rmu(hidden, c=0.0, preset=preset)), float(o.rr(hidden, torch.zeros(1, 1, 8), preset=preset))
        assert pair == ((8, 8) if preset in PLAIN else (1, 1))
        check_scale([one, other])
        for second in rmu:
            if (preset in PLAIN) != (second in PLAIN):
                with pytest.raises(ValueError, match=rf"^rmu \(preset {preset}, .*rr \(preset {second}, .*one scale"):
                    check_scale([o.get("rr", preset=second), o.get("ga"), one])
    check_scale([o.get("rmu", preset="wmdp"), o.get("gd")])


def test_rr_is_at_a_layer_of_rmu():
    deep = {"shallow": 4, "middle": 8, "deep": 12}
    number = lambda layer: deep.get(layer, layer)  # noqa: E731
    check_layers([o.get("rmu", layer=8), o.get("rmu", layer=4), o.get("rr")], number)
    check_layers([o.get("rr", layer=3), o.get("ga")], number)
    message = r"^rmu \(preset paper, layer 7\) and rr \(preset paper, layer 'middle'\): needs one layer \('middle' is 8"
    with pytest.raises(ValueError, match=message):
        check_layers([o.get("rmu", layer=7), o.get("rr")], number)


class TestNeeds:
    """What the trainer reads."""

    # name, preset: outputs, reference, batches, positions, unit
    EXPECTED: ClassVar = {
        ("ga", "paper"): (("logp",), None, ("answer",), "supervised", "tokens"),
        ("npo", "paper"): (("logp",), "logp", ("answer",), "supervised", "sequences"),
        ("tnpo", "paper"): (("logp",), "logp", ("answer",), "supervised", "tokens"),
        ("simnpo", "paper"): (("logp",), None, ("answer",), "supervised", "sequences"),
        ("me", "paper"): (("entropy",), None, ("answer",), "real", "tokens"),
        ("me", "closer_look_code"): (("uniform_ce",), None, ("answer",), "followed", "tokens"),
        ("idk", "paper"): (("logp",), None, ("refusal",), "supervised", "tokens"),
        ("dpo", "paper"): (("logp",), "logp", ("refusal", "answer"), "supervised", "sequences"),
        ("ap", "paper"): (("logp",), None, ("refusal", "answer"), "supervised", "sequences"),
        ("altpo", "paper"): (("logp",), "logp", ("alternate", "answer"), "supervised", "sequences"),
        ("whp", "paper"): (("logp",), None, ("generic",), "supervised", "tokens"),
        ("kl", "paper"): (("kl_pq",), "kl", ("answer",), "supervised", "tokens"),
        ("kl", "open_unlearning"): (("kl_qp",), "kl", ("answer",), "all", "tokens"),
        ("rmu", "paper"): ((), None, ("answer",), "supervised", "tokens"),
        ("rmu", "wmdp"): ((), None, ("answer",), "all", "tokens"),
        ("rmu", "open_unlearning"): ((), None, ("answer",), "supervised", "sequences"),
        ("rr", "paper"): ((), "hidden", ("answer",), "supervised", "tokens"),
        ("bst", "paper"): (("logp", "topk"), None, ("answer",), "supervised", "sequences"),
        ("bst", "bstw"): (("logp", "topk"), "logp", ("answer",), "supervised", "sequences"),
        ("undial", "paper"): (("kl_qp",), "kl", ("answer",), "supervised", "tokens"),
        ("undial", "open_unlearning"): (("kl_qp",), "kl", ("answer",), "followed", "tokens"),
        ("ce_u", "paper"): (("log_nll", "entropy"), None, ("answer",), "supervised", "tokens"),
        ("pdu", "paper"): (("topk", "uniform_ce"), None, ("answer",), "supervised", "tokens"),
        ("flat", "paper"): (("logp",), None, ("refusal", "answer"), "supervised", "sequences"),
    }

    @pytest.mark.parametrize(("name", "preset"), EXPECTED)
    def test_needs(self, name, preset):
        chosen = o.get(name, preset=preset)
        needs = (chosen.outputs, chosen.reference, chosen.batches, chosen.positions, chosen.unit)
        assert needs == self.EXPECTED[name, preset]

    def test_whose_hidden_states(self):
        assert {name: o.get(name).layer for name in ("ga", "rmu", "rr")} == {
            "ga": None,
            "rmu": "middle",
            "rr": "middle",
        }
        assert [o.get("rr", layer=layer).layer for layer in (3, -1, "deep")] == [3, -1, "deep"]

    def test_the_k_and_the_reference_per_token(self):
        assert [o.get("bst").k, o.get("bst", k=3).k, o.get("pdu").k, o.get("ga").k] == [20, 3, 1, None]
        outputs = [o.get(name).reference_outputs for name in ("ga", "kl", "npo", "rr", "undial")]
        assert outputs == [(), (), ("logp",), (), ("logp", "entropy")]
        assert o.get("bst", preset="bstw").reference_outputs == ("logp",)

    def test_any_objective_has_temperature_and_likelihood_selection(self):
        for name in o.names():
            usual = o.get(name)
            assert (usual.temperature, usual.keep, usual.kept) == (1.0, 1.0, "smallest")
            chosen = o.get(name, temperature=2, keep=0.8, kept="largest")
            assert (chosen.temperature, chosen.selection.keep, chosen.selection.largest) == (2.0, 0.8, True)
            assert set(chosen.outputs) == {*usual.outputs, "logp"}  # which the selection goes by
            assert chosen != usual
        assert o.get("ce_u", skip=2).selection == (2, 1.0, False)

    def test_an_option_may_choose_the_positions(self):
        for each in ("real", "template_free", "supervised"):
            assert o.get("me", positions=each).positions == each

    def test_unit_follows_the_reduction(self):
        units = {reduction: o.get("ga", reduction=reduction).unit for reduction in o.REDUCTIONS}
        assert units == {
            "token_mean": "tokens",
            "sum": "tokens",
            "sequence_mean": "sequences",
            "sequence_token_mean": "sequences",
        }


class TestDocumentation:
    def test_table_has_every_objective(self):
        rows = o.table()
        assert [row.name for row in rows] == list(o.names())
        for row in rows:
            assert all((row.role, row.formula, row.source, row.summary)), row.name
            assert row.defaults == {
                **DEFAULTS[row.name],
                "preset": o.get(row.name).preset,
                "reduction": o.get(row.name).reduction,
            }
            assert row.defaults["preset"] == "paper"
            assert row.paper_reduction == o.get(row.name, reduction="paper").reduction
            for preset, changes in row.presets.items():
                chosen = o.get(row.name, preset=preset)
                assert f"; reduction = {chosen.reduction}" in changes
                uneven = chosen.positions in ("all", "followed") or (row.name, preset) in (*BROADCAST, PADDED)
                assert uneven == ("depends on how a step is split" in changes)
            assert "\n" not in row.summary
        presets = {row.name: row.presets for row in rows}
        assert "; positions = all; c = 20.0; layer = 8; " in presets["rmu"]["wmdp"]

    @pytest.mark.parametrize("row", o.table(), ids=NAMES)
    def test_docstring_tells_formula_defaults_presets_source(self, row):
        text = " ".join(getattr(o, row.name).__doc__.split())
        assert f"loss = {row.formula}" in text
        assert f"Source: {row.source}" in text
        for option, value in row.defaults.items():
            assert f"{option} = {value}" in text
        for preset, changes in row.presets.items():
            assert f"{preset}: {changes}" in text

    @pytest.mark.parametrize("name", NAMES)
    def test_docstring_names_every_argument(self, name):
        function = getattr(o, name)
        for parameter in inspect.signature(function).parameters:
            assert f"    {parameter}: " in function.__doc__

    @pytest.mark.parametrize("name", NAMES)
    def test_signature_has_the_defaults(self, name):
        parameters = inspect.signature(getattr(o, name)).parameters
        defaults = {key: parameter.default for key, parameter in parameters.items()}
        assert defaults | o.table()[NAMES.index(name)].defaults == defaults
        assert list(defaults)[: len(o.get(name).variant.tensors)] == list(o.get(name).variant.tensors)

    def test_editors_see_the_signatures(self):
        """`__init__.pyi` is as the registry has it; mypy reads it in `typed.py`."""
        path = Path(o.__file__).with_name("__init__.pyi")
        assert path.read_text(encoding="utf-8") == stub(), "run python -m pyunlearn.objectives.stub"
        functions = path.read_text(encoding="utf-8").partition("]\n")[2]
        exec("from __future__ import annotations\n" + functions, space := {"overload": lambda function: function})
        for name in o.names():
            assert list(inspect.signature(space[name]).parameters) == list(
                inspect.signature(getattr(o, name)).parameters
            )

    @pytest.mark.parametrize("where", [*NAMES, "get", "the package"])
    def test_examples(self, where, own_registry):
        text = o.__doc__ if where == "the package" else getattr(o, where).__doc__
        names = {**vars(o), "torch": torch, "math": math, "TokenRule": TokenRule, "__name__": "examples"}
        test = doctest.DocTestParser().get_doctest(text, names, where, None, 0)
        assert test.examples
        assert doctest.DocTestRunner().run(test).failed == 0


def test_every_preset_can_be_had():
    for name, preset in PRESETS:
        assert o.get(name, preset=preset).preset == preset
