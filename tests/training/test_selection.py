"""Which parameters a training moves: by patterns of their names."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from pyunlearn.model.lora import add_adapter
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.selection import selected, trained_names
from pyunlearn.training.settings import GEffectConfig, MemoriseConfig
from pyunlearn.training.stage import Stage
from pyunlearn.training.trainer import UnlearnTrainer
from pyunlearn.training.unlearn import UnlearnData, check_model, memorise, unlearn

STEPS = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 2, "scheduler": "constant"}
DOWN = r"model\.layers\.1\.mlp\.down_proj\.weight"


@pytest.fixture
def data(tiny):
    return UnlearnData(tiny.world.forget, tiny.world.retain, list(tiny.world.refusals))


def moved(model, before):
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def state(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, lambda name: True),
        ({"train_only": DOWN}, lambda name: name == "model.layers.1.mlp.down_proj.weight"),
        ({"train_only": [r".*q_proj\..*", r".*\.norm\.weight"]}, lambda name: "q_proj" in name or ".norm." in name),
        ({"freeze": r"model\.layers\..*"}, lambda name: "layers" not in name),
        ({"train_only": r"lm_head\.weight"}, lambda name: name == "model.embed_tokens.weight"),  # they are tied
        ({"freeze": r"lm_head\.weight"}, lambda name: name != "model.embed_tokens.weight"),
    ],
)
def test_what_the_patterns_match_and_nothing_else_is_trained(tiny, data, tmp_path, monkeypatch, settings, expected):
    """In both stages; and the optimizer has no state of the others."""
    held, original = [], UnlearnTrainer.create_optimizer

    def create_optimizer(self, *args, **options):
        optimizer = original(self, *args, **options)
        held.append({id(weight) for group in optimizer.param_groups for weight in group["params"]})
        return optimizer

    monkeypatch.setattr(UnlearnTrainer, "create_optimizer", create_optimizer)
    model, folder = tiny.model(), TrainingFolder(tmp_path / "work")
    names = {name for name, _ in model.named_parameters() if expected(name)}
    assert trained_names(model, UnlearnConfig(**settings)) == names
    before = state(model)
    outcome = unlearn(Stage(folder), UnlearnConfig(**STEPS, **settings), model, tiny.tokenizer, data)
    assert moved(model, before) == names
    assert held[0] == {id(weight) for name, weight in model.named_parameters() if name in names}
    assert all(weight.requires_grad for weight in model.parameters())
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    assert (outcome.trained, outcome.parameters) == (sum(sizes[name] for name in names), sum(sizes.values()))
    before = state(model)
    memorise(Stage(TrainingFolder(tmp_path / "m")), MemoriseConfig(**STEPS, **settings), model, tiny.tokenizer, data)
    assert moved(model, before) == names


def test_of_a_model_under_peft_they_choose_among_its_adapters(tiny):
    model = add_adapter(tiny.model(), r=2)
    settings = UnlearnConfig(train_only=r".*\.lora_B\..*")
    names = trained_names(model, settings)
    assert len(names) == 14
    with selected(model, settings):
        assert {name for name, weight in model.named_parameters() if weight.requires_grad} == names
    assert sum(weight.requires_grad for weight in model.parameters()) == 28
    with pytest.raises(ValueError, match=r"unlearn\.train_only='.*base_layer.*': matches no parameter that is trained"):
        trained_names(model, UnlearnConfig(train_only=r".*base_layer.*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_only": "model.layers.1.mlp.down_prj.weight"},
            r"unlearn\.train_only='.*': matches no parameter that is trained, needs a regular expression of whole "
            r"names; the nearest are model\.layers\.1\.mlp\.down_proj\.weight",
        ),
        ({"freeze": ["lm_head"]}, r"unlearn\.freeze='lm_head': matches no parameter that is trained"),
        ({"freeze": ".*"}, r"unlearn\.freeze=\['\.\*'\]: freezes every parameter; needs some left to train"),
    ],
)
def test_patterns_that_do_not_fit_the_model(tiny, settings, message):
    model = tiny.model()
    with pytest.raises(ValueError, match=message):
        check_model(UnlearnConfig(**settings), None, model)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_only": "a", "freeze": "b"}, r"train_only=\['a'\] and freeze=\['b'\]: needs one of them"),
        ({"freeze": "(a"}, r"'\(a' is no regular expression"),
    ],
)
def test_patterns_that_are_none(settings, message):
    with pytest.raises(ValidationError, match=message):
        UnlearnConfig(**settings)


def test_the_g_effect_is_of_what_is_trained(tiny, data, tmp_path):
    """On the way and of groups, while forget samples are drawn by the difficulty of the whole model."""
    settings = UnlearnConfig(**{**STEPS, "batch_size": 1}, train_only=[r".*mlp\.down_proj\.weight"], sampling="mrd")
    probing = GEffectConfig(every=1, groups={"down": ["*down_proj*"]})
    model = tiny.model()
    check_model(settings, probing, model)
    with pytest.raises(ValueError, match=r"groups\['up'\]=.*: matches no trainable parameter"):
        check_model(settings, GEffectConfig(groups={"up": ["*up_proj*"]}), model)
    folder = TrainingFolder(tmp_path / "work")
    unlearn(Stage(folder), settings, model, tiny.tokenizer, data, probing)
    rows = [row["geffect"] for row in read_metrics(folder.metrics) if "geffect" in row]
    assert len(rows) == 3
    assert {*rows[0]["layers"]["unlearn"]} == {"model.layers.0", "model.layers.1"}
    for row in rows:
        assert row["groups"]["unlearn"]["down"] == pytest.approx(row["total"]["unlearn"])
