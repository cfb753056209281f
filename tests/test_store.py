"""Units of work: kept whole, read back as they were, told apart by identity, and never damaged without a word."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pyunlearn.distributed import Processes
from pyunlearn.store import Damaged, Store

ROOT = Path(__file__).resolve().parents[1]
IDENTITY = {"model": "ab12", "seed": 0, "sigma": 1e-5, "data": {"rows": [1, 2], "name": "täst"}}
OTHER = {**IDENTITY, "seed": 1}
VALUES = {
    "number": 0.1, "text": "grün \u2028 \x00 \"quoted\"", "list": [1, [2.5, None], {}], "empty": {}, "false": False,
    "mapping": {"b": 1, "a": {"c": []}}, "zero": 0, "none inside": [None], "nan": [math.nan, math.inf],
}  # fmt: skip
FLOAT8 = [getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)]
DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool, torch.complex64, *FLOAT8,
]  # fmt: skip
ALONE = Processes(torch.device("cpu"))


def no_work(*_):
    raise AssertionError("is kept already")


@pytest.fixture(params=["memory", "folder", "file"])
def reopen(request, tmp_path):
    """Opens one store again and again, as later programs would; in memory there is one for all."""
    memory = Store(None)
    return {
        "memory": lambda: memory,
        "folder": lambda: Store(tmp_path / "store"),
        "file": lambda: Store(tmp_path / "store.json"),
    }[request.param]


def same(one, other):
    if isinstance(one, torch.Tensor):
        bits = [t.reshape(-1).view(torch.uint8) for t in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return type(one) is type(other) and json.dumps(one) == json.dumps(other)


# ---- values and identities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back(reopen, name):
    assert reopen().get(name) is None
    assert same(reopen().put(name, VALUES[name], IDENTITY), VALUES[name])
    assert same(reopen().get(name, IDENTITY), VALUES[name])
    assert same(reopen().compute(name, IDENTITY, no_work), VALUES[name])
    assert reopen().names() == [name]


def test_another_identity_is_not_there_and_is_replaced(reopen):
    reopen().put("unit", "old", IDENTITY)
    for other in (OTHER, {}, None, {**IDENTITY, "more": 1}, {**IDENTITY, "sigma": 1e-6}):
        assert reopen().get("unit", other) is None
    assert reopen().get("unit", dict(reversed(IDENTITY.items()))) == "old"
    assert reopen().get("unit", {**IDENTITY, "data": {"rows": (1, 2), "name": "täst"}}) == "old"  # as JSON has it
    assert reopen().compute("unit", OTHER, lambda: "new") == "new"
    assert reopen().get("unit", OTHER) == "new"
    assert reopen().get("unit", IDENTITY) is None
    assert reopen().names() == ["unit"]


def test_a_value_is_the_same_just_made_and_read_back(reopen):
    made = reopen().compute("unit", None, lambda: {1: (1, 2)})
    assert same(made, {"1": [1, 2]})
    assert same(reopen().compute("unit", None, no_work), made)
    rows = reopen().finish({"a": "unit a"}, lambda _: (1, 2), "rows", ALONE, progress=False)
    assert rows == {"a": [1, 2]} == reopen().finish({"a": "unit a"}, no_work, "rows", ALONE, progress=False)


def test_what_is_no_value_is_refused(reopen):
    for make in (lambda: reopen().put("unit", None), lambda: reopen().compute("unit", None, lambda: None)):
        with pytest.raises(ValueError, match="unit: value=None: needs another value"):
            make()
    with pytest.raises(TypeError, match="not JSON serializable"):
        reopen().put("unit", {"a": {1, 2}})
    with pytest.raises(TypeError, match="not JSON serializable"):
        reopen().put("unit", {"a": torch.ones(1), "b": 1})
    assert reopen().names() == []


def test_finish_makes_what_is_missing_and_keeps_each_at_once(reopen):
    made = []

    def make(item):
        if item == "c" and "c" not in made:
            made.append(item)
            raise KeyboardInterrupt
        made.append(item)
        return item * 2

    units = {item: f"unit {item}" for item in "abcd"}
    options = {"identity": lambda item: {**IDENTITY, "item": item}, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        reopen().finish(units, make, "units", ALONE, **options)
    assert reopen().names() == ["unit a", "unit b"]
    values = reopen().finish(units, make, "units", ALONE, **options)
    assert values == {"a": "aa", "b": "bb", "c": "cc", "d": "dd"}
    assert list(values) == list("abcd")
    assert made == ["a", "b", "c", "c", "d"]
    assert reopen().finish(units, no_work, "units", ALONE, **options) == values
    options["identity"] = lambda item: OTHER if item == "b" else {**IDENTITY, "item": item}
    reopen().finish(units, make, "units", ALONE, **options)
    assert made[5:] == ["b"]


# ---- tensors ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "folder"])
def tensor_store(request, tmp_path):
    return Store(None if request.param == "memory" else tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)], ids=str)
def test_tensors_of_every_dtype_and_shape(tensor_store, dtype, shape):
    tensor = (torch.randn(shape) * 5).to(dtype)
    tensor_store.put("alone", tensor, IDENTITY)
    assert same(tensor_store.get("alone", IDENTITY), tensor)
    assert tensor_store.get("alone", OTHER) is None
    named = {"grün/1": tensor, "b": tensor.flatten()}
    tensor_store.put("named", named)
    assert same(tensor_store.get("named"), named)
    assert tensor_store.names() == ["alone", "named"]


def test_tensors_that_are_views_or_need_gradients(tensor_store):
    table = torch.arange(12.0, requires_grad=True).view(3, 4)
    named = {"whole": table, "column": table[:, 1], "again": table, "transposed": table.T, "rest": table[1:]}
    for value in (tensor_store.put("table", named), tensor_store.get("table")):
        assert same(value, {key: tensor.detach().contiguous() for key, tensor in named.items()})
        assert not any(tensor.requires_grad for tensor in value.values())


def test_a_value_of_another_kind_takes_the_place(tmp_path):
    store, tensor = Store(tmp_path), torch.ones(2)
    for value, file in (("text", "unit.json"), (tensor, "unit.safetensors"), ("more", "unit.json")):
        store.put("unit", value)
        assert same(store.get("unit"), value)
        assert [path.name for path in tmp_path.iterdir()] == [file]


def test_one_file_holds_no_tensors(tmp_path):
    store = Store(tmp_path / "units.json")
    with pytest.raises(ValueError, match=r"unit: tensors are kept in a folder, .*units\.json is one file of JSON"):
        store.put("unit", torch.ones(1))
    assert list(tmp_path.iterdir()) == []


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["draw 3", "grün", "数据", "a.b-1e-05", "x.json", "x.safetensors", "[!.]*", "Job"])
@pytest.mark.parametrize("value", ["text", torch.ones(2)], ids=["JSON", "tensor"])
def test_names_of_files(name, value, tmp_path):
    store = Store(tmp_path / "store", {"seed": 0})
    store.put(name, value)
    assert same(store.get(name), value)
    assert store.names() == [name]
    assert Store(tmp_path / "store", {"seed": 0}).names() == [name]


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../outside", "/outside", "a\\b", "a\0b", "job"])
def test_names_that_would_leave_the_folder_or_hide_in_it(name, tmp_path):
    store = Store(tmp_path / "inside", {"seed": 0})
    for call in (store.put, lambda name, value: store.get(name)):
        with pytest.raises(ValueError, match="needs a file's name, not hidden, without slashes and other than 'job'"):
            call(name, "text")
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "job.json"]


def test_any_name_in_one_file_or_in_memory(tmp_path):
    for place in (None, tmp_path / "units.json"):
        store = Store(place)
        for i, name in enumerate(["a/b", "", "job", "../x"]):
            store.put(name, i)
        assert [store.get(name) for name in store.names()] == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["units.json"]
    assert len((tmp_path / "units.json").read_text().splitlines()) == 4 + 2  # one a line


# ---- damage ----------------------------------------------------------------------------------------------------------


def kept_files(folder):
    """(file, a function that reads it, what it reads while the file is whole)."""
    Store(folder / "owned", IDENTITY).put("unit", VALUES["mapping"], IDENTITY)
    Store(folder / "owned").put("tensors", {"a": torch.randn(3, 2), "b": torch.randn(2).bfloat16()}, IDENTITY)
    for name in ("one", "other"):
        Store(folder / "units.json").put(name, VALUES["list"], IDENTITY)
    reads = {
        "owned/job.json": lambda: Store(folder / "owned", IDENTITY).names(),
        "owned/unit.json": lambda: Store(folder / "owned").get("unit", IDENTITY),
        "owned/tensors.safetensors": lambda: Store(folder / "owned").get("tensors", IDENTITY),
        "units.json": lambda: [Store(folder / "units.json").get(name, IDENTITY) for name in ("one", "other")],
    }
    return [(folder / file, read, read()) for file, read in reads.items()]


def unnoticed(path, read, value):
    """Whether `read` gives the value as if nothing had happened to the file; else it has to tell of the damage."""
    try:
        assert same(read(), value)
    except Damaged as damage:
        if not str(damage).startswith(f"{path}: is damaged ("):
            raise
        return False
    return True


@pytest.mark.parametrize("index", range(4), ids=["owner", "JSON", "tensors", "one file"])
def test_a_flipped_bit_is_told(index, tmp_path):
    """In every byte of every file. What JSON reads as the same, such as another white space, may pass."""
    path, read, value = kept_files(tmp_path)[index]
    whole, missed = path.read_bytes(), []
    for position in range(len(whole)):
        for bit in {position % 8, 5}:  # 5: upper and lower case
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            if unnoticed(path, read, value):
                missed.append(position)
    assert {whole[position] for position in missed} <= set(b" \ne")  # 1e-05 may be 1E-05


@pytest.mark.parametrize("index", range(4), ids=["owner", "JSON", "tensors", "one file"])
def test_half_a_file_is_told(index, tmp_path):
    path, read, value = kept_files(tmp_path)[index]
    whole = path.read_bytes()
    for length in range(len(whole.rstrip())):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged, match="is damaged"):
            read()
    path.write_bytes(whole + b"more")
    with pytest.raises(Damaged):
        read()
    path.write_bytes(whole)
    assert same(read(), value)


@given(st.integers(0, 3), st.floats(0, 1, exclude_max=True), st.integers(0, 20), st.binary(max_size=20))
@settings(max_examples=60)
def test_damage_of_any_kind_is_told(index, start, length, replacement):
    """Some bytes of a file, anywhere, become others."""
    with tempfile.TemporaryDirectory() as folder:
        path, read, value = kept_files(Path(folder))[index]
        damaged = bytearray(path.read_bytes())
        first = int(start * len(damaged))
        damaged[first : first + length] = replacement
        path.write_bytes(damaged)
        unnoticed(path, read, value)


def test_files_of_others_are_no_units(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "unit.json").write_text('{"a": 1}')
    with pytest.raises(Damaged, match=r"unit\.json: is damaged \(no kept unit\)"):
        store.get("unit")
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(Damaged, match=r"weights\.safetensors: is damaged \(no kept tensors"):
        store.get("weights")
    (tmp_path / "units.json").write_text("{}")
    with pytest.raises(Damaged, match="no list of kept units"):
        Store(tmp_path / "units.json")


def test_damage_goes_to_other_processes():
    damage = pickle.loads(pickle.dumps(Damaged(Path("a/b.json"), "half")))
    assert str(damage) == f"{Path('a/b.json')}: is damaged (half); delete it, and it will be made again"


# ---- owners ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_job_is_refused(tmp_path):
    Store(tmp_path / "store", IDENTITY, "state").put("unit", 1)
    assert Store(tmp_path / "store", IDENTITY, "state").get("unit") == 1
    folder = tmp_path / "store"
    for owner, difference in (
        ({**IDENTITY, "seed": 1}, "seed: 0 -> 1"),
        ({**IDENTITY, "seed": 1, "model": "cd"}, "model: 'ab12' -> 'cd' and 1 more"),
        ({**IDENTITY, "data": {"rows": [1, 2], "name": "other"}}, "data.name: 'täst' -> 'other'"),
        ({key: value for key, value in IDENTITY.items() if key != "seed"}, "seed: 0 -> None"),
    ):
        with pytest.raises(ValueError, match="another job") as refusal:
            Store(folder, owner, "state")
        message = f"state: {folder} belongs to another job ({difference}); delete it or choose another folder"
        assert str(refusal.value) == message


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"state: .* holds other files; choose a new or an empty folder"):
        Store(tmp_path, IDENTITY, "state")
    with pytest.raises(ValueError, match=r"state: .*thesis\.tex is a file, needs a folder"):
        Store(tmp_path / "thesis.tex", IDENTITY, "state")
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / ".DS_Store").write_text("")
    Store(tmp_path, IDENTITY, "state")


# ---- processes -------------------------------------------------------------------------------------------------------

WRITER = """
import sys, torch
from pyunlearn.store import Store
store = Store(sys.argv[1], {"seed": 0})
for i in range(100000):
    store.put("row", {"row": [i] * 2000})
    store.put("tensor", {"a": torch.full((2000,), float(i))})
    print(i, flush=True)
"""


def test_a_writer_killed_at_any_time_leaves_whole_units(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, str(tmp_path / "store")]
    writers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "0\n"
        store = Store(tmp_path / "store", {"seed": 0})
        for writer in writers:
            for _ in range(40):  # while both write, then while one does
                assert len(set(store.get("row")["row"])) == 1
                assert len(set(store.get("tensor")["a"].tolist())) == 1
            writer.kill()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    store = Store(tmp_path / "store", {"seed": 0})
    assert len(set(store.get("row")["row"])) == len(set(store.get("tensor")["a"].tolist())) == 1
    assert store.names() == ["row", "tensor"]


KILLED = """
import os, signal, sys
from pyunlearn.store import Store
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Store(sys.argv[1]).put("row", 1)
"""


def test_what_a_killed_writer_leaves_in_a_folder_of_many_jobs_is_cleared(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False)
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    Store(tmp_path).put("row", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["row.json"]


def test_a_damaged_mark_says_what_to_delete(tmp_path):
    folder = tmp_path / "state"
    Store(folder, {"a": 1}, "state")
    for content in ("{", '{"format": "of an earlier version"}'):
        (folder / "job.json").write_text(content)
        with pytest.raises(
            Damaged, match=rf"job.json: is damaged .* of another version.*; delete the folder {folder} or"
        ):
            Store(folder, {"a": 1}, "state")
