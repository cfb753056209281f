"""ReferenceCache against fresh computations by the live model, and what it refuses."""

import logging
import os

import pytest
import torch
from safetensors.torch import load_file

from pyunlearn.data import collate
from pyunlearn.model.cache import ReferenceCache
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.fingerprint import dataset_fingerprint, model_fingerprint
from pyunlearn.model.forward import select_positions, supervised_hidden, supervised_stats
from pyunlearn.store import Damaged

from .small import H, V, build, make, make_rows, spoil

# Batches of other shapes are summed in another order, which depends on the machine: up to 8 ulp of states around 2.
ROUNDING = {"atol": 2e-6, "rtol": 1e-6}


def test_same_batches_give_the_same_bits(model, path):
    rows = make_rows([8] * 6)
    cache = build(model, rows, path, kl=True, batch_size=3)
    for indices in ([0, 1, 2], [3, 4, 5]):
        batch = collate([rows[i] for i in indices], 0)
        with torch.no_grad():
            stats, fresh = supervised_stats(model, batch)
        assert torch.equal(cache.logp(batch["index"]), stats.logp)
        assert torch.equal(cache.hidden(batch["index"]), fresh.hidden)


@pytest.mark.parametrize("positions", ["supervised", "real"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_rows_in_any_order_equal_a_fresh_computation(model, rows, path, positions, batch_size):
    cache = build(model, rows, path, kl=True, positions=positions, batch_size=batch_size)
    for indices in ([2, 0, 4], [1], [3, 3, 1]):
        batch = collate([rows[i] for i in indices], 7)
        with torch.no_grad():
            logp = supervised_stats(model, batch)[0].logp
            fresh = supervised_hidden(model, batch, positions)
        torch.testing.assert_close(cache.logp(indices), logp, **ROUNDING)
        torch.testing.assert_close(cache.hidden(indices), fresh.hidden, **ROUNDING)
        assert len(fresh.hidden) == len(select_positions(batch, positions)[0])
    assert cache.logp([]).shape == (0,)
    assert cache.hidden(torch.tensor([], dtype=torch.int64)).shape == (0, H)


def test_logp_is_of_the_labels_whatever_the_positions(model, rows, path):
    """Labels need not be the input's own tokens."""
    other = [{**row, "labels": row["labels"].where(row["labels"] < 0, (row["labels"] + 1) % V)} for row in rows]
    cache = build(model, other, path, kl=True, positions="real")
    with torch.no_grad():
        expected = supervised_stats(model, collate(other, 0))[0].logp
    torch.testing.assert_close(cache.logp(range(5)), expected, **ROUNDING)


@pytest.mark.parametrize("positions", ["supervised", "real"])
def test_hidden_states_of_layers(model, rows, path, positions):
    cache = build(model, rows, path, layers=["shallow", -1, 1], positions=positions, batch_size=2)
    assert cache.metadata["layers"] == [1, 2]
    assert "layer 1, layer 2" in repr(cache)
    batch = collate([rows[i] for i in (2, 0, 4)], 7)
    with torch.no_grad():
        fresh = supervised_hidden(model, batch, positions, layers=[1, 2])
    for layer in (1, 2):
        torch.testing.assert_close(cache.hidden([2, 0, 4], layer), fresh.layers[layer], **ROUNDING)
        assert torch.equal(cache.hidden([2, 0, 4], -layer), cache.hidden([2, 0, 4], 3 - layer))
    with pytest.raises(ValueError, match="layer=3: the model has 2 layers, needs 1 to 2"):
        cache.hidden([0], 3)
    with pytest.raises(ValueError, match="build it with kl=True for hidden"):
        cache.hidden([0])
    with pytest.raises(ValueError, match=r"hidden states of layers \[1\], not of layer 2; build it with layers=\[2\]"):
        build(model, rows, path.with_name("other"), layers=[1]).hidden([0], "deep")
    with pytest.raises(ValueError, match=r"layers \[\], not of layer deep; build it with layers=\['deep'\]"):
        build(model, rows, path.with_name("none")).hidden([0], "deep")
    with pytest.raises(ValueError, match="layer=5: LlamaForCausalLM has 2 layers"):
        build(model, rows, path, layers=[5])


def test_a_cache_of_more_layers_serves_for_fewer(model, rows, path, caplog):
    build(model, rows, path, kl=True, layers=[1, 2])
    written = path.stat().st_mtime_ns
    for options in ({"layers": [2]}, {"kl": True}, {"kl": True, "layers": [1]}, {"positions": "real"}):
        build(model, rows, path, **options)
    assert path.stat().st_mtime_ns == written
    with caplog.at_level(logging.WARNING):
        build(model, rows, path, layers=[1], positions="real")
        assert "its positions differ(s)" in caplog.text
        build(model, rows, path, layers=[2], positions="real")
        assert "its layers differ(s)" in caplog.text


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_kl_from_the_cache_equals_kl_from_a_live_reference(rows, path, kind):
    """Phi's head has a bias, which the cache has to keep too."""
    model, live = make(0, kind), make(3, kind)
    cache = build(live, rows, path, kl=True)
    assert (cache.head.bias is not None) == (kind == "phi")
    batch = collate([rows[i] for i in (4, 1, 2)], 0)
    with torch.no_grad():
        pair = supervised_hidden(live, batch).hidden, CausalLM.of(live).read_head()
    expected = supervised_stats(model, batch, ("kl_pq", "kl_qp"), reference=pair)[0]
    stats = supervised_stats(model, batch, ("kl_pq", "kl_qp"), reference=(cache.hidden(batch["index"]), cache.head))[0]
    assert expected.kl_pq.min() > 1e-3
    torch.testing.assert_close(stats.kl_pq, expected.kl_pq, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.kl_qp, expected.kl_qp, atol=1e-5, rtol=1e-5)
    stats.kl_pq.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(rows, path, dtype):
    model = make().to(dtype)
    cache = build(model, rows, path, kl=True)
    batch = collate(rows, 0)
    with torch.no_grad():
        fresh = supervised_hidden(model, batch)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(cache.hidden(range(5)), fresh.hidden, atol=tolerance, rtol=tolerance)
    assert cache.logp([0]).dtype == torch.float32
    assert torch.equal(cache.head.weight, model.lm_head.weight)
    assert cache.metadata["dtype"] == str(dtype).removeprefix("torch.")


def test_the_file_is_plain_safetensors(model, rows, path):
    cache = build(model, rows, path, kl=True, positions="real")
    tensors = load_file(path)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "logp": (torch.float32, (sum(len(r["labels"]) - max(1, len(r["labels"]) // 3) for r in rows),)),
        "logp.offsets": (torch.int64, (6,)),
        "hidden": (torch.float32, (sum(len(r["labels"]) - 1 for r in rows), H)),
        "hidden.offsets": (torch.int64, (6,)),
        "head.weight": (torch.float32, (V, H)),
    }
    assert len(cache) == cache.metadata["num_rows"] == 5
    assert cache.metadata["num_tokens"] == len(tensors["logp"])
    assert cache.metadata["num_hidden"] == len(tensors["hidden"])
    assert cache.metadata["positions"] == "real"
    assert "rows=5" in repr(cache)


def test_only_the_rows_asked_for_are_read(path, model, rows):
    """Spoil the bytes of every row but one of an open file: what is read of that one stays right."""
    cache = build(model, rows, path, kl=True)
    expected = cache.logp([2]), cache.hidden([2])
    opened = ReferenceCache.open(path)
    tensors = load_file(path)
    spoil(path, {name: [int(end) for end in tensors[f"{name}.offsets"][2:4]] for name in ("logp", "hidden")})
    assert torch.equal(opened.logp([2]), expected[0])
    assert torch.equal(opened.hidden([2]), expected[1])
    assert opened.logp([1]).isnan().all()
    with pytest.raises(Damaged, match="is damaged"):
        ReferenceCache.open(path)


def test_model_fingerprint():
    model = make()
    known = model_fingerprint(model)
    assert known == model_fingerprint(make())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    assert model_fingerprint(model) != known
    assert model_fingerprint(make().bfloat16()) != known
    model = make()
    model.register_buffer("extra", torch.zeros(()))
    assert model_fingerprint(model) != known


def test_dataset_fingerprint(rows):
    known = dataset_fingerprint(rows)
    assert known == dataset_fingerprint(make_rows())
    assert known != dataset_fingerprint(rows[::-1])
    relabelled = [{**rows[0], "labels": rows[0]["input_ids"]}, *rows[1:]]
    assert known != dataset_fingerprint(relabelled)

    class Named(list):
        fingerprint = "abc"

    assert dataset_fingerprint(Named(rows)) == "abc"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "dataset: is empty"),
        ([{"input_ids": torch.arange(3), "labels": torch.arange(2)}], r"one shape \(T,\)"),
        (
            [{"input_ids": torch.arange(3), "labels": torch.full((3,), -100)}],
            r"dataset\[0\]: has no supervised token",
        ),
        ([{"input_ids": torch.arange(3), "labels": torch.tensor([0, -100, -100])}], "no supervised token"),
        ([{"input_ids": torch.arange(3), "labels": torch.arange(3), "index": 4}], "'index' is 4, needs 0"),
    ],
)
def test_bad_datasets(model, path, rows, message):
    with pytest.raises(ValueError, match=message):
        build(model, rows, path)
    assert not path.exists()


def test_bad_arguments(model, rows, path):
    for positions in ("all", "followed"):
        with pytest.raises(
            ValueError, match=f"positions='{positions}': what a model says at padding depends on the batch"
        ):
            build(model, rows, path, kl=True, positions=positions)
    with pytest.raises(ValueError, match="positions='prompt'"):
        build(model, rows, path, positions="prompt")
    with pytest.raises(ValueError, match="batch_size=0"):
        build(model, rows, path, batch_size=0)
    with pytest.raises(FileNotFoundError, match="no reference cache at"):
        ReferenceCache.open(path)
    cache = build(model, rows, path)
    for bad in ([5], [0, -1]):
        with pytest.raises(IndexError, match=f"row {bad[-1]} is not in the cache, which has rows 0 to 4"):
            cache.logp(bad)
    with pytest.raises(ValueError, match="kl=True for hidden"):
        cache.hidden([0])
    with pytest.raises(ValueError, match="kl=True for head"):
        _ = cache.head


def test_a_broken_model_is_not_cached(rows, path):
    model = make()
    with torch.no_grad():
        model.model.embed_tokens.weight[int(rows[2]["input_ids"][5])] = torch.nan
    with pytest.raises(ValueError, match=r"non-finite log-probabilities among rows \[.*2"):
        build(model, rows, path)
    assert os.listdir(path.parent) == []


def test_progress_bar(model, rows, path, capsys):
    ReferenceCache.build(model, rows, path)
    shown = capsys.readouterr()
    assert "5/5" in shown.err
    assert shown.out == ""
