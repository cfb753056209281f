"""A cache's file: when it is reused, rebuilt or refused, and what a build that goes wrong leaves."""

import json
import logging
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyunlearn.data import collate
from pyunlearn.model import cache as caches
from pyunlearn.model import cache_file as files
from pyunlearn.model.cache import ReferenceCache
from pyunlearn.model.forward import supervised_stats
from pyunlearn.store import Damaged, digest_tensors, header_of

from .small import H, V, build, make, make_rows


def test_a_matching_file_is_reused(model, rows, path, monkeypatch):
    build(model, rows, path, kl=True)
    monkeypatch.setattr(caches, "fill", lambda *args: pytest.fail("it was built again"))
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
        expected = supervised_stats(arguments["model"], collate(arguments["dataset"], 0))[0].logp
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
    calls, head_stats = [], files.head_stats

    def stop_at_the_second_batch(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return head_stats(*args, **options)

    monkeypatch.setattr(files, "head_stats", stop_at_the_second_batch)
    model.train()
    with pytest.raises(error):
        build(model, rows, path, batch_size=2)
    assert model.training
    model.eval()
    assert os.listdir(path.parent) == ([path.name] if existing else [])
    if existing:
        assert torch.equal(ReferenceCache.open(path).logp([0]), before)


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


def test_other_files_are_not_overwritten(model, rows, path):
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="another safetensors file"):
        build(model, rows, path)
    path.write_text("my notes")
    with pytest.raises(ValueError, match="no safetensors file"):
        build(model, rows, path)
    assert path.read_text() == "my notes"


def test_a_full_disk_is_an_error_at_once(model, rows, path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match=r"needs .* bytes, 10 are free"):
        build(model, rows, path)
    assert os.listdir(path.parent) == []
