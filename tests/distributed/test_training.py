"""Trainings by two processes, against one process with batches as large."""

import pytest
import torch

from pyunlearn import objectives
from pyunlearn.training.probe import Probe
from pyunlearn.training.sampling import ForgetSampler, Forgotten
from pyunlearn.training.settings import GEffectConfig
from pyunlearn.training.terms import TermLosses
from pyunlearn.training.trainer import UnlearnTrainer

from ..training.test_equalities import KINDS, objective
from ..training.test_start import change_between
from .cases.training import STOCK, evaluated, grow, moving_trainer, parameters, stock_trainer
from .launch import run_case


def test_two_processes_train_as_one(tiny, arguments, tmp_path):
    """2 processes x 2 samples x 2 micro-batches against 1 x 8, tokens unevenly spread over the ranks."""

    def train(terms):
        trainer = UnlearnTrainer(
            model=tiny.model(), args=arguments(max_steps=2), train_dataset=tiny.pairs(), objectives=terms,
            reference=tiny.model(seed=1),
        )  # fmt: skip
        trainer.train()
        return trainer

    ranks = run_case("training.ddp", tmp_path)
    torch.testing.assert_close(ranks[0]["parameters"], ranks[1]["parameters"], rtol=0, atol=0)
    trainer = train(["wga", "npo", "gd"])
    torch.testing.assert_close(ranks[0]["parameters"], parameters(trainer.model), rtol=0, atol=1e-6)
    misdirected = parameters(train(["rmu", "rr"]).model)
    for rank in ranks:
        torch.testing.assert_close(rank["misdirected"], misdirected, rtol=0, atol=1e-6)
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}  # a micro-batch is of both processes
    for every, shape in (("step", {}), ("micro_batch", split)):
        alone = moving_trainer(tiny, arguments(max_steps=2, **shape), every)
        alone.train()
        for rank in ranks:
            after, value = rank["moving"][every]
            torch.testing.assert_close(after, parameters(alone.model), rtol=0, atol=1e-6)
            assert value == ranks[0]["moving"][every][1] == pytest.approx(alone.dual.memory.value, abs=1e-5)
    for logged, expected in zip(ranks[0]["log"], trainer.state.log_history, strict=False):
        for key in ("loss", "forget.wga/loss", "forget.npo/loss", "retain.gd/loss", "forget.wga/count"):
            assert logged[key] == pytest.approx(expected[key], rel=1e-4), key
    assert "another process" in ranks[0]["error"]  # the NaN was in rank 1's batch; both ranks stop
    assert "forget samples" in ranks[1]["error"]


def test_two_processes_of_transformers_own_trainer_train_as_one(tiny, arguments, tmp_path):
    """2 x 2 x 2 against 1 x 8: tokens and sequences are counted over both."""
    ranks = run_case("training.stock", tmp_path)
    for name in STOCK:
        trainer = stock_trainer(tiny, arguments(max_steps=2, remove_unused_columns=False), name)
        trainer.train()
        for rank in ranks:
            torch.testing.assert_close(rank[name], parameters(trainer.model), rtol=0, atol=1e-6)


def test_two_processes_train_every_objective_as_one(tiny, arguments, tmp_path):
    """2 x 1 x 2 against 1 x 4; evaluations too, of 8 samples in batches of 2 x 3."""
    ranks = run_case("training.equal", tmp_path)
    for name in objectives.names():
        trainer = UnlearnTrainer(
            model=tiny.model(), args=arguments(max_steps=2, per_device_train_batch_size=4),
            train_dataset=tiny.pairs(**KINDS, **tiny.written), objectives=[objective(name)],
            reference=tiny.model(seed=1),
        )  # fmt: skip
        before = evaluated(trainer)
        trainer.train()
        for rank in ranks:
            assert rank[name]["before"] == pytest.approx(before, rel=1e-5), name
            after = parameters(trainer.model)
            torch.testing.assert_close(rank[name]["parameters"], after, rtol=0, atol=2e-6, msg=lambda m, n=name: n + m)


def test_two_processes_probe_as_one(tiny, tmp_path):
    """DDP: both processes measure the same samples, one writes. FSDP2: both hold a half of every gradient."""
    ranks = run_case("training.probe", tmp_path)
    for rank in ranks:
        assert torch.equal(rank["plain"], rank["probed"])
        assert [row["step"] for row in rank["rows"]] == [0, 1, 2]
    losses, rows = TermLosses(["npo", "gd"], tiny.model(seed=1).eval()), {"forget": tiny.forget, "retain": tiny.retain}
    settings = GEffectConfig(forget_samples=8, retain_samples=12, batch_size=4)
    alone = Probe(losses, rows, settings).measure(tiny.model())
    for rank in ranks:
        assert rank["rows"][0]["geffect"] == alone  # bit by bit
        for key in ("total", "norm", "nll", "weights"):
            assert rank["sharded"][key] == pytest.approx(alone[key], rel=1e-4)
        assert rank["sharded"]["terms"]["forget.npo"]["groups"]["retain"] == pytest.approx(
            alone["terms"]["forget.npo"]["groups"]["retain"], rel=1e-3
        )


def test_two_processes_draw_as_one(tiny, arguments, tmp_path):
    """2 processes x 1 sample x 2 micro-batches against 1 x 4, with refreshes and early stopping."""
    ranks = run_case("training.sampling", tmp_path)
    torch.testing.assert_close(ranks[0]["parameters"], ranks[1]["parameters"], rtol=0, atol=0)
    assert ranks[0]["memory"] == ranks[1]["memory"]
    pairs = tiny.pairs()
    sampler = ForgetSampler(pairs.forget, refresh_steps=2, forgotten=Forgotten(ngram=2, every_steps=2))
    trainer = UnlearnTrainer(
        model=tiny.model(), args=arguments(max_steps=4, per_device_train_batch_size=4), train_dataset=pairs,
        objectives=["ga", "gd"], sampler=sampler,
    )  # fmt: skip
    trainer.train()
    torch.testing.assert_close(ranks[0]["parameters"], parameters(trainer.model), rtol=0, atol=1e-6)
    memory = ranks[0]["memory"]
    assert memory["updates"] == sampler.memory.updates
    assert memory["forgotten_at"] == sampler.memory.forgotten_at
    assert memory["scores"] == pytest.approx(sampler.memory.scores, rel=1e-4)


def test_two_processes_keep_the_start_as_one(tiny, tmp_path):
    """The first one writes and reads; sharded weights are gathered, and where it cannot write, both are told."""
    ranks = run_case("training.start", tmp_path)
    before, after = tiny.model(), tiny.model()
    torch.nn.utils.vector_to_parameters(ranks[0]["parameters"], after.parameters())
    for rank in ranks:
        assert rank["trained"] == change_between(before, after) > 0
    after = tiny.model()
    grow(after)
    for sharded in ("before", "after"):
        assert [rank[sharded] for rank in ranks] == [change_between(before, after)] * 2
        assert [rank[f"written, {sharded}"] for rank in ranks] == [True, False]
    assert "after/0/training/unlearn" in ranks[0]["error"]
    assert ranks[1]["error"] == ranks[0]["error"]
