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
        ("ga_kl", ["ga"], ["kl"], "shuffle"),
        ("npo_gd", ["npo"], ["gd"], "shuffle"),
        ("npo_kl+mrd", ["npo"], ["kl"], "mrd"),
        ("dpo_gd", ["dpo"], ["gd"], "shuffle"),
        ("dpo_kl", ["dpo"], ["kl"], "shuffle"),
        ("dpo_ap", ["dpo"], ["ap"], "shuffle"),
        ("idk_gd", ["idk"], ["gd"], "shuffle"),
        ("idk_ap", ["idk"], ["ap"], "shuffle"),
        ("me_gd", ["me"], ["gd"], "shuffle"),
        ("me_kl", ["me"], ["kl"], "shuffle"),
        ("wga", ["wga"], [], "shuffle"),
        ("wga_gd", ["wga"], ["gd"], "shuffle"),
        ("wga_kl", ["wga"], ["kl"], "shuffle"),
        ("tnpo", ["tnpo"], [], "shuffle"),
        ("tnpo_kl", ["tnpo"], ["kl"], "shuffle"),
        ("wtnpo", ["wtnpo"], [], "shuffle"),
        ("wtnpo_kl", ["wtnpo"], ["kl"], "shuffle"),
        ("rmu", ["rmu"], [], "shuffle"),
        ("rmu_rr", ["rmu"], ["rr"], "shuffle"),
        ("simnpo", ["simnpo"], ["gd"], "shuffle"),
        ("satimp", ["satimp"], ["gd"], "shuffle"),
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


FILES = ("model.name_or_path=M", "data.forget=F", "data.retain=R")
# What papers and code bases tell, by recipe and setting: learning rate, epochs, samples of a step, and the forget term.
PUBLISHED = [
    ("wga_kl@phi-1.5-forget05", 2e-5, 5, 16, {"alpha": 5.0}, 1.0),
    ("wga_kl@phi-1.5-forget10", 2e-5, 5, 16, {"alpha": 7.0}, 1.0),
    ("wga_kl@llama-2-7b-forget01", 1e-5, 5, 16, {"alpha": 5.0}, 1.0),
    ("wga_kl@llama-2-7b-forget10", 1e-5, 5, 16, {"alpha": 7.0}, 1.0),
    ("npo_kl@phi-1.5-forget01", 2e-5, 5, 16, {"beta": 0.5}, 1.0),
    ("npo_kl@llama-2-7b-forget10", 1e-5, 5, 16, {"beta": 0.5}, 1.0),
    ("npo_kl@llama-2-7b-chat-forget10", 1e-5, 5, 32, {}, 1.0),
    ("tnpo_kl@phi-1.5-forget05", 2e-5, 5, 16, {"beta": 4.0}, 1.0),
    ("tnpo_kl@llama-2-7b-forget10", 1e-5, 5, 16, {"beta": 5.0}, 1.0),
    ("wtnpo_kl@llama-2-7b-forget05", 1e-5, 5, 16, {"alpha": 1.5, "beta": 5.0}, 1.0),
    ("wtnpo_kl@phi-1.5-forget10", 2e-5, 5, 16, {"alpha": 1.5, "beta": 7.0}, 1.0),
    ("ga_kl@phi-1.5-forget05", 2e-5, 5, 16, {}, 1.0),
    ("ga_kl@iclm-7b-muse-books", 1e-5, 4, 32, {}, 1.0),
    ("rmu@phi-1.5-forget01", 2e-5, 5, 16, {"layer": 9, "c": 4.0}, 1.0),
    ("rmu@llama-2-7b-forget10", 1e-5, 5, 16, {"layer": 21, "c": 2.0}, 1.0),
    ("rmu_rr@zephyr-7b-beta-wmdp", 5e-5, 5, 4, {"c": 6.5}, 1.0),
    ("rmu_rr@llama-2-7b-chat-forget05-open_unlearning", 1e-5, 10, 32, {}, 1.0),
    ("me_gd@llama-2-7b-chat-forget05", 1e-5, 5, 32, {}, 0.1),
    ("me_gd@llama-2-7b-chat-continual", 1e-5, 5, 32, {}, 1.0),
    ("me_gd@llama-3-8b-instruct-real_world", 5e-6, 5, 32, {}, 0.5),
    ("idk_ap@llama-3-8b-instruct-real_world", 1e-5, 5, 32, {}, 1.0),
    ("npo@llama-2-7b-chat-forget10", 5e-5, 4, 8, {}, 1.0),
    ("po@llama-2-7b-chat-forget10", 5e-5, 5, 8, {}, 1.0),
    ("graddiff@llama-2-7b-chat-forget10-mrd", 5e-5, 5, 8, {}, 1.0),
    ("sga@llama-2-7b-chat-forget10", 5e-5, 5, 1, {}, 1.0),
    ("graddiff@llama-2-7b-whp", 5e-5, 5, 8, {}, 1.0),
    ("npo@llama-2-7b-whp", 5e-5, 5, 8, {}, 1.0),
    ("npo@llama-2-7b-safe", 5e-5, 5, 8, {}, 1.0),
    ("po@llama-2-7b-safe", 5e-5, 5, 8, {}, 1.0),
    ("dpo_ap@llama-2-7b-chat-forget05", 1e-5, 5, 32, {}, 1.0),
    ("me_kl@llama-2-7b-chat-forget01", 1e-5, 5, 32, {}, 1.0),
    ("ga@llama-2-7b-forget05", 1e-5, 5, 16, {}, 1.0),
    ("wga@llama-2-7b-forget05", 1e-5, 5, 16, {}, 1.0),
    ("tnpo@llama-2-7b-forget05", 1e-5, 5, 16, {}, 1.0),
    ("wtnpo@llama-2-7b-forget05", 1e-5, 5, 16, {"alpha": 0.5, "beta": 0.1}, 1.0),
    ("ga@llama-3.2-1b-instruct-forget01", 1e-5, 10, 32, {}, 1.0),
    ("graddiff@llama-2-7b-chat-forget10-open_unlearning", 1e-5, 10, 32, {}, 1.0),
    ("simnpo@llama-3.2-1b-instruct-forget10", 1e-5, 10, 32, {}, 0.125),
    ("satimp@llama-3.2-1b-instruct-forget10", 1e-5, 10, 32, {}, 0.1),
    ("undial@llama-3.2-1b-instruct-forget05", 1e-4, 10, 32, {}, 1.0),
    ("undial@llama-2-7b-lora", 1e-4, 5, 32, {}, 1.0),
    ("altpo@llama-3.2-1b-instruct-forget10", None, 2, 32, {}, 1.0),
    ("pdu@llama-3.2-1b-instruct-forget10", 1e-5, 10, 128, {}, 1.0),
    ("pdu@llama-3.1-8b-instruct-forget01", 1e-5, 30, 128, {}, 1.0),
    ("pdu@llama-2-7b-muse-news", 1e-5, 10, 256, {}, 1.0),
    ("me_gd@llama-2-7b-chat-forget10-lora", None, 5, 32, {}, 0.1),
    ("me_gd@llama-3-8b-instruct-real_world-lora", None, 5, 32, {}, 0.5),
    ("idk_ap@llama-3-8b-instruct-real_world-lora", None, 5, 32, {}, 1.0),
    ("bst@llama-3.2-1b-forget10", 1e-5, 10, 32, {}, 1.0),
]


@pytest.mark.parametrize(("name", "rate", "epochs", "batch", "options", "coefficient"), PUBLISHED)
def test_what_was_published(name, rate, epochs, batch, options, coefficient):
    own = load_config(None, [*FILES, f"unlearn.recipe={name}"]).unlearn
    assert (own.learning_rate, own.epochs, own.batch_size * own.gradient_accumulation_steps) == (rate, epochs, batch)
    assert (own.forget[0].options, own.forget[0].coefficient) == (options, coefficient)
    assert own.recipe == name


def test_a_published_rate_is_taken_where_it_is_asked_for_alone():
    assert load_config(None, [*FILES, "unlearn.recipe=wga_kl"]).unlearn.learning_rate is None
    asked = load_config(None, ["unlearn.recipe=WGA_KL@Phi-1.5-forget05", "unlearn.learning_rate=3e-4"]).unlearn
    assert (asked.learning_rate, asked.warmup) == (3e-4, "epoch")  # what is set beside it wins
    both = recipe("cga@llama-2-7b-chat-forget10")
    assert both["sampling"] == {"by": "mrd", "estimator": "algorithm1", "num_draws": 200, "sigma": 1e-5}
    assert recipe("po+mrd@llama-2-7b-chat-forget10")["sampling"] == {"by": "mrd"}
    assert [term["name"] for term in recipe("po@phi-1.5-forget05")["retain"]] == ["kl"]


@pytest.mark.parametrize(
    ("name", "r", "alpha"),
    [("undial@llama-2-7b-lora", 8, 16), ("UNDIAL+MRD@llama-2-7b-lora", 8, 16)]
    + [
        (f"{name}@{of}-lora", 8, 32)
        for name in ("graddiff", "ga_kl", "npo_gd", "npo_kl", "me_gd", "dpo_gd", "dpo_kl", "idk_gd", "idk_ap")
        for of in (
            *(f"llama-2-7b-chat-forget{share}" for share in ("01", "05", "10")),
            "llama-3-8b-instruct-real_world",
        )
    ],
)
def test_a_published_adapter_is_trained(name, r, alpha, tmp_path):
    typed = load_config(None, [*FILES, f"unlearn.recipe={name}"])
    assert (typed.model.lora.r, typed.model.lora.alpha, typed.model.name_or_path) == (r, alpha, "M")
    (file := tmp_path / "own.yaml").write_text(f"model: {{name_or_path: M}}\nunlearn: {{recipe: {name}}}\n")
    assert load_config(file, FILES).model.lora == typed.model.lora
    assert load_config(tmp_path / "own.yaml", [*FILES, "model.lora=null"]).model.lora is None


@pytest.fixture
def demo(tmp_path):
    """The embedded demo, every key of it written out."""
    (file := tmp_path / "demo.yaml").write_text(yaml.safe_dump(load_config().to_dict()))
    return file


def test_what_is_said_of_the_model_wins_over_a_published_adapter(demo):
    name = "unlearn.recipe=npo_gd@llama-2-7b-chat-forget10-lora"
    set_beside = load_config(None, [*FILES, name, "model.lora.r=16"]).model.lora
    assert (set_beside.r, set_beside.alpha) == (16, 32)
    assert load_config(None, [name, "model.lora=null", *FILES]).model.lora is None
    assert load_config(demo, [name]).model.lora.alpha == 32  # it has lora: null
    whole = load_config(None, [*FILES, name])  # as a run's folder keeps it
    assert RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(whole.to_dict()))) == whole
    plain = load_config(None, [*FILES, "unlearn.recipe=npo_gd@llama-2-7b-chat-forget10"])
    assert plain.model.lora is None
    assert recipes.model_of("npo_gd") == recipes.model_of("npo_gd@llama-2-7b-chat-forget10") == {}


def test_the_dual_variable_of_each_published_model():
    for of, start, eps, step, warmup in [
        ("gemma-7b-it-forget01", 100, 0.3, 5, 5), ("llama-2-7b-muse-news", 50, 1.5, 1, 3),
        ("iclm-7b-muse-books", 50, 0.1, 1, 3), ("llama-2-13b-muse-news", 50, 0.8, 1, 3),
        ("llama-2-13b-muse-books", 50, 0.6, 1, 3),
    ]:  # fmt: skip
        dual = load_config(None, [*FILES, f"unlearn.recipe=pdu@{of}"]).unlearn.dual
        assert (dual.start, dual.eps, dual.step, dual.warmup_epochs) == (start, eps, step, warmup), of


def test_what_rmu_trains_is_by_the_data_in_open_unlearning():
    for of, trained in [
        ("zephyr-7b-beta-wmdp-open_unlearning", [r"layers\.[567]\.mlp\.down_proj\.weight$"]),
        ("llama-3.2-1b-instruct-forget10", None),
    ]:
        own = load_config(None, [*FILES, f"unlearn.recipe=rmu_rr@{of}"]).unlearn
        assert own.train_only == trained
        for term in (*own.forget, *own.retain):
            assert (term.preset, term.coefficient, term.objective().options["layer"]) == ("open_unlearning", 1.0, 8)
        assert own.forget[0].objective().options["c"] == 2.0


def test_methods_that_no_source_gives_settings_for_are_these():
    assert [name for name in names() if not read(name).published] == ["refuse", "whp"]


@pytest.mark.parametrize("name", names())
def test_no_recipe_sets_a_rate_that_a_large_model_was_given(name):
    assert "learning_rate" not in read(name).unlearn


@pytest.mark.parametrize("name", [f"{name}@{own}" for name in names() for own in read(name).published])
def test_every_published_setting_is_a_configuration_with_its_source(name):
    file = read(name.partition("@")[0])
    assert file.published[name.partition("@")[2]]["source"]
    terms_of = [term.name for term in load_config(None, [*FILES, f"unlearn.recipe={name}"]).unlearn.forget]
    assert terms_of == [term["name"] for term in file.unlearn["forget"]]


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
    whole = load_config(None, ["unlearn={epochs: 3, forget: me}", "unlearn.recipe=npo_kl"])  # of a whole section, too
    assert (terms(whole), whole.unlearn.epochs) == ((["npo"], ["kl"]), 3)
    plain = load_config(
        None, ["unlearn.sampling=mrd", "unlearn.sampling.refresh_steps=3", "unlearn.early_stop.share=0.5"]
    )
    assert terms(plain) == (["idk", "dpo"], ["gd"])
    assert (plain.unlearn.sampling.by, plain.unlearn.sampling.refresh_steps) == ("mrd", 3)
    assert plain.unlearn.early_stop.share == 0.5


def test_a_recipe_that_is_typed_wins_over_the_file(demo, tmp_path):
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
        ("unlearn.recipe=npoo", r"unlearn.recipe='npoo': did you mean npo or"),
        ("unlearn.recipe=npo+mrdd", r"unlearn.recipe='npo\+mrdd': did you mean npo\+mrd or"),
        ("unlearn.recipe=npo_kl@phi-1.5-forget5", r"'npo_kl@phi-1.5-forget5': did you mean phi-1.5-forget05 or"),
        ("unlearn.recipe=npo_kl@phi-1.5-forget05+mrd", r"needs npo_kl\+mrd@phi-1.5-forget05$"),
        ("unlearn.recipe=refuse@phi", "unlearn.recipe='refuse@phi': has no published settings"),
        ("unlearn.recipe=+mrd", r"needs one of altpo, [^+]* wtnpo_kl; each also NAME\+mrd$"),
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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of recipes, but for what one source published."""
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "paper.yaml").write_text(
        "phi-01: &phi {source: p, model: {dtype: float32}, unlearn: {epochs: 5, forget: [{name: ga}], warmup: 1}}\n"
        "phi-10: *phi\nllama-10: {source: q, unlearn: {epochs: 3}}\n"
    )
    monkeypatch.setattr(recipes, "files", lambda package: tmp_path)
    return tmp_path


def of(published):
    return f"summary: a\nsource: b\nunlearn: {{}}\npublished:\n  {published}\n"


def test_a_recipe_has_of_a_source_what_it_says_with_its_own_keys_instead(folder):
    (folder / "mine.yaml").write_text(
        of("paper/phi-*: {unlearn: {forget: [{name: npo}], epochs: 7}}\n  o: {source: o, unlearn: {}}\n  paper/l*: {}")
    )
    published = read("mine").published
    assert list(published) == ["phi-01", "phi-10", "o", "llama-10"]
    laid = {"epochs": 7, "forget": [{"name": "npo"}], "warmup": 1}
    assert published["phi-01"] == {"source": "p", "model": {"dtype": "float32"}, "unlearn": laid}
    assert list(published["phi-01"]["unlearn"]) == list(laid)  # as the source has them in order
    assert published["llama-10"] == {"source": "q", "unlearn": {"epochs": 3}}
    (folder / "mine.yaml").write_text(of("paper/phi-10: {source: r, model: {lora: {r: 8}}}"))
    assert read("mine").published == {
        "phi-10": {
            "source": "r",
            "model": {"dtype": "float32", "lora": {"r": 8}},
            "unlearn": {"epochs": 5, "forget": [{"name": "ga"}], "warmup": 1},
        }
    }


def test_every_setting_that_a_source_publishes_is_some_recipe_s():
    had = {setting for name in names() for setting in read(name).published}
    told = [yaml.safe_load(file.read_text()) for file in (Path(recipes.__file__).parent / "published").iterdir()]
    assert len(told) > 3
    assert {setting for settings in told for setting in settings} <= had


@pytest.mark.parametrize(
    ("published", "message"),
    [("papr/phi-10: {}", r"published='papr': did you mean paper\? needs one of paper$"),
     ("paper/phi-1: {}", "published.paper/phi-1: did you mean phi-10 or phi-01"),
     ("paper/*: {}\n  paper/phi-01: {}", "published.paper/phi-01: has phi-01 once more"),
     ("phi-01: {source: c, unlearn: {}}\n  paper/*: {}", r"published.paper/\*: has phi-01 once more"),
     ("paper/phi-01: 3", "published.phi-01 needs source and unlearn, .* got 3"),
     ("paper/phi-01:", "published.phi-01 needs source and unlearn, .* got None"),
     ("paper/phi-01: {unlearn: npo}", "published.phi-01 needs source and unlearn, the last a section"),
     ("paper/phi-01: {epochs: 3}", "published.phi-01 needs source and unlearn"),
     ("paper/phi-01: {model: M}", "as model is, got")],
)  # fmt: skip
def test_what_a_recipe_has_of_a_source_in_vain_is_named(published, message, folder):
    (folder / "mine.yaml").write_text(of(published))
    with pytest.raises(ValueError, match=rf"mine.yaml: .*{message}"):
        read("mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [("summary: [", "not valid YAML"), ("", "needs the keys summary, source, unlearn"),
     ("summary: a\nsource: b\nunlearn: npo\n", "the last a section"), ("summary: a\nunlearn: {}\n", "needs the keys"),
     ("summary: a\nsource: b\nunlearn: {}\nmore: 1\n", "needs the keys"),
     ("summary: a\nsource: b\nunlearn: {}\npublished: {x: {unlearn: {}}}\n", "published.x needs source and unlearn"),
     ("summary: a\nsource: b\nunlearn: {}\npublished: {x: {source: c, unlearn: {}, model: 3}}\n", "as model is, got"),
     ("summary: a\nsource: b\nunlearn: {}\npublished: {x: {source: c, unlearn: {}, data: {}}}\n", "published.x needs")],
)  # fmt: skip
def test_a_bad_file_is_named(text, message, folder):
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"mine.yaml: .*{message}"):
        read("mine")
