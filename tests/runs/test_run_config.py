from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pyunlearn.data import USUAL_REFUSALS
from pyunlearn.metrics import DEFAULT_METRICS
from pyunlearn.objectives import names
from pyunlearn.runs import ConfigError, RunConfig, load_config
from pyunlearn.runs.config import DEMO
from pyunlearn.runs.data import load_data

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_default_is_the_demo_of_the_examples():
    assert yaml.safe_load((EXAMPLES / "demo.yaml").read_text()) == DEMO
    assert load_config(EXAMPLES / "demo.yaml") == load_config()


def test_a_configuration_survives_its_own_text():
    config = load_config(None, ["unlearn.retain=[kl, {name: gd, coefficient: 0.5}]", "memorise=null"])
    assert RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_a_pretrained_model_does_not_inherit_the_demo():
    config = load_config(EXAMPLES / "smollm2_tofu.yaml", ["memorise=null"])
    assert config.memorise is None
    assert config.name == "smollm2_tofu"
    plain = load_config(None, ["model.name_or_path=some/model", "data.source=files", "data.forget=a", "data.retain=b"])
    assert plain.memorise is None
    assert plain.unlearn.learning_rate is None  # by the model's size
    assert load_config(None, ["model.gguf_file=m.gguf"]).memorise is None


def test_metrics_are_those_of_the_package():
    assert tuple(load_config().evaluate.metrics) == DEFAULT_METRICS
    options = "evaluate.options={extraction_strength: {variant: open_unlearning}}"
    assert load_config(None, [options]).evaluate.options == {"extraction_strength": {"variant": "open_unlearning"}}


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("unlearn.learning_rate=1e-4", lambda c: c.unlearn.learning_rate == 1e-4),
        ("unlearn.forget=npo", lambda c: [t.name for t in c.unlearn.forget] == ["npo"]),
        (
            "unlearn.forget.0.coefficient=2",
            lambda c: [(t.name, t.coefficient) for t in c.unlearn.forget] == [("idk", 2), ("dpo", 1)],
        ),
        ("unlearn.retain=[kl, gd]", lambda c: [t.name for t in c.unlearn.retain] == ["kl", "gd"]),
        ("unlearn.retain=[]", lambda c: c.unlearn.retain == []),
        ("unlearn.retain.coefficient=2", lambda c: [(t.name, t.coefficient) for t in c.unlearn.retain] == [("gd", 2)]),
        ("unlearn.forget.0.reduction=paper", lambda c: c.unlearn.forget[0].objective().reduction == "sequence_mean"),
        ("unlearn.forget.0.reduction=sum", lambda c: c.unlearn.forget[0].objective().reduction == "sum"),
        ("memorise=null", lambda c: c.memorise is None),
        ("output=some/where", lambda c: c.folder == Path("some/where")),
        ("name=v1.5", lambda c: c.folder == Path("runs/v1.5")),
        ("evaluate.goal=null", lambda c: c.evaluate.goal is None),
        ("evaluate.every=epoch", lambda c: c.evaluate.every == "epoch"),
        ("evaluate.every=5", lambda c: c.evaluate.every == 5),
        ("evaluate.anchors=[random, retrained, random]", lambda c: c.evaluate.anchors == ["retrained", "random"]),
        ("data.holdout=0", lambda c: c.data.holdout == 0),
        ("data.holdout=0.25", lambda c: c.data.holdout == 0.25),
        ("data.holdout=12", lambda c: c.data.holdout == 12),
        ("evaluate.sets.real=r.jsonl", lambda c: c.evaluate.sets["real"].path == "r.jsonl"),
        ("evaluate.sets.real={path: r.jsonl, limit: 2}", lambda c: c.evaluate.sets["real"].limit == 2),
    ],
)
def test_overrides(override, read):
    assert read(load_config(None, [override]))


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("unlearn.forget.options.alpha=5", lambda c: c.unlearn.forget[0].objective().options == {"alpha": 5.0}),
        ("unlearn.forget.0.coefficient=2", lambda c: c.unlearn.forget[0].coefficient == 2),
        ("unlearn.retain.preset=open_unlearning", lambda c: c.unlearn.retain[0].objective().positions == "all"),
        ("unlearn.forget.reduction=paper", lambda c: c.unlearn.forget[0].objective().reduction == "sequence_mean"),
    ],
)
@pytest.mark.parametrize("model", ["model.name_or_path=some/model", "model.gguf_file=m.gguf"])
def test_a_pretrained_model_has_one_term_a_role(override, read, model):
    """Whichever override comes first."""
    for order in ([override, model], [model, override]):
        config = load_config(None, order)
        assert read(config)
        assert [term.name for term in (*config.unlearn.forget, *config.unlearn.retain)] == ["wga", "kl"]


def test_terms_are_those_that_the_demo_has():
    """One key of one of several needs its index."""
    with pytest.raises(ConfigError, match="a list of 2 needs an index below 2, got 'options'"):
        load_config(None, ["unlearn.forget.options.beta=5"])
    assert load_config(None, ["unlearn.forget.1.options.beta=5"]).unlearn.forget[1].options == {"beta": 5}
    assert load_config().unlearn.forget[1].options == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("unlearn.learnin_rate=1", "unlearn.learnin_rate: unknown key; did you mean learning_rate?"),
        ("colour=blue", "colour: unknown key; needs one of name, output, seed"),
        ("unlearn.forget=wag", "unlearn.forget: objective='wag': did you mean wga? needs one of ga, wga"),
        (
            "unlearn.forget=kll",
            f"unlearn.forget: objective='kll': needs one of {', '.join((*names('forget'), 'bss'))}\n",
        ),
        (
            "unlearn.retain=kll",
            f"unlearn.retain: objective='kll': did you mean kl? needs one of {', '.join(names('retain'))}\n",
        ),
        ("unlearn.forget=[ga, {name: npoo}]", "unlearn.forget: objective='npoo': did you mean npo"),
        (
            "unlearn.forget.1.options.beeta=1",
            "unlearn.forget.1: dpo: option='beeta': did you mean beta or preset? needs one of beta, factor, preset",
        ),
        ("unlearn.forget.1.beta=1", "unlearn.forget.1.beta: unknown key; did you mean unlearn.forget.1.options.beta?"),
        ("unlearn.forget.1.options.beta=-1", "unlearn.forget.1: dpo: beta=-1: needs a"),
        (
            "unlearn.forget.0.preset=papr",
            "unlearn.forget.0: idk: preset='papr': did you mean paper? needs one of paper",
        ),
        ("unlearn.retain=wga", "unlearn.retain: wga is a forget objective; put it under unlearn.forget"),
        ("unlearn.forget=[]", "unlearn: forget=[]: needs an objective, or reinforce.into=weights or logits"),
        (
            "unlearn.forget.0.coefficient=.inf",
            "unlearn.forget.0.coefficient: needs a finite number, got inf",
        ),
        ("unlearn.epochs=-1", "unlearn.epochs: needs a number above 0, got -1"),
        ("unlearn.epochs=.inf", "unlearn.epochs: needs a finite number, got inf"),
        ("unlearn.epochs=.nan", "unlearn.epochs: needs a finite number, got nan"),
        ("memorise.warmup=.inf", "memorise.warmup: needs a finite number, got inf"),
        ("unlearn.weight_decay=.inf", "unlearn.weight_decay: needs a finite number, got inf"),
        ("unlearn.max_grad_norm=.inf", "unlearn.max_grad_norm: needs a finite number, got inf"),
        ("num_threads=100000", "num_threads: needs an integer from 1 to 1024, got 100000; this machine has"),
        ("num_threads=0", "num_threads: needs an integer from 1 to 1024, got 0"),
        ("num_threads=true", "num_threads: needs an integer from 1 to 1024, got True"),
        ("num_threads=2.5", "num_threads: needs an integer from 1 to 1024, got 2.5"),
        ("model.options.hiden_size=32", "model: options='hiden_size': did you mean hidden_size or hidden_act"),
        ("model.options.hidden_size=wide", "model: options.hidden_size='wide': needs an integer of 1 at least"),
        ("model.options.num_hidden_layers=-1", "model: options.num_hidden_layers=-1: needs an integer of 1 at least"),
        (
            "model.options.hidden_size=33",
            "model: options: hidden_size=33 needs to be a multiple of num_attention_heads=4",
        ),
        ("model.options.num_key_value_heads=3", "num_attention_heads=4, and that one of num_key_value_heads=3"),
        ("model.options.hidden_size=4", "a head has hidden_size / num_attention_heads=1, needs an even number"),
        ("unlearn.batch_size=2.5", "unlearn.batch_size: needs a whole number, got 2.5"),
        ("memorise.epochs=many", "memorise.epochs: needs a number, got 'many'"),
        ("model.dtype=int8", "model.dtype='int8': needs one of float32, bfloat16, float16"),
        ("unlearn.batch_size=true", "unlearn.batch_size: needs a number, got True"),
        ("unlearn.learning_rate=on", "unlearn.learning_rate: needs a number, got True"),
        ("unlearn.max_steps=false", "unlearn.max_steps: needs a number, got False"),
        ("evaluate.every=true", "evaluate.every: needs a number, got True"),
        ("data.source=file", "data.source='file': did you mean files? needs one of embedded, files"),
        ("data.forget={limit: 3}", "data.forget.path: is needed, and not given"),
        ("evaluate.goal.retain_probability_kept=2", "evaluate.goal.retain_probability_kept: needs 1 at most, got 2"),
        ("unlearn.bf16=maybe", "unlearn.bf16: needs true or false, got 'maybe'"),
        ("geffect=often", "geffect: needs a section of keys and values, got 'often'"),
        ("geffect.groups=papr", "geffect.groups: groups='papr': did you mean paper?"),
        ("evaluate.anchors=retrained", "evaluate.anchors: needs a list, got 'retrained'"),
        ("evaluate.metrics=[rouge_l]", "evaluate: metrics needs probability"),
        (
            "evaluate.metrics=[probability, cosine_similarity]",
            "evaluate: metrics: cosine_similarity needs evaluate.embedder",
        ),
        ("evaluate.metrics=[probability, naturalness]", "evaluate: metrics: naturalness needs evaluate.judge"),
        ("evaluate.judge={url: 'localhost:1', model: m}", "evaluate.judge: url='localhost:1': needs an http or https"),
        ("evaluate.judge={url: 'http://h/v1', model: m, key: sk-a}", "evaluate.judge: key: needs the name of an env"),
        ("evaluate.endpoint={url: 'http://h/v1', model: m, retries: -1}", "evaluate.endpoint: retries=-1: needs"),
        ("data={source: embedded, forget: x.jsonl}", "data: source=embedded generates its own authors, got ['forget']"),
        (
            "data.source=files",
            "data: source=files: needs data.forget too, what is to be forgotten",
        ),
        ("evaluate.every=epochs", "evaluate.every: needs epoch, or a number of optimiser steps, got 'epochs'"),
        ("evaluate.every=0", "evaluate.every: needs epoch, or a number of optimiser steps, got 0"),
        ("data.holdout=-1", "data.holdout: needs a share below 1, or a whole number of rows, got -1"),
        ("data.holdout=1.5", "data.holdout: needs a share below 1, or a whole number of rows, got 1.5"),
        ("data.holdout=some", "data.holdout: needs a share below 1, or a whole number of rows, got 'some'"),
        ("evaluate.sets.holdout=x", "evaluate.sets: 'holdout': needs a name of letters, digits, _, . and -, of 100"),
        (
            f"evaluate.sets={{{'x' * 101}: y}}",
            "xxx': needs a name of letters, digits, _, . and -, of 100 bytes at most",
        ),
        ("evaluate.sets={../x: y}", "evaluate.sets: '../x': needs a name of letters"),
        ("evaluate.sets.real.pth=x", "evaluate.sets.real.pth: unknown key; did you mean path or split?"),
        ("name=../x", "name: needs letters, digits, _, . and - alone, got '../x'"),
        ("seed", "--set 'seed': needs key.sub=value"),
        ("a..b=1", "--set 'a..b=1': needs key.sub=value"),
        ("seed={", "the value is not valid YAML"),
        ("seed.x=1", "seed: needs a whole number, got {'x': 1}"),
        ("unlearn.forget.3.name=x", "a list of 2 needs an index below 2, got '3'"),
    ],
)
def test_what_is_wrong_is_told(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert message in f"{caught.value}\n"


def test_a_source_that_a_file_names_by_its_path_takes_keys(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("evaluate: {sets: {real: r.jsonl}}")
    assert load_config(file, ["evaluate.sets.real.limit=3"]).evaluate.sets["real"].limit == 3


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("unlearn.forget.options.alpha=5", "unlearn.forget=npo"),
        ("unlearn.forget.0.coefficient=2", "unlearn.forget=npo"),
        ("memorise.epochs=3", "memorise=null"),
        ("data.forget.limit=3", "data.forget = x.jsonl"),
    ],
)
def test_an_override_that_would_undo_an_earlier_one_is_told(first, then):
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["seed=1", first, "name=x", then])
    assert str(caught.value) == (
        f"--set {then!r}: would undo {first!r}, which is given before it; give it first, or leave one of them out"
    )
    beta = load_config(None, ["unlearn.forget=npo", "unlearn.forget.options.beta=0.5", "unlearn.forget.options.beta=2"])
    assert [(term.name, term.options) for term in beta.unlearn.forget] == [("npo", {"beta": 2})]


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["unlearn.epochs=0", "colour=blue", "model.dtype=x"])
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(ConfigError, match=r"'probabilty'.* probability.*; metric='rogue_l'.* rouge_l"):
        load_config(None, ["evaluate.metrics=[probabilty, rogue_l]"])


def test_retraining_needs_a_recipe():
    with pytest.raises(ConfigError, match=r"evaluate\.anchors=\[retrained\] trains .* set memorise .*, got null"):
        load_config(None, ["memorise=null"], anchors=["retrained"])
    config = load_config(None, ["evaluate.anchors=[random]"], anchors=["retrained"])
    assert config.evaluate.anchors == ["retrained", "random"]
    assert load_config(None, anchors=["retrained"]) == load_config(None, ["evaluate.anchors=[retrained]"])


def test_refusals_are_ones_own_or_usual_ones(tmp_path):
    for name, question in (("a", "Who?"), ("b", "Where?")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": question, "answer": "Ada."}) + "\n")
    (tmp_path / "r.txt").write_text("No.\n")
    files = [f"data.forget={tmp_path}/a.jsonl", f"data.retain={tmp_path}/b.jsonl", "data.holdout=0"]
    read = load_data(load_config(None, [*files, "unlearn.forget=idk"]))
    assert read.refusals == list(USUAL_REFUSALS)
    assert read.recognised["refusals"].startswith(f"{len(USUAL_REFUSALS)} that pyunlearn has")
    assert load_data(load_config(None, [*files, "unlearn.forget=idk", f"data.refusals={tmp_path}/r.txt"])).refusals == [
        "No."
    ]
    assert load_data(load_config(None, [*files, "unlearn.forget=npo"])).refusals == []
    assert len(USUAL_REFUSALS) > 30


def test_one_key_of_a_term_that_is_named_alone_can_be_set():
    config = load_config(None, ["unlearn.retain=kl", "unlearn.retain.0.coefficient=3", "unlearn.forget=npo",
                                "unlearn.forget.options.beta=0.5"])  # fmt: skip
    assert [(term.name, term.coefficient) for term in config.unlearn.retain] == [("kl", 3)]
    assert [(term.name, term.options) for term in config.unlearn.forget] == [("npo", {"beta": 0.5})]


def test_configuration_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.yaml'?: no such file"):
        load_config(tmp_path / "missing.yaml")
    file = tmp_path / "c.yaml"
    file.write_text("a: [")
    with pytest.raises(ConfigError, match=r"c.yaml'?: not valid YAML"):
        load_config(file)
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match=r"needs sections .*, got list"):
        load_config(file)
    file.write_text("")
    assert load_config(file) == load_config()
