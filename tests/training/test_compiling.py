"""Whether the blocks of a model are compiled does not decide the step."""

from __future__ import annotations

import json
import shutil

import torch
from torch._dynamo.utils import counters

from pyunlearn.model.compiled import COMPILED
from pyunlearn.runs.run import run
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.trainer import UnlearnTrainer

from ..model.test_compiled import needs_compiler, traced  # noqa: F401 (a fixture)
from .test_equalities import KINDS


def trained(tiny, args, compile, resume=None, terms=("npo", "kl", "rmu")):
    trainer = UnlearnTrainer(
        model=tiny.model(), args=args, train_dataset=tiny.pairs(**KINDS), objectives=list(terms),
        reference=tiny.model(seed=1), compile=compile,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@needs_compiler
def test_it_takes_the_same_steps_and_goes_on_with_the_same_bits(tiny, arguments, tmp_path):
    args = arguments(
        per_device_train_batch_size=3, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=2e-3
    )
    compiled, found = trained(tiny, args, True)
    assert compiled.compiling.as_dict() == {"used": True, "declined": {}}
    assert compiled.compiling.graphs == 1
    assert compiled.packing.as_dict() == {"used": True, "declined": {}}
    assert not any("forward" in vars(block) for block in compiled.model.model.layers)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    counters.clear()
    again, bits = trained(tiny, args, True, str(tmp_path / "out" / "checkpoint-2"))
    assert torch.equal(bits, found)
    assert again.compiling.graphs == 1
    assert counters["aot_autograd"]["autograd_cache_hit"] or counters["inductor"]["fxgraph_cache_hit"]
    plain, expected = trained(tiny, args, False)
    assert plain.compiling is None
    start = torch.cat([parameter.detach().flatten() for parameter in tiny.model().parameters()])
    assert 0 < (found - expected).norm() < 1e-3 * (expected - start).norm()


def test_under_autocast_and_accumulated(traced, tiny, arguments):  # noqa: F811
    args = arguments(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, bf16=True)
    compiled, found = trained(tiny, args, True)
    expected = trained(tiny, args, False)[1]
    assert compiled.compiling.as_dict() == {"used": True, "declined": {}}
    start = torch.cat([parameter.detach().flatten() for parameter in tiny.model().parameters()])
    assert (found - expected).norm() < 0.05 * (expected - start).norm()


def test_a_run_says_how_it_went(monkeypatch, tiny_config, tmp_path):
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", lambda *args, **options: 1 / 0)
    changes = {"memorise": {"epochs": 1, "compile": True}, "unlearn": {"max_steps": 1, "compile": True}}
    result = run(tiny_config(changes))
    told = json.loads((result.folder / "unlearning.json").read_text())["compiling"]
    assert not told["used"]
    assert "ZeroDivisionError" in told["declined"][COMPILED]
    assert not UnlearnConfig().compile
