"""`UnlearnTrainer.evaluate`: the losses of a whole data set, whatever its batches."""

from __future__ import annotations

import pytest
import torch

from pyunlearn import objectives
from pyunlearn.data import ForgetRetainDataset, QADataset
from pyunlearn.model.cache import ReferenceCache
from pyunlearn.training.trainer import UnlearnTrainer

ALL_KINDS = {"refuse": ("forget", "retain"), "fixed_refusals": True}
TERMS = [
    ["ga", ("gd", 0.5)],
    [objectives.get("npo"), ("kl", 2.0)],
    ["dpo", "ap"],
    [objectives.get("wga", reduction="sum"), objectives.get("simnpo", reduction="sequence_token_mean")],
]


def evaluated(tiny, args, terms, pairs):
    trainer = UnlearnTrainer(
        model=tiny.model(), args=args, train_dataset=pairs, objectives=terms, reference=tiny.model(seed=1)
    )
    metrics = trainer.evaluate(pairs)
    return {name: value for name, value in metrics.items() if name.endswith("loss")}, trainer


@pytest.mark.parametrize("terms", TERMS)
def test_the_batch_size_does_not_matter(tiny, arguments, terms):
    """Unequal lengths; all at once is also what one training step of all logs."""
    pairs = tiny.pairs(**ALL_KINDS)
    whole, trainer = evaluated(tiny, arguments(per_device_eval_batch_size=8, learning_rate=0.0), terms, pairs)
    trainer.train()
    step = trainer.state.log_history[0]
    assert whole["eval_loss"] == pytest.approx(step["loss"], rel=1e-5)
    for term in trainer.terms:
        assert whole[f"eval_{term.label}/loss"] == pytest.approx(step[f"{term.label}/loss"], rel=1e-5)
    for size in (1, 2, 3, 7):
        parts, _ = evaluated(tiny, arguments(per_device_eval_batch_size=size), terms, pairs)
        assert parts == pytest.approx(whole, rel=1e-5), size


def test_an_evaluation_on_the_way(tiny, arguments):
    pairs, other = tiny.pairs(), ForgetRetainDataset(tiny.retain, tiny.forget)
    trainer = UnlearnTrainer(
        model=tiny.model(), args=arguments(eval_strategy="steps", eval_steps=1, max_steps=2), train_dataset=pairs,
        objectives=["ga"], eval_dataset={"same": pairs, "other": other},
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history
    values = [[row[key] for row in logs if key in row] for key in ("eval_same_loss", "eval_other_loss")]
    assert [len(of_one) for of_one in values] == [2, 2]
    assert values[0][0] > values[0][1]
    assert values[0] != values[1]
    assert trainer.evaluate(pairs)["eval_loss"] == pytest.approx(values[0][1], rel=1e-6)


def test_other_rows_than_were_cached_are_refused(tiny, arguments, tmp_path):
    """By their place in a cache they would get the reference of other rows."""
    cache = ReferenceCache.build(tiny.model(seed=1), tiny.forget, tmp_path / "forget.safetensors", progress=False)
    items = [*reversed(tiny.world.forget)]
    other = ForgetRetainDataset(QADataset(items, tiny.tokenizer, 256), tiny.retain)
    options = {"args": arguments(), "objectives": ["npo"], "reference": cache}
    trainer = UnlearnTrainer(model=tiny.model(), train_dataset=tiny.pairs(), **options)
    trainer.evaluate(tiny.pairs())
    with pytest.raises(ValueError, match=r"forget\.safetensors is of other rows than eval_dataset\.forget; build"):
        trainer.evaluate(other)
    with pytest.raises(ValueError, match=r"is of other rows than train_dataset\.forget"):
        UnlearnTrainer(model=tiny.model(), train_dataset=other, **options)
    with pytest.raises(ValueError, match=r"eval_dataset: the objectives need \['forget'\]"):
        trainer.evaluate([{"retain": tiny.retain[0]}])
    assert torch.is_grad_enabled()
