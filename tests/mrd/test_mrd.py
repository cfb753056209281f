"""pu.mrd against its definitions written out, and what must not change a score: padding, batches, autocast, TF32."""

from __future__ import annotations

import math

import pytest
import torch

import pyunlearn as pu
from pyunlearn.data import collate
from pyunlearn.model.precision import full_precision
from pyunlearn.mrd import ESTIMATORS, check_estimator, scored_rows

from ..float64 import MODELS, make_model
from ..model.zoo import make
from .conftest import LENGTHS, make_rows, nlls, pad

DRAWS, SEED = 6, 5


def score(model, batches, estimator="algorithm1", **options):
    return pu.mrd(model, batches, estimator, DRAWS, seed=SEED, **{"check_draws": 0, "progress": False, **options})


def written_out(model, batch, relative, sigma=1e-5, sign=1):
    """(draws, samples): sum_t relative(L_t, L_t') by a loop over draws and samples, on whole logits."""
    with torch.no_grad():
        clean, rows = nlls(model, batch), []
        for k in range(DRAWS):
            with pu.perturbed(model, sigma=sigma, seed=SEED, draw=k, sign=sign):
                moved = nlls(model, batch)
            rows.append([float(relative(a, b).sum()) for a, b in zip(clean, moved, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def test_algorithm_1_written_out(any_model, batch):
    expected = written_out(any_model, batch, lambda a, b: (a - b) / a)
    result = score(any_model, [batch])
    torch.testing.assert_close(result.draws, expected, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(result.value, expected.abs().mean(0), rtol=1e-8, atol=0)
    assert result.num_tokens.tolist() == [7, 4, 6]


def test_whole_samples_written_out(any_model, batch):
    """Labels that are the tokens themselves score the question too: x_2 .. x_n."""
    rows = [
        {"input_ids": ids[:length], "labels": labels[:length], "index": i}
        for i, (ids, labels, length) in enumerate(zip(batch["input_ids"], batch["labels"], LENGTHS, strict=True))
    ]
    whole = [collate([row], 0) for row in scored_rows(rows, "all")]
    expected = written_out(any_model, {**batch, "labels": batch["input_ids"]}, lambda a, b: (a - b) / a)
    result = score(any_model, whole)
    torch.testing.assert_close(result.draws, expected, rtol=1e-8, atol=1e-14)
    assert result.num_tokens.tolist() == [length - 1 for length in LENGTHS]
    assert [row["labels"].tolist() for row in scored_rows(rows)] == [row["labels"].tolist() for row in rows]
    with pytest.raises(ValueError, match=r"labels='answer': did you mean answers\? needs one of answers, all"):
        scored_rows(rows, "answer")


def test_definition_3_1_written_out(model, batch):
    plus, minus = (written_out(model, batch, lambda a, b: (a - b) / a, 3e-4, sign) for sign in (1, -1))
    pairs = (plus + minus) / 2
    result = score(model, [batch], "definition")
    torch.testing.assert_close(result.draws, pairs, rtol=1e-7, atol=1e-13)
    torch.testing.assert_close(result.value, pairs.mean(0).abs() / 900, rtol=1e-7, atol=0)
    torch.testing.assert_close(result.standard_error, pairs.std(0) / math.sqrt(DRAWS) / 900, rtol=1e-7, atol=0)
    assert result.diagnostics["sigma_eval"] == 3e-4
    assert torch.equal(score(model, [batch], "definition", sigma_eval=1e-5).draws != result.draws, pairs != 0)


def test_equation_3_written_out(model, batch):
    expected = written_out(model, batch, lambda a, b: b - a)
    result = score(model, [batch], "initial")
    torch.testing.assert_close(result.draws, expected, rtol=1e-8, atol=1e-14)
    single = pu.mrd(model, [batch], "initial", num_draws=1, seed=SEED, progress=False)
    torch.testing.assert_close(single.value, expected[0].abs(), rtol=1e-8, atol=0)
    assert bool(single.standard_error.isnan().all())


@pytest.mark.parametrize("estimator", ["algorithm1", "gradient", "hutchinson"])
def test_an_epsilon_in_the_denominator(model, batch, estimator):
    eps = 0.5
    result = score(model, [batch], estimator, paper_eps=eps)
    if estimator == "algorithm1":
        expected = written_out(model, batch, lambda a, b: (a - b) / (a + eps))
        torch.testing.assert_close(result.draws, expected, rtol=1e-8, atol=1e-14)
        return
    clean = [nll.detach() for nll in nlls(model, batch)]
    weighted = [
        sum((now / (then + eps)).sum() for now, then in [pair]) for pair in zip(nlls(model, batch), clean, strict=True)
    ]
    if estimator == "gradient":
        for value, loss in zip(result.value, weighted, strict=True):
            gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            assert float(value) == pytest.approx(1e-5 * math.sqrt(2 / math.pi) * norm, rel=1e-9)
    else:
        pairs = [written_out(model, batch, lambda a, b: (a - b) / (a + eps), 1e-3, sign) for sign in (1, -1)]
        expected = -sum(pairs) / 1e-6
        torch.testing.assert_close(result.draws, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_normalised_by_tokens(model, batch):
    for estimator in ESTIMATORS:
        plain, divided = score(model, [batch], estimator), score(model, [batch], estimator, normalize="tokens")
        assert torch.equal(divided.value, plain.value / plain.num_tokens)
        assert torch.equal(divided.standard_error, plain.standard_error / plain.num_tokens)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_batching_and_order_do_not_change_a_score(model, estimator):
    rows = make_rows()
    expected = score(model, [pad(rows, max(LENGTHS))], estimator).value
    one_by_one = score(model, [pad([row], len(row[0])) for row in rows], estimator, batch_size=1)
    torch.testing.assert_close(one_by_one.value, expected, rtol=1e-7, atol=0)
    wide = score(model, [pad(rows, 20, pad_id=7)], estimator)
    assert torch.equal(wide.value, expected)
    left = score(model, [pad(rows, 20, left=True)], estimator)
    assert torch.equal(left.value, expected)
    turned = score(model, [pad(rows[::-1], 12)], estimator)
    torch.testing.assert_close(turned.value.flip(0), expected, rtol=1e-7, atol=0)


def test_labels_on_padding_and_on_the_first_token_do_not_count(model, batch):
    expected = score(model, [batch]).value
    labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, 9)
    assert torch.equal(score(model, [{**batch, "labels": labels}]).value, expected)
    labels = batch["labels"].clone()
    labels[:, 0] = batch["input_ids"][:, 0]
    assert torch.equal(score(model, [{**batch, "labels": labels}]).value, expected)


def test_a_subset_of_the_parameters(model, batch):
    names = [name for name, _ in model.named_parameters() if "layers.1" in name]
    result = score(model, [batch], parameters=names)
    with torch.no_grad():
        clean, expected = nlls(model, batch), []
        for k in range(DRAWS):
            with pu.perturbed(model, seed=SEED, draw=k, parameters=names):
                expected.append([float((1 - b / a).sum()) for a, b in zip(clean, nlls(model, batch), strict=True)])
    torch.testing.assert_close(result.draws, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-14)
    gradient = score(model, [batch], "gradient", parameters=names)
    many = pu.mrd(model, [batch], num_draws=200, parameters=names, check_draws=0, progress=False)
    assert bool(((many.value - gradient.value).abs() <= 4 * many.standard_error).all())


def test_the_model_and_the_generator_are_as_before(batch):
    model = make_model("llama").train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    state = torch.random.get_rng_state()
    scored = [score(model, [batch], estimator).value for estimator in ESTIMATORS]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    frozen = make_model("llama").requires_grad_(False)  # frozen parameters are perturbed too
    for estimator, value in zip(ESTIMATORS, scored, strict=True):
        assert torch.equal(score(frozen, [batch], estimator).value, value)


def test_tokens_known_by_heart(batch):
    """Scaling the head up makes some p_t 1 to float32's last digit: scores stay finite, and the share is told."""
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    ids = batch["input_ids"].clone()
    with torch.no_grad():  # each next token the likeliest one
        for t in range(1, ids.size(1)):
            ids[:, t] = model(input_ids=ids[:, :t]).logits[:, -1].argmax(-1)
    batch = {"input_ids": ids, "labels": ids.clone()}
    single = make_model("llama").float()
    single.load_state_dict(model.state_dict())
    smallest = min(float(nll.min()) for nll in nlls(model, {**batch, "attention_mask": torch.ones_like(ids)}))
    assert smallest < 1e-9
    for estimator in ("algorithm1", "gradient", "hutchinson"):
        exact, ours = score(model, [batch], estimator), score(single, [batch], estimator)
        assert bool(ours.value.isfinite().all())
        torch.testing.assert_close(ours.value, exact.value, rtol=0.05, atol=0)
    share = score(single, [batch]).diagnostics["by_heart_share"]
    assert 0.01 < share < 1
    assert score(make_model("llama"), [batch]).diagnostics["by_heart_share"] == 0


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize(("estimator", "tolerance"), [("algorithm1", 0.02), ("gradient", 1e-4), ("hutchinson", 1e-3)])
def test_float32_on_every_device_is_close_to_float64(batch, estimator, tolerance, device):
    exact = score(make_model("llama"), [batch], estimator).value
    model = make_model("llama").float().to(device)
    found = score(model, [{name: tensor.to(device) for name, tensor in batch.items()}], estimator)
    torch.testing.assert_close(found.value, exact, rtol=tolerance, atol=0)
    assert torch.equal(score(model, [batch], estimator).value, found.value)


@pytest.mark.parametrize("name", list(MODELS))
def test_modes_of_perturbation_give_the_same_bits(batch, name):
    model = make_model(name).bfloat16().float()  # "snap" needs bfloat16 numbers
    results = {mode: score(model, [batch], mode=mode) for mode in ("overlay", "streamed", "snap", "copy")}
    for mode, result in results.items():
        assert torch.equal(result.draws, results["overlay"].draws), mode
        assert result.diagnostics["mode"] == mode


def test_the_callers_autocast_and_tf32_are_overridden(batch):
    model = make_model("llama").float()
    expected = {estimator: score(model, [batch], estimator).draws for estimator in ("algorithm1", "hutchinson")}
    gradient = score(model, [batch], "gradient").value
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for estimator, draws in expected.items():
                assert torch.equal(score(model, [batch], estimator).draws, draws)
            assert torch.equal(score(model, [batch], "gradient").value, gradient)
            loose = score(model, [batch], allow_low_precision=True)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not torch.equal(loose.draws, expected["algorithm1"])


def test_precision_settings_come_back():
    backends = torch.backends

    def settings():
        newer = hasattr(backends.cuda.matmul, "fp32_precision")
        each = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        return torch.get_float32_matmul_precision(), *([s.fp32_precision for s in each] if newer else [])

    for precision in ("high", "medium", "highest"):
        torch.set_float32_matmul_precision(precision)
        before = settings()
        with full_precision(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not backends.cuda.matmul.allow_tf32
            assert not backends.cudnn.allow_tf32
        assert settings() == before
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # set by the newer name alone
        backends.cuda.matmul.fp32_precision = "tf32"
        with full_precision(torch.device("cpu")):
            assert backends.cuda.matmul.fp32_precision == "ieee"
        assert backends.cuda.matmul.fp32_precision == "tf32"
        backends.cuda.matmul.fp32_precision = "ieee"


def test_half_precision_is_refused_or_float32_inside(batch):
    half = make_model("llama").bfloat16()
    with pytest.raises(ValueError, match=r"is torch\.bfloat16, in which sigma=1e-05 drowns in rounding"):
        score(half, [batch])
    expected = make_model("llama").bfloat16().float()
    for estimator in ESTIMATORS:
        ours = score(half, [batch], estimator, allow_low_precision=True, mode="overlay")
        torch.testing.assert_close(ours.value, score(expected, [batch], estimator).value, rtol=2e-3, atol=0)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


def test_the_self_check_tells_rounding_from_a_score(batch):
    """bfloat16 all through: the statistic is rounding, and does not double with sigma."""
    half = make_model("llama").bfloat16()
    bad = pu.mrd(half, [batch], num_draws=16, mode="copy", allow_low_precision=True, progress=False).diagnostics
    assert abs(bad["sigma_ratio"] - 2) > 0.4
    assert bad["noise_floor"] is None  # such a small step moves no bfloat16 weight
    good = pu.mrd(half.float(), [batch], num_draws=16, progress=False).diagnostics
    assert abs(good["sigma_ratio"] - 2) < 0.05
    assert good["noise_share"] < 0.05
    assert good["noise_floor"] > 0


def test_where_the_leading_order_ends(model, batch):
    assert bool(score(model, [batch], "gradient").linear_ok.all())
    far = score(model, [batch], "gradient", sigma=0.1)
    assert not bool(far.linear_ok.any())
    assert far.diagnostics["share_linear_ok"] == 0


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"estimator": "newton"}, ValueError, "estimator='newton': did you mean definition"),
        ({"sigma": 0.0}, ValueError, "sigma=0.0: needs a finite number > 0"),
        ({"sigma": math.nan, "estimator": "gradient"}, ValueError, "sigma=nan"),
        ({"sigma_eval": math.inf, "estimator": "definition"}, ValueError, "sigma_eval=inf"),
        ({"paper_eps": 0.0}, ValueError, "paper_eps=0.0"),
        ({"paper_eps": 1e-8, "estimator": "initial"}, ValueError, "Eq. 3 has no denominator"),
        ({"num_draws": 1}, ValueError, "num_draws=1: needs 2 at least, for a standard error"),
        ({"num_draws": 0, "estimator": "initial"}, ValueError, "num_draws=0: needs 1 at least"),
        ({"num_draws": 2.0}, TypeError, "num_draws=2.0: needs a whole number"),
        ({"seed": -1}, ValueError, "seed=-1: needs 0 <= seed < 2\\^64"),
        ({"seed": 1 << 64, "estimator": "gradient"}, ValueError, "seed="),
        ({"normalize": "length"}, ValueError, "normalize='length'"),
        ({"split": "both"}, ValueError, "split='both'"),
        ({"mode": "fast"}, ValueError, "mode='fast'"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"check_draws": -1}, ValueError, "check_draws=-1"),
        ({"parameters": ["nothing"]}, ValueError, "none of the name 'nothing'"),
        ({"batches": []}, ValueError, "batches: is empty"),
    ],
)
def test_bad_arguments_are_named(model, batch, changes, error, told):
    with pytest.raises(error, match=told):
        pu.mrd(**{"model": model, "batches": [batch], "progress": False, **changes})


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda b: b, TypeError, "batches: needs an iterable of batches"),
        (lambda b: [b, 3], TypeError, r"batches\[1\]: needs a dict of tensors, got int"),
        (lambda b: [{**b, "pixel_values": 0}], ValueError, "key 'pixel_values' is not supported"),
        (lambda b: [{"input_ids": b["input_ids"]}], ValueError, r"\['labels'\]: needs a tensor .*, got NoneType"),
        (lambda b: [{**b, "labels": b["labels"][0]}], ValueError, r"\['labels'\]: needs a tensor .*, got \(11,\)"),
        (lambda b: [{**b, "labels": b["labels"][:, 1:]}], ValueError, "needs the shape of input_ids"),
        (lambda b: [{**b, "attention_mask": b["labels"][:1]}], ValueError, "needs the shape of input_ids"),
        (lambda b: [{**b, "attention_mask": (torch.arange(11) != 3).expand(3, 11)}], ValueError, "row 0 has a gap"),
        (lambda b: [b, {**b, "labels": b["labels"] * 0 - 100}], ValueError, r"batches\[1\]: row 0 has no scored token"),
        (lambda b: [{**b, "attention_mask": b["labels"] * 0}], ValueError, "row 0 has no scored token"),
    ],
)  # fmt: skip
def test_bad_batches_are_named(model, batch, change, error, told):
    with pytest.raises(error, match=told):
        score(model, change(batch))


def test_scores_that_are_not_finite(batch):
    broken = make_model("llama")
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    for estimator in ESTIMATORS:
        with pytest.raises(ValueError, match="sample 0: its score is not finite"):
            score(broken, [batch], estimator)


def test_a_model_without_forward_derivatives_is_told_before_anything_is_computed(batch):
    model = make("bloom")
    for fails in (lambda: check_estimator("hutchinson", model), lambda: score(model, [batch], "hutchinson")):
        with pytest.raises(TypeError, match="'hutchinson': the forward of BloomForCausalLM has no second derivative"):
            fails()
    check_estimator("gradient", model)


def test_experts_multiply_afterwards_as_before(batch):
    model = make("mixtral")
    before = model.get_experts_implementation()
    assert before[""] != "eager"
    score(model, [batch], "hutchinson")
    assert model.get_experts_implementation() == before


def test_what_is_not_used_is_told(model, batch):
    for estimator, optimisations in (
        ("algorithm1", ["shared prefix"]),  # these samples have none
        ("gradient", ["shared prefix", "fused head"]),
        ("hutchinson", ["shared prefix", "fused head", "fused attention"]),
    ):
        declined = score(model, [batch], estimator).diagnostics["declined"]
        assert list(declined) == optimisations, estimator
        assert all(declined.values())


def test_the_mode_that_is_not_taken_is_told(batch, monkeypatch):
    monkeypatch.setattr("pyunlearn.ops.modes.room_for", lambda *_: False)
    result = score(make_model("llama"), [batch])
    assert result.diagnostics["mode"] == "streamed"
    assert result.diagnostics["declined"]["mode"].startswith("overlay: its scratch needs more than half")
