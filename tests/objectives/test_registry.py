"""Names, options, presets, documentation, objectives of one's own, and what bad input says."""

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
from pyunlearn.objectives import TokenInputs
from pyunlearn.objectives.stub import stub
from pyunlearn.ops import TokenRule, token_stats

from .straight import BROADCAST, NAMES, PADDED, PRESETS

LOGP = -torch.rand(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)
FLAT = LOGP.flatten()
IDS = torch.tensor([0, 0, 0, 1, 1, 1])


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
        ("rr", "open_unlearning", {"layer": 8}),
        ("dpo", "closer_look_code", {}),
    ],
)
def test_presets_change_defaults_that_are_not_given(name, preset, changed):
    assert o.get(name, preset=preset).options == {**DEFAULTS[name], **changed}
    for option in changed:
        other = 3 if option in ("layer", "skip") else 0.25
        assert o.get(name, preset=preset, **{option: other}).options[option] == other


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
        ("undial", "paper"): (("kl_qp", "logp"), "kl", ("answer",), "supervised", "tokens"),
        ("undial", "open_unlearning"): (("kl_qp", "logp"), "kl", ("answer",), "followed", "tokens"),
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: o.get("wgaa"),
            "objective='wgaa': did you mean wga or ga? needs one of ga, wga, npo",
        ),
        (lambda: o.get(["wga"]), "objective=['wga']: did you mean wga"),
        (lambda: o.names("both"), "role='both': needs one of forget, retain, None"),
        (lambda: o.get("wga", alhpa=1), "wga: option='alhpa': did you mean alpha?"),
        (
            lambda: o.get("wga", beta=1),
            "wga: option='beta': needs one of alpha, preset, reduction, temperature, keep",
        ),
        (
            lambda: o.get("wga", preset="g_effect"),
            "wga: preset='g_effect': did you mean g_effect_code",
        ),
        (lambda: o.get("wga", reduction="mean"), "wga: reduction='mean': did you mean token_mean"),
        (lambda: o.get("dpo", reduction="token_mean"), "needs one of sequence_mean, sum"),
        (lambda: o.get("npo", beta=0), "npo: beta=0: needs a finite number > 0"),
        (lambda: o.get("npo", beta=math.inf), "npo: beta=inf: needs a finite number > 0"),
        (lambda: o.get("npo", beta=math.nan), "npo: beta=nan: needs a finite number > 0"),
        (lambda: o.get("npo", beta="0.1"), "npo: beta='0.1': needs a finite number > 0"),
        (lambda: o.get("npo", beta=True), "npo: beta=True: needs a finite number > 0"),
        (lambda: o.get("wga", alpha=-1), "wga: alpha=-1: needs a finite number >= 0"),
        (lambda: o.get("simnpo", margin=math.nan), "simnpo: margin=nan: needs a finite number"),
        (lambda: o.get("rmu", layer=0), "rmu: layer=0: needs one of ('shallow', 'middle', 'deep'), or a whole number"),
        (lambda: o.get("rmu", layer=1.5), "rmu: layer=1.5: needs one of"),
        (lambda: o.get("rr", layer="midle"), "rr: layer='midle': needs one of"),
        (lambda: o.get("rmu", seed=-1), "rmu: seed=-1: needs a whole number from 0"),
        (lambda: o.get("rmu", c=-1), "rmu: c=-1: needs a finite number >= 0"),
        (lambda: o.rmu(FLAT), "hidden: needs shape (B, T, H) or flat (N, H), got (6,)"),
        (lambda: o.rmu(torch.ones(2, 3, 0)), "hidden: needs shape (B, T, H) or flat (N, H), got (2, 3, 0)"),
        (lambda: o.rmu(torch.ones(2, 3, 4), MASK[:, :2]), "mask: needs the shape of hidden, (2, 3), got (2, 2)"),
        (lambda: o.rr(torch.ones(2, 3, 4)), "rr (preset paper) needs ref_hidden, the frozen reference's hidden per"),
        (
            lambda: o.rr(torch.ones(2, 3, 4), torch.ones(2, 3, 5)),
            "ref_hidden: needs the shape of hidden, (2, 3, 4), got (2, 3, 5)",
        ),
        (lambda: o.wga(LOGP, MASK[:, :2]), "mask: needs the shape of logp, (2, 3), got (2, 2)"),
        (lambda: o.npo(LOGP, FLAT), "ref_logp: needs the shape of logp, (2, 3), got (6,)"),
        (
            lambda: o.npo(LOGP, mask=MASK),
            "npo (preset paper) needs ref_logp, the frozen reference's logp per token; got None; it is "
            "token_stats_of(frozen, batch).logp of the frozen model",
        ),
        (lambda: o.wga(), "wga (preset paper) needs logp, token_stats' 'logp'; got None"),
        (lambda: o.npo(FLAT, FLAT), "sequence_ids is needed with flat (N,) statistics"),
        (lambda: o.ga(FLAT, reduction="sequence_mean"), "sequence_ids is needed with flat (N,) statistics"),
        (lambda: o.ga(FLAT, sequence_ids=IDS[:2]), "sequence_ids: needs the shape of logp, (6,), got (2,)"),
        (
            lambda: o.ga(LOGP, sequence_ids=IDS),
            "sequence_ids goes with flat (N,) statistics, but logp has shape",
        ),
        (lambda: o.ga(LOGP, num_sequences=3), "num_sequences=3: logp has 2 rows"),
        (lambda: o.ga(FLAT, num_sequences=-1), "num_sequences=-1: needs a whole number >= 0"),
        (lambda: o.ga(LOGP[None]), "got (1, 2, 3); of logits, token_stats(logits, targets) makes it"),
        (lambda: o.ga(LOGP, LOGP > 0, LOGP), "only ('logp', 'mask') go by position, got 3 arguments"),
        (lambda: o.ga(LOGP, MASK, mask=MASK), "ga: mask is given twice"),
        (lambda: o.wga(LOGP, msak=MASK), "wga: argument='msak': did you mean mask?"),
        (lambda: o.wga(LOGP, vocab_size=5), "wga: argument='vocab_size': "),
        (lambda: o.me(LOGP), "me: vocab_size=None: needs V, a whole number >= 1"),
        (lambda: o.me(LOGP, vocab_size=0), "me: vocab_size=0: needs V"),
        (lambda: o.get("bst", k=0), "bst: k=0: needs a whole number from 1 to 256"),
        (lambda: o.get("bst", k=257), "bst: k=257: needs a whole number from 1 to 256"),
        (lambda: o.get("bst", lam=1.5), "bst: lam=1.5: needs a number from 0 to 1"),
        (lambda: o.get("undial", b=0), "undial: b=0: needs a finite number > 0"),
        (lambda: o.get("ce_u", skip=-1), "ce_u: skip=-1: needs a whole number >= 0"),
        (lambda: o.get("flat", divergence="neyman"), "flat: divergence='neyman': needs one of ('tv', 'kl', "),
        (lambda: o.get("ga", temperature=0), "ga: temperature=0: needs a finite number > 0"),
        (lambda: o.get("ga", keep=0), "ga: keep=0: needs a number above 0, up to 1"),
        (lambda: o.get("ga", keep=True), "ga: keep=True: needs a number above 0, up to 1"),
        (lambda: o.get("ga", kept="small"), "ga: kept='small': did you mean smallest"),
        (lambda: o.get("kl", preset="open_unlearning", keep=0.5), "which counts padding too"),
        (lambda: o.kl(LOGP, keep=0.5), "kl: keep=0.5 goes by the likelihood of each token: needs logp"),
        (lambda: o.undial(LOGP, LOGP, LOGP), "undial (preset paper) needs ref_entropy, the frozen reference's entropy"),
        (
            lambda: o.flat(LOGP, LOGP, preset="flat_code", refusal_num_positions=2),
            "flat: answer_num_positions=None: needs T - 1 of rows padded to T, a whole number >= 1",
        ),
        (
            lambda: o.pdu(uniform_ce=LOGP),
            "needs max_logp, token_stats' 'max_logp'; got None; it is asked for by outputs=",
        ),
        (lambda: o.get("me", positions="all"), "me: positions='all': needs one of real, template_free, supervised"),
        (lambda: o.ga(LOGP, count=-1), "count=-1: needs a finite number >= 0"),
        (lambda: o.ga(LOGP, count=math.nan), "count=nan: needs a finite number >= 0"),
        (lambda: o.ga(LOGP, count=torch.ones(2)), "count: needs a number or a 0-d tensor, got shape (2,)"),
        (lambda: o.ap(LOGP, LOGP[:1]), "needs as many sequences in each batch"),
        (lambda: o.ap(FLAT, LOGP), "refusal_sequence_ids is needed with flat (N,) statistics"),
        (
            lambda: o.dpo(LOGP, LOGP, LOGP, LOGP, answer_mask=MASK[:1]),
            "answer_mask: needs the shape of answer_logp",
        ),
        (
            lambda: o.dpo(LOGP, LOGP, LOGP, LOGP[:1]),
            "answer_ref_logp: needs the shape of answer_logp, (2, 3), got",
        ),
        (
            lambda: o.get("dpo")({"answer": TokenInputs({})}),
            "stats needs ['refusal', 'answer'], 'refusal' is missing",
        ),
        (
            lambda: o.get("kl")({"answer": TokenInputs({"logp": LOGP})}),
            "kl (preset paper) needs kl_pq, token_stats' 'kl_pq'; got None; it is asked for by outputs=('kl_pq',), "
            "with reference=",
        ),
        (lambda: o.ga(LOGP, MASK.to("meta")), "mask: needs the device of logp, cpu, got meta"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: o.ga([1.0]), "logp: needs a tensor, got list"),
        (lambda: o.ga(IDS), "logp: needs a floating dtype, got torch.int64"),
        (lambda: o.ga(LOGP, [True]), "mask: needs a tensor, got list"),
        (
            lambda: o.npo(LOGP, MASK),
            "npo: ref_logp: needs a floating dtype, got torch.bool, which is a mask: give it as mask=; ref_logp is "
            "token_stats_of(frozen, batch).logp",
        ),
        (
            lambda: o.dpo(LOGP, LOGP, LOGP, MASK),
            "dpo: answer_ref_logp: needs a floating dtype, got torch.bool, which is a mask: give it as answer_mask=",
        ),
        (lambda: o.ga(token_stats(LOGP, IDS[:2])), "logp: needs a tensor, got TokenStats, give its .logp"),
        (lambda: o.get("ga")({"answer": LOGP}), "ga: stats['answer']: needs TokenInputs, got Tensor"),
        (lambda: o.ga(LOGP, MASK.int()), "mask: needs torch.bool, got torch.int32"),
        (
            lambda: o.npo(FLAT, FLAT, sequence_ids=IDS.float()),
            "sequence_ids: needs torch.int64 or torch.int32",
        ),
    ],
)
def test_bad_types(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("ids", [IDS + 1, IDS - 1])
def test_sequence_ids_out_of_range(ids):
    with pytest.raises(IndexError, match="sequence_ids: needs 0 <= id < num_sequences=2"):
        o.npo(FLAT, FLAT, sequence_ids=ids, num_sequences=2)


def test_every_preset_can_be_had():
    for name, preset in PRESETS:
        assert o.get(name, preset=preset).preset == preset
