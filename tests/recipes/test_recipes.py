"""Recipes: methods by name as settings of `unlearn`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pyunlearn import recipes
from pyunlearn.recipes import names, read, recipe
from pyunlearn.runs import ConfigError, RunConfig, load_config


def terms(config):
    return [term.name for term in config.unlearn.forget], [term.name for term in config.unlearn.retain]


@pytest.mark.parametrize(
    ("name", "forget", "retain", "by"),
    [
        ("ga", ["ga"], [], "shuffle"),
        ("sga", ["ga"], [], "uniform"),
        ("cga", ["ga"], [], "mrd"),
        ("graddiff", ["ga"], ["gd"], "shuffle"),
        ("GradDiff+MRD", ["ga"], ["gd"], "mrd"),
        ("npo+mrd", ["npo"], ["gd"], "mrd"),
        ("PO+MRD", ["idk"], ["gd"], "mrd"),
        ("refuse", ["idk", "dpo"], ["gd"], "shuffle"),
    ],
)
def test_a_recipe_is_its_terms_and_its_sampling(name, forget, retain, by):
    config = load_config(None, [f"unlearn.recipe={name}"])
    assert terms(config) == (forget, retain)
    assert config.unlearn.sampling.by == by
    assert config.unlearn.batch_size == (1 if name in ("sga", "cga") else 4)  # 4: the demo's
    assert RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize("name", names())
def test_every_file_is_a_configuration(name):
    file = read(name)
    assert all(isinstance(text, str) and text for text in (file.summary, file.source))
    assert "\n" not in file.summary
    assert recipe(name) == file.unlearn
    assert recipe(f"{name}+mrd") == {**file.unlearn, "sampling": {"by": "mrd"}}
    trains = bool(file.unlearn["forget"])  # else there are no steps to draw samples for
    for chosen in (name, f"{name}+mrd") if trains else (name,):
        config = load_config(None, [f"unlearn.recipe={chosen}"])
        for role in ("forget", "retain"):  # lists of sections, so that --set can reach into them
            assert [term.name for term in getattr(config.unlearn, role)] == [
                term["name"] for term in file.unlearn[role]
            ]


def test_names():
    made = ("altpo", "bss", "task_vector", "whp", "whp_logits")
    assert names() == tuple(sorted(("cga", "ga", "graddiff", "npo", "po", "refuse", "sga", *made)))


def test_what_the_user_sets_wins_in_any_order():
    config = load_config(
        None,
        ["unlearn.sampling.weighting=inverse", "unlearn.forget.options.beta=0.5", "unlearn.recipe=npo+mrd",
         "unlearn.retain=kl", "unlearn.batch_size=2"],
    )  # fmt: skip
    assert terms(config) == (["npo"], ["kl"])
    assert config.unlearn.forget[0].options == {"beta": 0.5}
    assert (config.unlearn.sampling.by, config.unlearn.sampling.weighting) == ("mrd", "inverse")
    assert config.unlearn.batch_size == 2
    assert recipe("npo")["forget"] == [{"name": "npo"}]  # it was not written into
    plain = load_config(
        None, ["unlearn.sampling=mrd", "unlearn.sampling.refresh_steps=3", "unlearn.early_stop.share=0.5"]
    )
    assert terms(plain) == (["idk", "dpo"], ["gd"])
    assert (plain.unlearn.sampling.by, plain.unlearn.sampling.refresh_steps) == ("mrd", 3)
    assert plain.unlearn.early_stop.share == 0.5


def test_a_recipe_that_is_typed_wins_over_the_file(tmp_path):
    demo = Path(__file__).parents[2] / "examples" / "demo.yaml"  # every key is written out there
    config = load_config(demo, ["unlearn.recipe=cga"])
    assert (terms(config), config.unlearn.sampling.by, config.unlearn.batch_size) == ((["ga"], []), "mrd", 1)
    config = load_config(demo, ["unlearn.retain=kl", "unlearn.recipe=npo+mrd"])
    assert (terms(config), config.unlearn.sampling.by) == ((["npo"], ["kl"]), "mrd")
    file = tmp_path / "own.yaml"
    file.write_text("unlearn: {recipe: npo, retain: kl}")  # beside it, in one place: the keys win
    assert terms(load_config(file)) == (["npo"], ["kl"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("unlearn.recipe=npoo", r"unlearn.recipe='npoo': did you mean npo or po"),
        ("unlearn.recipe=npo+mrdd", r"unlearn.recipe='npo\+mrdd': did you mean npo\+mrd or"),
        ("unlearn.recipe=+mrd", r"needs one of altpo, bss, cga, ga, .*, altpo\+mrd, bss\+mrd, cga\+mrd"),
        ("unlearn.recipe=3", "unlearn.recipe: needs text, got 3"),
        ("unlearn.sampling=mdr", r"unlearn.sampling.by='mdr': did you mean mrd\? needs one of shuffle, uniform, mrd$"),
        ("unlearn.sampling.refresh_steps=0", "unlearn.sampling.refresh_steps: needs 1 at least, got 0"),
        ("unlearn.sampling.labels=all", "unlearn.sampling: labels: only MRD has that, and by='shuffle'; set unlearn"),
        (
            "unlearn.sampling={by: uniform, weighting: inverse, num_draws: 3}",
            "unlearn.sampling: weighting, num_draws: only MRD has that, and by='uniform'; set unlearn.sampling.by=mrd",
        ),
        ("unlearn.sampling.sigma=-1", "unlearn.sampling: sigma=-1.0: needs a finite number > 0"),
        ("unlearn.sampling.estimator=x", "unlearn.sampling: estimator='x': needs one of algorithm1, definition"),
        ("unlearn.sampling.refresh=5", r"unlearn.sampling.refresh: unknown key; did you mean refresh_steps\?"),
        ("unlearn.early_stop.share=0", "unlearn.early_stop.share: needs a number above 0, got 0"),
        ("unlearn.sampling=mrd model.dtype=bfloat16", "unlearn.sampling=mrd scores .* set model.dtype=float32"),
        ("unlearn.early_stop={}", "unlearn: early_stop leaves samples out of the draw: set unlearn.sampling"),
    ],
)  # fmt: skip
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, override.split(" ") if override.count("=") > 1 else [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [("summary: [", "not valid YAML"), ("", "needs the keys summary, source, unlearn"),
     ("summary: a\nsource: b\nunlearn: npo\n", "the last a section"), ("summary: a\nunlearn: {}\n", "needs the keys")],
)  # fmt: skip
def test_a_bad_file_is_named(text, message, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(recipes, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=rf"mine.yaml: .*{message}"):
        recipes.read("mine")
