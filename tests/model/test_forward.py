"""Statistics from hidden states against log_softmax of the model's own logits, over the architectures' head
variants.
"""

import copy
from itertools import combinations

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from pyunlearn.model import head
from pyunlearn.model.causal_lm import CausalLM, eval_mode
from pyunlearn.model.forward import (
    POSITIONS,
    length_batches,
    select_positions,
    supervised_hidden,
    supervised_logits,
    supervised_stats,
    widest,
)

from .variants import SIZES, LoraLinear, V, make


def plain(model, batch, positions="supervised"):
    """(log-probabilities (N, V), targets) by the textbook path: all logits, log_softmax, mask."""
    ids, labels = batch["input_ids"], batch["labels"]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    keep = labels[:, 1:] != -100 if positions == "supervised" else batch["attention_mask"][:, 1:] != 0
    return logits[keep], ids[:, 1:][keep]


@pytest.mark.parametrize("positions", ["supervised", "real"])
def test_statistics_equal_the_models_own_logits(variant, batch, positions):
    with torch.no_grad():
        stats, found = supervised_stats(variant, batch, ("logp", "entropy", "greedy"), positions=positions)
        expected, targets = plain(variant, batch, positions)
    assert len(targets) == (5 + 3 + 2 if positions == "supervised" else 8 + 5 + 3)
    torch.testing.assert_close(stats.logp, expected.gather(1, targets[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy, -(expected.exp() * expected).sum(-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(stats.greedy, expected.argmax(-1) == targets)
    assert torch.equal(found.targets, targets)
    assert found.num_sequences == 3
    lengths = [5, 3, 2] if positions == "supervised" else [8, 5, 3]
    assert found.sequence_ids.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]


def test_gradients_of_every_parameter_equal_the_plain_path(variant, batch):
    weights = torch.randn(10, generator=torch.Generator().manual_seed(2))
    ours, theirs = copy.deepcopy(variant), copy.deepcopy(variant)
    stats, _ = supervised_stats(ours, batch, ("logp", "entropy"))
    (weights * stats.logp + stats.entropy).sum().backward()
    logp, targets = plain(theirs, batch)
    entropy = -(logp.exp() * logp).sum(-1)
    (weights * logp.gather(1, targets[:, None])[:, 0] + entropy).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, atol=2e-5, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_kl_to_a_live_reference(variant, batch):
    reference = copy.deepcopy(variant)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        pair = supervised_hidden(reference, batch).hidden, CausalLM.of(reference).read_head()
        stats, _ = supervised_stats(variant, batch, ("kl_pq", "kl_qp"), reference=pair)
        p, q = plain(variant, batch)[0], plain(reference, batch)[0]
    assert stats.kl_pq.min() > 1e-4
    torch.testing.assert_close(stats.kl_pq, (p.exp() * (p - q)).sum(-1), atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(stats.kl_qp, (q.exp() * (q - p)).sum(-1), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "softcap", "temperature", "bias"),
    [
        ("llama", None, 1.0, False),
        ("gemma2_softcap", 3.0, 1.0, False),
        ("cohere_logit_scale", None, 4.0, False),
        ("granite_logits_scaling", None, 8.0, False),
        ("phi_bias", None, 1.0, True),
    ],
)
def test_output_head(name, softcap, temperature, bias):
    model = make(name)
    head = CausalLM.of(model).read_head()
    assert (head.softcap, head.temperature, head.bias is not None) == (softcap, temperature, bias)
    assert head.weight is model.get_output_embeddings().weight
    CausalLM.of(model).check_head()
    CausalLM.of(make(name).bfloat16()).check_head()


def test_only_counted_positions_meet_the_head(llama, batch, monkeypatch):
    seen, rows = [], []
    CausalLM.of(llama).check_head()  # once a model, on two tokens
    hook = llama.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    linear = head.linear_token_stats
    monkeypatch.setattr(head, "linear_token_stats", lambda h, *a, **k: rows.append(h.shape) or linear(h, *a, **k))
    supervised_stats(llama, batch)
    hook.remove()
    assert seen == [(3, 0, V)]
    assert rows == [(10, 32)]
    assert not llama.lm_head._forward_pre_hooks
    with torch.no_grad():
        assert llama(batch["input_ids"]).logits.shape == (3, 9, V)  # the model is as before


def test_hidden_states_are_what_the_head_gets(llama, batch):
    with torch.no_grad():
        found = supervised_hidden(llama, batch, "all")
        expected = llama.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    assert torch.equal(found.hidden, expected.reshape(-1, 32))


def test_logits_of_what_counts_are_rows_of_their_samples(llama, batch):
    logits, targets = supervised_logits(llama, batch)
    supervised = supervised_hidden(llama, batch)
    counts = torch.bincount(supervised.sequence_ids, minlength=len(batch["input_ids"]))
    assert logits.shape[:2] == targets.shape == (len(counts), int(counts.max()))
    assert torch.equal((targets != -100).sum(1), counts)
    assert torch.equal(targets[targets != -100], supervised.targets)
    expected = llama.get_output_embeddings()(supervised.hidden)
    torch.testing.assert_close(logits[targets != -100], expected)


def test_select_positions_by_hand():
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 7, 8], [9, 10, -100, -100]]),
    }
    assert [t.tolist() for t in select_positions(batch)] == [[1, 2, 4], [7, 8, 10], [0, 0, 1]]
    assert [t.tolist() for t in select_positions(batch, "real")] == [
        [0, 1, 2, 4],
        [6, 7, 8, 10],
        [0, 0, 0, 1],
    ]
    text = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])  # one in padding is none
    assert [t.tolist() for t in select_positions({**batch, "text_mask": text}, "template_free")] == [
        [0, 2, 4],
        [6, 8, 10],
        [0, 0, 1],
    ]
    with pytest.raises(ValueError, match=r"^positions='template_free': needs batch\['text_mask'\], \(B, T\)"):
        select_positions(batch, "template_free")
    with pytest.raises(ValueError, match=r"batch\['text_mask'\]: needs the shape of input_ids \(2, 4\), got \(2, 3\)"):
        select_positions({**batch, "text_mask": text[:, 1:]}, "template_free")
    assert [t.tolist() for t in select_positions(batch, "followed")] == [
        [0, 1, 2, 4, 5, 6],
        [6, 7, 8, 10, 0, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    rows, targets, sequence_ids = select_positions(batch, "all")
    assert rows.tolist() == list(range(8))
    assert targets.tolist() == [6, 7, 8, 8, 10, 0, 0, 0]
    assert sequence_ids.tolist() == [0] * 4 + [1] * 4
    left = {"input_ids": ids.flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    assert select_positions(left, "real")[0].tolist() == [0, 1, 2, 6]
    assert len(select_positions({"input_ids": ids}, "real")[0]) == 6


def test_the_widest_positions_hold_all_the_others():
    """Compared as sets of positions; the last answer token is the format's end, so that template_free lacks it."""
    batch = {
        "input_ids": torch.arange(12).view(2, 6),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, -100, -100, 3, 4, 5], [-100, -100, 8, 9, -100, -100]]),
        "text_mask": torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 1, 0, 0, 0]]),
    }
    held = {name: {*select_positions(batch, name)[0].tolist()} for name in POSITIONS}
    for number in range(1, len(POSITIONS) + 1):
        for names in combinations(POSITIONS, number):
            fitting = [name for name in POSITIONS if all(held[name] >= held[other] for other in names)]
            assert widest(names) == min(fitting, key=lambda name: len(held[name])), names


def test_nothing_supervised_gives_empty_statistics_with_a_graph(llama, batch):
    batch["labels"] = torch.full_like(batch["labels"], -100)
    stats, found = supervised_stats(llama, batch)
    assert found.hidden.shape == (0, 32)
    assert stats.logp.shape == (0,)
    assert stats.logp.requires_grad


def test_distributed_data_parallel_reduces_the_gradients(batch, tmp_path):
    """The reducer only runs if the wrapper's own forward did: count what its buckets carry."""
    model, alone, calls = make("llama"), make("llama"), []

    def count(_, bucket):
        calls.append(bucket.buffer().numel())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.register_comm_hook(None, count)
        stats, _ = supervised_stats(wrapped, batch)
        stats.logp.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    supervised_stats(alone, batch)[0].logp.sum().backward()
    assert sum(calls) == sum(p.numel() for p in model.parameters())
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class Adapter(nn.Module):
    """Forwards calls and attributes as peft's wrapper does."""

    def __init__(self, base):
        super().__init__()
        self.base_model = base

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Adapter, lambda model: torch.compile(model, backend="eager")])
def test_adapter_and_compile_wrappers(llama, batch, wrap):
    with torch.no_grad():
        expected = supervised_stats(llama, batch)[0].logp
        assert torch.equal(supervised_stats(wrap(llama), batch)[0].logp, expected)


def test_compiled_models(llama, batch):
    """A compiled decoder serves; a model compiled with its head would keep the hook in its graph."""
    with torch.no_grad():
        expected = supervised_stats(llama, batch)[0].logp
        model = make("llama")
        model.get_decoder().compile(backend="eager")
        for _ in range(2):
            torch.testing.assert_close(supervised_stats(model, batch)[0].logp, expected)
        assert model(batch["input_ids"]).logits.shape == (3, 9, V)
        model.compile(backend="eager")
        for compiled in (model, Adapter(torch.compile(make("llama"), backend="eager"))):
            with pytest.raises(RuntimeError, match="compile the decoder instead"):
                supervised_stats(compiled, batch)


def test_heads_that_are_not_plain(llama):
    model = make("llama")
    model.lm_head = LoraLinear(model.lm_head)
    with pytest.raises(TypeError, match=r"LoraLinear.*target_modules"):
        CausalLM.of(model).read_head()
    with pytest.raises(TypeError, match=r"no LM head"):
        CausalLM.of(LlamaModel(LlamaConfig(**SIZES))).read_head()
    with pytest.raises(TypeError, match=r"needs a transformers causal LM.*Linear"):
        CausalLM.of(nn.Linear(2, 2)).read_head()
    quantised = make("llama")
    quantised.lm_head.weight = nn.Parameter(torch.zeros(V * 16, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"unquantised"):
        CausalLM.of(quantised).read_head()


class Doubled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def test_check_output_head_leaves_diverged_models_alone():
    model = make("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    CausalLM.of(model).check_head()


def test_check_output_head_finds_an_unknown_head():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="Doubled: its logits are not those of its output layer"):
        CausalLM.of(Doubled(LlamaConfig(**SIZES))).check_head()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "answers"}, "positions='answers'"),
        ({"labels": None}, r"batch\['labels'\].*NoneType"),
        ({"labels": torch.zeros(3, 8, dtype=torch.int64)}, r"\(3, 9\), got \(3, 8\)"),
        ({"input_ids": torch.zeros(9, dtype=torch.int64)}, r"shape \(B, T\)"),
    ],
)
def test_bad_batches(llama, batch, change, message):
    positions = change.pop("positions", "supervised")
    with pytest.raises(ValueError, match=message):
        supervised_hidden(llama, {**batch, **change}, positions)


def test_bad_references(llama, batch):
    head, hidden = CausalLM.of(llama).read_head(), torch.zeros(10, 32)
    with pytest.raises(ValueError, match=r"needs 10 rows.*got 9"):
        supervised_stats(llama, batch, "kl_pq", reference=(hidden[:9], head))
    with pytest.raises(ValueError, match="softcap and temperature"):
        supervised_stats(llama, batch, "kl_pq", reference=(hidden, head._replace(softcap=30.0)))


def test_eval_mode_restores_every_module(llama):
    model = make("llama").train()
    model.model.layers[1].eval()
    before = [m.training for m in model.modules()]

    def fail_inside():
        with eval_mode(model):
            assert not any(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [m.training for m in model.modules()] == before
    assert any(before)
    assert not all(before)


def test_length_batches():
    assert length_batches([3, 9, 3, 5], 2) == [[1, 3], [0, 2]]
    assert length_batches([], 2) == []
    with pytest.raises(ValueError, match="batch_size=0"):
        length_batches([1], 0)
