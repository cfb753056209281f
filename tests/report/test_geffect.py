"""What the page of G-effects says of them, and how its curves are told apart."""

from __future__ import annotations

import copy
import re

from pyunlearn.report.geffect import LOOKS, section, summary

from .pages import geffect_page, probes


def test_the_result_is_read():
    told = " ".join(summary(probes(2)))  # a mean of 0.75 of the last
    assert "The objective unlearns (unlearning G-effect -0.6), and the retain set gains by it" in told
    assert "(retaining G-effect +0.15; means over 2 models)" in told
    assert "89% of the unlearning is in one group of layers, middle." in told
    assert "100% of the cost to the retain set is in one group of layers, lm head." in told
    assert "forget.dpo unlearns most (-0.675), retain.gd retains most (+0.3)" in told
    assert "forget.dpo costs the retain set most (-0.15)." in told


def test_what_goes_wrong_is_said():
    (row,) = probes(1)
    worse = copy.deepcopy(row)
    effect = worse["geffect"]
    effect["total"] = {"unlearn": 0.2, "retain": -0.1}
    effect["groups"]["retain"] = dict.fromkeys(effect["groups"]["retain"], 0.1)
    effect["terms"] = {"forget.dpo": effect["terms"]["forget.dpo"]}
    told = " ".join(summary([worse]))
    assert "does not unlearn, it makes the forget answers likelier (unlearning G-effect +0.2)" in told
    assert "the retain set pays for it (retaining G-effect -0.1; of one model)" in told
    assert "No group of layers costs the retain set anything." in told
    assert "Of its terms" not in told
    assert summary([]) == []


def test_a_mean_of_other_signs_is_not_taken_for_all():
    rows = probes(3)
    rows[1]["geffect"]["total"] = {"unlearn": 20.0, "retain": -3.0}
    told = " ".join(summary(rows))
    assert (
        "The objective unlearns at 2 of 3 models, and makes the forget answers likelier at others (unlearning" in told
    )
    assert "and the retain set pays for it at 1 of 3 models (retaining" in told
    assert "The mean unlearning G-effect is mostly that of step 10 alone (+20)." in told
    assert "mostly" not in " ".join(summary(probes(3)))


def test_two_models_are_shown_whole():
    few, many = (section(probes(count)) for count in (2, 3))
    names = ("total", "groups", "terms", "dynamics")
    assert [figure["svg"].count("<svg") for figure in few["figures"]] == [1, 2, 2, 3]
    assert [figure["svg"].count("<svg") for figure in many["figures"]] == [3, 6, 2, 3]
    assert tuple(figure["name"] for figure in few["figures"]) == names
    assert "closer" not in geffect_page(2)
    assert "100 times closer" in geffect_page(3)


def test_groups_are_told_apart_without_colour():
    assert len({str(look["linestyle"]) for look in LOOKS}) == len({look["marker"] for look in LOOKS}) == len(LOOKS)
    svg = re.findall(r"<svg.*?</svg>", section(probes(2))["figures"][1]["svg"], re.DOTALL)[0]
    strokes = re.findall(r'clip-path="[^"]*" style="fill: none; (?:stroke-dasharray: ([\d.,]+);[^"]*)?stroke: #', svg)
    assert len(set(strokes)) == 3  # of four curves: the total is solid as the second group, and thicker


def test_numbers_go_by_their_way():
    figures = {figure["name"]: figure["rows"] for figure in section(probes(2))["figures"]}
    assert figures["groups"][1]["groups retain lm_head"] == -0.1
    assert figures["terms"][0] == {
        "step": 0, "forget.dpo unlearn": -0.45, "forget.dpo retain": -0.1, "retain.gd unlearn": 0.05,
        "retain.gd retain": 0.2,
    }  # fmt: skip
    assert figures["dynamics"][1]["nll unlearn"] == 1.0
