"""ReferenceCache against fresh computations by the live model, and what happens when a build or a file goes
wrong.
"""

import json
import logging
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from pyunlearn.data import collate
from pyunlearn.model import cache as caches
from pyunlearn.model.cache import ReferenceCache
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.fingerprint import dataset_fingerprint, model_fingerprint
from pyunlearn.model.forward import select_positions, supervised_hidden, token_stats_of
from pyunlearn.store import Damaged, digest_tensors, header_of

V, H = 53, 16
SIZES = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def make(seed=0, kind="llama"):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "llama" else PhiForCausalLM(PhiConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def make_rows(lengths=(9, 5, 12, 7, 9), seed=1):
    """Rows whose first third (at least one token) is prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(1, V, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 3)] = -100
        rows.append({"input_ids": ids, "labels": labels, "index": index})
    return rows


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "reference.safetensors"


def build(model, rows, path, **options):
    return ReferenceCache.build(model, rows, path, progress=False, **options)


def test_same_batches_give_the_same_bits(model, path):
    rows = make_rows([8] * 6)
    cache = build(model, rows, path, kl=True, batch_size=3)
    for indices in ([0, 1, 2], [3, 4, 5]):
        batch = collate([rows[i] for i in indices], 0)
        with torch.no_grad():
            stats, found = token_stats_of(model, batch)
        assert torch.equal(cache.logp(batch["index"]), stats.logp)
        assert torch.equal(cache.hidden(batch["index"]), found.hidden)


@pytest.mark.parametrize("positions", ["supervised", "real"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_rows_in_any_order_equal_a_fresh_computation(model, rows, path, positions, batch_size):
    cache = build(model, rows, path, kl=True, positions=positions, batch_size=batch_size)
    for indices in ([2, 0, 4], [1], [3, 3, 1]):
        batch = collate([rows[i] for i in indices], 7)
        with torch.no_grad():
            logp = token_stats_of(model, batch)[0].logp
            found = supervised_hidden(model, batch, positions)
        torch.testing.assert_close(cache.logp(indices), logp, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(cache.hidden(indices), found.hidden, atol=1e-6, rtol=1e-6)
        assert len(found.hidden) == len(select_positions(batch, positions)[0])
    assert cache.logp([]).shape == (0,)
    assert cache.hidden(torch.tensor([], dtype=torch.int64)).shape == (0, H)


def test_logp_is_of_the_labels_whatever_the_positions(model, rows, path):
    """Labels need not be the input's own tokens."""
    other = [{**row, "labels": row["labels"].where(row["labels"] < 0, (row["labels"] + 1) % V)} for row in rows]
    cache = build(model, other, path, kl=True, positions="real")
    with torch.no_grad():
        expected = token_stats_of(model, collate(other, 0))[0].logp
    torch.testing.assert_close(cache.logp(range(5)), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("positions", ["supervised", "real"])
def test_hidden_states_of_layers(model, rows, path, positions):
    cache = build(model, rows, path, layers=["shallow", -1, 1], positions=positions, batch_size=2)
    assert cache.metadata["layers"] == [1, 2]
    assert "layer 1, layer 2" in repr(cache)
    batch = collate([rows[i] for i in (2, 0, 4)], 7)
    with torch.no_grad():
        found = supervised_hidden(model, batch, positions, layers=[1, 2])
    for layer in (1, 2):
        torch.testing.assert_close(cache.hidden([2, 0, 4], layer), found.layers[layer], atol=1e-6, rtol=1e-6)
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
    expected = token_stats_of(model, batch, ("kl_pq", "kl_qp"), reference=pair)[0]
    stats = token_stats_of(model, batch, ("kl_pq", "kl_qp"), reference=(cache.hidden(batch["index"]), cache.head))[0]
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
        found = supervised_hidden(model, batch)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(cache.hidden(range(5)), found.hidden, atol=tolerance, rtol=tolerance)
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


def test_a_matching_file_is_reused(model, rows, path, monkeypatch):
    build(model, rows, path, kl=True)
    monkeypatch.setattr(caches, "_fill", lambda *args: pytest.fail("it was built again"))
    assert build(model, rows, path, kl=True).head.weight.shape == (V, H)
    build(model, rows, path)  # hidden states do not disturb those who want none
    build(make().train(), rows, path)  # same weights, another object
    opened = ReferenceCache.open(path, model=model, dataset=rows)
    assert torch.equal(opened.logp([1]), ReferenceCache.open(path).logp([1]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": make(5)}, "its model differ"),
        ({"dataset": make_rows(seed=9)}, "its dataset differ"),
        ({"kl": True}, "its kl differ"),
        ({"kl": True, "model": make(5)}, "its model, kl differ"),
    ],
)
def test_what_does_not_match_is_rebuilt_with_a_message(model, rows, path, caplog, change, reason):
    build(model, rows, path)
    arguments = {"model": model, "dataset": rows, **change}
    with caplog.at_level(logging.WARNING, "pyunlearn.model.cache"):
        cache = ReferenceCache.build(path=path, progress=False, **arguments)
    assert reason in caplog.text
    with torch.no_grad():
        expected = token_stats_of(arguments["model"], collate(arguments["dataset"], 0))[0].logp
    torch.testing.assert_close(cache.logp(range(5)), expected, atol=1e-6, rtol=1e-6)


def test_other_positions_and_formats_are_rebuilt(model, rows, path, caplog, monkeypatch):
    build(model, rows, path, kl=True)
    build(model, rows, path, kl=True, positions="real")
    assert "its positions differ" in caplog.text
    monkeypatch.setattr(caches, "FORMAT", "pyunlearn-reference-3")
    with pytest.raises(ValueError, match="another format"):
        ReferenceCache.open(path)
    build(model, rows, path)
    assert ReferenceCache.open(path).metadata["format"] == "pyunlearn-reference-3"


def test_open_says_which_differs(model, rows, path):
    build(model, rows, path)
    other, others = make(5), make_rows(seed=9)
    with pytest.raises(ValueError, match="a cache of another model: model is"):
        ReferenceCache.open(path, model=other, dataset=rows)
    with pytest.raises(ValueError, match="a cache of another dataset: dataset is"):
        ReferenceCache.open(path, model=model, dataset=others)
    with pytest.raises(ValueError, match="a cache of another model and dataset"):
        ReferenceCache.open(path, model=other, dataset=others)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_build_leaves_what_was_there(model, rows, path, monkeypatch, error, existing):
    before = build(make(5), rows, path).logp([0]) if existing else None
    calls, head_stats = [], caches.head_stats

    def stop_at_the_second_batch(*args):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return head_stats(*args)

    monkeypatch.setattr(caches, "head_stats", stop_at_the_second_batch)
    model.train()
    with pytest.raises(error):
        build(model, rows, path, batch_size=2)
    assert model.training
    model.eval()
    assert os.listdir(path.parent) == ([path.name] if existing else [])
    if existing:
        assert torch.equal(ReferenceCache.open(path).logp([0]), before)


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


def spoil(path, whole):
    """Writes NaN over all rows of tensors but those from a first to a last; the file stays the same one."""
    with path.open("r+b") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
        for name, (first, last) in whole.items():
            begin, end = (8 + header_size + offset for offset in header[name]["data_offsets"])
            size = (end - begin) // header[name]["shape"][0]
            for start, stop in ((begin, begin + first * size), (begin + last * size, end)):
                file.seek(start)
                file.write(b"\xff" * (stop - start))


def test_a_changed_byte_anywhere_is_an_error(path, model, rows):
    build(model, rows, path, kl=True, layers=[1])
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for place in [*range(start), *range(start, len(data), 61)]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=re.escape(str(path))):  # Damaged, or no cache at all
            ReferenceCache.open(path)
    for place in (start - 20, len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=re.escape(str(path))):  # nor is it overwritten
            build(model, rows, path)
    path.write_bytes(data)
    ReferenceCache.open(path, model, rows)


def test_files_without_a_digest_are_rebuilt(path, model, rows, caplog):
    tensors, metadata = load_file(build(model, rows, path).path), build(model, rows, path).metadata
    older = {**metadata, "format": "pyunlearn-reference-1"}
    del older["layers"], older["depth"]
    save_file(tensors, path, {"pyunlearn": json.dumps(older)})
    with caplog.at_level(logging.WARNING):
        cache = build(model, rows, path)
    assert "its format differ(s)" in caplog.text
    assert torch.equal(cache.logp(range(5)), tensors["logp"])
    save_file(tensors, path, {"pyunlearn": json.dumps(metadata)})
    with pytest.raises(Damaged, match="no kept unit"):
        ReferenceCache.open(path)
    save_file({**tensors, "logp": tensors["logp"] + 1}, path, header_of(metadata, digest_tensors(tensors)))
    with pytest.raises(Damaged, match="its tensors do not have their digest"):
        ReferenceCache.open(path)


def test_results_do_not_write_into_the_file(model, rows, path):
    cache = build(model, rows, path, kl=True)
    before = path.read_bytes()
    cache.logp([0]).zero_()
    cache.hidden([0]).zero_()
    assert path.read_bytes() == before


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


def test_other_files_are_not_overwritten(model, rows, path):
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="another safetensors file"):
        build(model, rows, path)
    path.write_text("my notes")
    with pytest.raises(ValueError, match="no safetensors file"):
        build(model, rows, path)
    assert path.read_text() == "my notes"


def test_a_broken_model_is_not_cached(rows, path):
    model = make()
    with torch.no_grad():
        model.model.embed_tokens.weight[int(rows[2]["input_ids"][5])] = torch.nan
    with pytest.raises(ValueError, match=r"non-finite log-probabilities among rows \[.*2"):
        build(model, rows, path)
    assert os.listdir(path.parent) == []


def test_a_full_disk_is_an_error_at_once(model, rows, path, monkeypatch):
    monkeypatch.setattr(caches.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match=r"needs .* bytes, 10 are free"):
        build(model, rows, path)
    assert os.listdir(path.parent) == []


def test_progress_bar(model, rows, path, capsys):
    ReferenceCache.build(model, rows, path)
    shown = capsys.readouterr()
    assert "5/5" in shown.err
    assert shown.out == ""
