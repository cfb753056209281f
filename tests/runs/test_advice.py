"""What is tried next: settings that go against what was wrong, in the command that was typed."""

from __future__ import annotations

import pytest

from pyunlearn.runs import load_config
from pyunlearn.runs.advice import next_changes, next_command, without, without_option
from pyunlearn.runs.reinforce import told
from pyunlearn.runs.verdict import ADVICE, CLEAN, COLLAPSED, KNOWS, LOST, NOTHING, REWORDS, UNSURE

FILES = ["model.name_or_path=some/model", "data.forget=a.jsonl"]
BOTH = [*FILES, "data.retain=b.jsonl"]


@pytest.mark.parametrize(
    ("verdict", "overrides", "left", "changes"),
    [
        (NOTHING, BOTH, None, ["memorise.epochs=5"]),
        (NOTHING, ["memorise.learning_rate=1e-4"], None, ["memorise.learning_rate=0.0003"]),
        (KNOWS, [*BOTH, "unlearn.learning_rate=1e-5"], 0.99, ["unlearn.learning_rate=3e-05"]),
        (KNOWS, [*BOTH, "unlearn.epochs=5"], 0.3, ["unlearn.epochs=10"]),
        (KNOWS, [*BOTH, "unlearn.max_steps=7"], 0.3, ["unlearn.max_steps=14"]),
        (REWORDS, [*BOTH, "unlearn.forget=ga"], None, ["unlearn.recipe=refuse"]),
        (REWORDS, [*BOTH, "unlearn.forget=[idk, dpo]", "unlearn.epochs=5"], None, ["unlearn.epochs=10"]),
        (LOST, [*BOTH, "unlearn.retain=[{name: gd, coefficient: 2}]"], None, ["unlearn.retain.0.coefficient=6"]),
        (LOST, [*BOTH, "unlearn.retain=[{name: gd, coefficient: 6}]", "unlearn.learning_rate=3e-5"], None,
         ["unlearn.learning_rate=1e-05"]),
        (LOST, [*FILES, "unlearn.learning_rate=3e-5"], None, ["unlearn.learning_rate=1e-05"]),
        (LOST, [*BOTH, "unlearn.retain=[]"], None, ["unlearn.retain=kl"]),
        (LOST, [*BOTH, "unlearn.retain=gd", "unlearn.dual={eps: 0.5, step: 2}"], None, ["unlearn.dual.step=6"]),
        (COLLAPSED, [*BOTH, "unlearn.forget=wga"], None, ["unlearn.recipe=refuse"]),
        (COLLAPSED, [*BOTH, "unlearn.recipe=refuse", "unlearn.learning_rate=3e-5"], None,
         ["unlearn.learning_rate=1e-05"]),
        (UNSURE, FILES, None, ["data.retain=FILE", "unlearn.retain=kl"]),
        (UNSURE, [*BOTH, "evaluate.metrics=[probability]"], None,
         ["evaluate.metrics=[probability, rouge_l, fluency]"]),
        (CLEAN, ["seed=4"], None, ["seed=5"]),
    ],
)  # fmt: skip
def test_changes_go_against_what_was_wrong_and_are_settings(verdict, overrides, left, changes):
    config = load_config(None, overrides)
    assert next_changes(verdict, config, config.unlearn.learning_rate or 1e-5, left) == changes
    load_config(None, [*overrides, *changes])  # all of them can be set


def test_what_is_told_of_an_objective_has_its_options_and_the_dual_variable():
    both = ["unlearn.forget={name: ga, temperature: 2, keep: 0.8}", "unlearn.retain=gd", "unlearn.dual={eps: 0.5}"]
    assert told(load_config(None, both).unlearn) == (
        "1·ga (temperature 2, keep 0.8) + 1·gd, the retain coefficient a dual variable"
    )
    assert told(load_config(None, ["unlearn.forget={name: npo, coefficient: 2, options: {beta: 0.5}}"]).unlearn) == (
        "2·npo (beta 0.5) + 1·gd"
    )


def test_every_verdict_has_advice():
    config = load_config(None, [*BOTH, "evaluate.metrics=[probability]"])
    assert all(next_changes(verdict, config, 1e-5) for verdict in ADVICE)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("pyunlearn run", "pyunlearn run"),
        ("pyunlearn run unlearn.forget.jsonl --forget unlearn.forget.csv -sunlearn.forget=ga",
         "pyunlearn run unlearn.forget.jsonl --forget unlearn.forget.csv"),
        ("pyunlearn run a.yaml --set unlearn.forget.options.alpha=5 -s unlearn.retain=gd",
         "pyunlearn run a.yaml -s unlearn.retain=gd"),
        ("pyunlearn run -s unlearn.forget=ga --set=unlearn.forget.coefficient=2 --set 'name=a b'",
         "pyunlearn run --set 'name=a b'"),
    ],
)  # fmt: skip
def test_a_command_without_a_key(command, line):
    assert without(command, "unlearn.forget") == line


def test_the_command_changes_what_it_set_and_goes_elsewhere():
    typed = "pyunlearn run a.yaml --set unlearn.forget=wga --out runs/x --set output=y --set seed=3 --out=z"
    assert without_option(typed, "--out") == (
        "pyunlearn run a.yaml --set unlearn.forget=wga --set output=y --set seed=3"
    )
    assert next_command(typed, ["unlearn.forget=npo"], "runs/x 2") == (
        "pyunlearn run a.yaml --set seed=3 --set unlearn.forget=npo --out 'runs/x 2'"
    )


def test_a_recipe_takes_the_place_of_another_and_of_terms():
    typed = "pyunlearn run --forget f --recipe npo --set unlearn.retain=gd --set unlearn.epochs=3"
    assert next_command(typed, ["unlearn.recipe=refuse"], "o") == (
        "pyunlearn run --forget f --set unlearn.epochs=3 --set unlearn.recipe=refuse --out o"
    )
    typed = "pyunlearn run recipe:bst@x --model m --set unlearn.recipe=npo --set unlearn.epochs=3 --out=z"
    assert next_command(typed, ["unlearn.recipe=refuse"], "o") == (
        "pyunlearn run recipe:refuse --model m --set unlearn.epochs=3 --out o"
    )
    for typed in ("recipe:whp --set unlearn.reinforce.epochs=3", "recipe:pdu --set unlearn.dual.eps=1"):
        assert next_command(f"pyunlearn run {typed}", ["unlearn.recipe=refuse"], "o") == (
            "pyunlearn run recipe:refuse --out o"
        )
