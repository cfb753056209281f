"""The short set for other releases of what pyunlearn stands on: imports, ops, a run, its score and its G-effect.

It stands alone, so that it can be copied beside an installed package: no helper of other tests, public names only.
"""

import importlib
import json
import pkgutil

import pytest
import torch
import yaml
from typer.testing import CliRunner

import pyunlearn as pu
from pyunlearn.cli import app
from pyunlearn.data import ForgetRetainDataset, QADataset, generate_authors
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.ops import backends

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TINY = {
    "name": "tiny",
    "num_threads": 1,
    "model": {"options": {**SIZES, "vocab_size": 384}},
    "data": {"num_authors": 4, "questions_per_author": 2, "forget_fraction": 0.25, "num_unknown": 0},
    "memorise": {"epochs": 1, "batch_size": 4},
    "unlearn": {"forget": "wga", "retain": "kl", "epochs": 2, "batch_size": 2, "keep_steps": 1},
    "evaluate": {"rouge_samples": 1, "max_new_tokens": 4, "goal": None},
}
BACKENDS = [name for name in backends.serving(torch.device("cpu")) if not backends.unavailable(name)]


@pytest.fixture(scope="module")
def world():
    authors = generate_authors(num_authors=4, questions_per_author=2)
    tokenizer = train_tokenizer(authors.texts)
    return (
        tiny_llama(tokenizer, **SIZES),
        *(QADataset(rows, tokenizer, 128) for rows in (authors.forget, authors.retain)),
        tokenizer,
    )


def test_every_module_imports():
    names = [module.name for module in pkgutil.walk_packages(pu.__path__, "pyunlearn.")]
    assert len(names) > 40
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops(backend):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 16, generator=generator).requires_grad_()
    head = torch.randn(50, 16, generator=generator)
    targets = torch.randint(0, 50, (6,), generator=generator)
    logits = hidden @ head.T
    logp = logits.log_softmax(-1)
    expected = logp.gather(-1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(expected.sum(), hidden, retain_graph=True)

    stats = pu.token_stats(logits, targets, outputs=("logp", "entropy"), backend=backend)
    torch.testing.assert_close(stats.logp, expected)
    torch.testing.assert_close(stats.entropy, -(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(torch.autograd.grad(stats.logp.sum(), hidden)[0], gradient)
    fused = pu.linear_token_stats(hidden, head, targets, budget_bytes=2048, backend=backend)
    torch.testing.assert_close(fused.logp, expected)
    torch.testing.assert_close(torch.autograd.grad(fused.logp.sum(), hidden)[0], gradient, rtol=1e-4, atol=1e-5)

    noise = pu.gaussian_noise(1000, seed=0, draw=0, name="weight", backend=backend)
    torch.testing.assert_close(noise, pu.gaussian_noise(1000, seed=0, draw=0, name="weight", backend="eager"))
    a, b = noise[:500], noise[500:]
    torch.testing.assert_close(pu.segment_dot([(a, b)], backend=backend).dot[0], a.double() @ b.double())


def test_mrd_shares_the_prefix(world):
    model, *_ = world
    ids = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    ids[:, :8] = ids[0, :8]
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    batch["labels"][:, :8] = -100
    drawn = pu.mrd(model, [batch], estimator="algorithm1", num_draws=2, seed=0)
    assert torch.isfinite(drawn.value).all()
    assert drawn.diagnostics["shared_prefix"] > 0
    assert torch.isfinite(pu.mrd(model, [batch], estimator="gradient").value).all()


def test_g_effect(world):
    model, forget, *_ = world
    ids = forget[0]["input_ids"][None]
    effect = pu.g_effect(
        model,
        objective=lambda model: -model(input_ids=ids, labels=ids).loss,
        metrics={"forget": lambda model: model(input_ids=ids, labels=ids).loss},
    )
    assert float(effect.total["forget"]) < 0


def test_trainer_with_a_reference(world, tmp_path):
    from transformers import TrainingArguments

    model, forget, retain, tokenizer = world
    reference = pu.ReferenceCache.build(model, retain, tmp_path / "retain.safetensors", kl=True, progress=False)
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
    trainer = pu.UnlearnTrainer(
        tiny_llama(tokenizer, **SIZES),
        args,
        train_dataset=ForgetRetainDataset(forget, retain),
        objectives=["wga", "kl"],
        reference=reference,
    )
    assert trainer.train().global_step == 2


def test_run_score_and_geffect(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    for command in (
        "run tiny.yaml",
        "score tiny.yaml --num-draws 2 --out scores.jsonl",
        "geffect runs/tiny",
    ):
        outcome = CliRunner().invoke(app, command.split())
        if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
            raise outcome.exception
        assert outcome.exit_code == 0, outcome.output
    for name in ("report.html", "geffect/geffect.html"):
        assert (tmp_path / "runs/tiny" / name).stat().st_size > 1000, name
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 2
