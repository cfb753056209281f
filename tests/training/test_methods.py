"""Terms that read the model in their own way: k, temperature, the reference's entropy, a selection of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyunlearn import objectives
from pyunlearn.model.cache import ReferenceCache
from pyunlearn.model.reference import Live
from pyunlearn.training.terms import TermLosses, collect_needs, count_items, make_terms
from pyunlearn.training.trainer import UnlearnTrainer

from .test_trainer import parameters, train


def logits_of(model, batch):
    """(log p (N, V), targets (N,), rows (N,)) of the supervised tokens, by the model's own logits, kept in a graph."""
    z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    return z[mask], labels[mask], mask.nonzero()[:, 0]


def by_hand(model, frozen, batch):
    """Loss of each of `TERMS`, the targets written out."""
    z, y, rows = logits_of(model, batch["forget"])
    with torch.no_grad():
        r, _, _ = logits_of(frozen, batch["forget"])
    onehot, at = F.one_hot(y, z.size(-1)).to(z), y[:, None]

    def soft(goal, z=z):
        return -torch.where(goal > 0, goal * z.log_softmax(-1), 0.0).sum(-1)

    def beliefs(k):
        top, index = z.detach().topk(k, -1)
        return torch.zeros_like(z).scatter(-1, index, top.softmax(-1))

    bst = [-soft(0.6 * beliefs(k) + 0.4 * onehot).sum() / 8 for k in (3, 7)]
    pdu = ((z.amax(-1) - z.mean(-1)) ** 2).mean()
    undial = [soft((r / t - 2.0 * onehot).softmax(-1), z / t).mean() for t in (1.0, 2.0)]
    first = torch.cat([rows.new_tensor([True], dtype=torch.bool), rows[1:] != rows[:-1]])
    ce_u = soft(z.detach().masked_fill(onehot > 0, -torch.inf).softmax(-1))[~first].mean()
    hot = (z / 2.0).log_softmax(-1).gather(-1, at)[:, 0]
    logp, ref_logp = (x.log_softmax(-1).gather(-1, at)[:, 0] for x in (z / 3.0, r / 3.0))
    ratio = torch.zeros(8).index_add(0, rows, logp - ref_logp)
    npo = (2 / 0.1 * F.softplus(0.1 * ratio)).mean()
    kept = []
    for row in range(8):
        of_row = z.log_softmax(-1).gather(-1, at)[rows == row, 0]
        kept.append(of_row.sort(descending=True).values[: max(1, int(0.5 * len(of_row)))])
    return [*bst, pdu, *undial, ce_u, hot.mean(), npo, torch.cat(kept).mean()]


TERMS = [
    objectives.get("bst", lam=0.6, k=3),
    objectives.get("bst", lam=0.6, k=7),
    "pdu",
    objectives.get("undial", b=2.0),
    objectives.get("undial", b=2.0, temperature=2.0),
    objectives.get("ce_u", preset="open_unlearning"),
    objectives.get("ga", temperature=2.0),
    objectives.get("npo", temperature=3.0),
    objectives.get("ga", keep=0.5),
]
SCALARS = [("entropy", 1.0), ("entropy", 2.0), ("logp", 2.0), ("logp", 3.0)]


@pytest.fixture(scope="module")
def cache(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("methods") / "forget.safetensors"
    return ReferenceCache.build(tiny.model(seed=1), tiny.forget, path, kl=True, scalars=SCALARS, progress=False)


@pytest.mark.parametrize("kind", ["cache", "live"])
def test_every_term_gets_its_own_k_and_temperature(tiny, cache, kind):
    """Nine terms on one batch: each loss, and each gradient of all weights, are those of the targets written out."""
    model, frozen, pairs = tiny.model(), tiny.model(seed=1).eval(), tiny.pairs()
    batch = pairs.collate([pairs[i] for i in range(8)])
    losses = TermLosses(TERMS, cache if kind == "cache" else Live(frozen))
    counts = {term.count: count_items(batch, *term.count) for term in losses.terms}
    theirs = by_hand(model, frozen, batch)
    weights = list(model.parameters())
    for i, (term, other) in enumerate(zip(losses.terms, theirs, strict=True)):
        one = losses.term_losses(model, batch, counts)[i]  # anew: the head's backward is taken once
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6, msg=lambda m, term=term: f"{term.label}: {m}")
        for a, b in zip(*(torch.autograd.grad(x, weights, retain_graph=True) for x in (one, other)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=3e-6, msg=lambda m, term=term: f"{term.label}: {m}")


def test_what_can_be_read_at_once_is(tiny):
    needs = collect_needs(make_terms([*TERMS, "wga", "me"]))["forget"].calls
    assert sorted(needs, key=str) == [(1.0, 1, 2.0), (1.0, 3, 0.0), (1.0, 7, 0.0), (2.0, None, 2.0), (3.0, None, 0.0)]
    told = [output for outputs in needs.values() for output in outputs]
    assert told.count("logp") == 3 and told.count("topk") == 3 and told.count("uniform_ce") == 1  # noqa: PT018


@pytest.mark.parametrize("terms", [[("ga", {"keep": 0.6}), ("gd", {"keep": 0.5, "kept": "largest"})],
                                   [("ce_u", {"skip": 2}), ("gd", {"temperature": 2.0})],
                                   [("bst", {"k": 4, "keep": 0.7}), ("kl", {"keep": 0.7, "temperature": 2.0})],
                                   [("undial", {"keep": 0.8}), ("gd", {})],
                                   [("simnpo", {"keep": 0.4}), ("gd", {})]])  # fmt: skip
def test_the_split_of_a_step_does_not_matter(tiny, arguments, cache, tmp_path, terms):
    chosen = [objectives.get(name, **options) for name, options in terms]
    model = tiny.model(seed=1)
    retain = ReferenceCache.build(model, tiny.retain, tmp_path / "retain.safetensors", kl=True, progress=False)
    results = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        args = arguments(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        trainer, after = train(tiny, args, chosen, reference={"forget": cache, "retain": retain})
        results.append((trainer.state.log_history[0], after))
    assert (results[0][1] - parameters(tiny.model())).abs().max() > 1e-5
    for log, after in results[1:]:
        torch.testing.assert_close(after, results[0][1], rtol=0, atol=1e-6)
        for key, value in log.items():
            assert value == pytest.approx(results[0][0][key], rel=1e-4, abs=1e-6), key


def test_undial_of_open_unlearning_counts_prompts_and_padding(tiny):
    model, frozen, pairs = tiny.model(), tiny.model(seed=1).eval(), tiny.pairs()
    batch = pairs.collate([pairs[i] for i in range(4)])
    losses = TermLosses([objectives.get("undial", preset="open_unlearning", b=2.0)], frozen)
    counts = {term.count: count_items(batch, *term.count) for term in losses.terms}
    (ours,) = losses.term_losses(model, batch, counts)
    rows = {key: batch["forget"][key] for key in ("input_ids", "attention_mask")}
    z = model(**rows).logits[:, :-1]
    with torch.no_grad():
        r = frozen(**rows).logits[:, :-1].clone()
    labels = batch["forget"]["labels"][:, 1:]
    lowered = r.gather(-1, labels.clamp_min(0)[..., None])[..., 0] - 2.0 * (labels != -100)
    r.scatter_(-1, labels.clamp_min(0)[..., None], lowered[..., None])
    theirs = -(r.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_flat_code_divides_by_the_padded_rows(tiny):
    pairs = tiny.pairs(refuse=("forget",), pad_to=128)
    batch = pairs.collate([pairs[i] for i in range(4)])
    losses = TermLosses([objectives.get("flat", preset="flat_code"), "flat"])
    counts = {term.count: count_items(batch, *term.count) for term in losses.terms}
    model = tiny.model()
    ours = losses.term_losses(model, batch, counts)
    for loss, padded in zip(ours, (True, False), strict=True):
        means = []
        for kind in ("forget_refusal", "forget"):
            z, y, rows = logits_of(model, batch[kind])
            p = torch.zeros(4).index_add(0, rows, z.softmax(-1).gather(-1, y[:, None])[:, 0])
            means.append(p / (127 if padded else torch.bincount(rows)))
        torch.testing.assert_close(loss, ((means[1].tanh() - means[0].tanh()) / 2).mean())


def test_what_a_cache_lacks_is_named_and_built(tiny, cache, tmp_path, caplog):
    model, path = tiny.model(seed=1), tmp_path / "forget.safetensors"
    old = ReferenceCache.build(model, tiny.forget, path, kl=True, progress=False)
    with pytest.raises(ValueError, match=r"has logp per token; build it with scalars=\[\('entropy', 1\.0\)\]"):
        TermLosses(["undial"], old)
    with pytest.raises(ValueError, match=r"build it with scalars=\[\('logp', 2\.0\)\]"):
        TermLosses([objectives.get("npo", temperature=2.0)], old)
    with pytest.raises(ValueError, match="scalars='entropi': did you mean entropy"):
        ReferenceCache.build(model, tiny.forget, path, scalars=[("entropi", 1.0)], progress=False)
    new = ReferenceCache.build(model, tiny.forget, path, kl=True, scalars=SCALARS, progress=False)
    assert "its scalars differ" in caplog.text
    assert new.metadata["scalars"] == ["entropy", "entropy@2.0", "logp@2.0", "logp@3.0"]
    with torch.no_grad():
        batch = tiny.pairs().collate([tiny.pairs()[i] for i in (3, 1)])["forget"]
        r, y, _ = logits_of(model.eval(), batch)
    for temperature in (1.0, 2.0):
        log_q = (r / temperature).log_softmax(-1)
        entropy = -(log_q.exp() * log_q).sum(-1)
        torch.testing.assert_close(new.scalar("entropy", [3, 1], temperature), entropy, rtol=1e-5, atol=1e-5)
        logp = log_q.gather(-1, y[:, None])[:, 0]
        torch.testing.assert_close(new.scalar("logp", [3, 1], temperature), logp, rtol=1e-5, atol=1e-5)
    written = path.read_bytes()
    again = ReferenceCache.build(model, tiny.forget, path, scalars=[("entropy", 1.0)], progress=False)  # it serves
    assert again.metadata == new.metadata
    assert path.read_bytes() == written


def test_more_tokens_than_there_are_is_refused(tiny, arguments):
    size = tiny.model().config.vocab_size
    terms = [objectives.get("bst", k=256)]
    small = tiny.model()
    small.resize_token_embeddings(200)
    with pytest.raises(ValueError, match="k=256: the model's vocabulary has 200 tokens; "):
        UnlearnTrainer(model=small, args=arguments(), train_dataset=tiny.pairs(), objectives=terms)
    assert size > 256
