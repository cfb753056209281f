"""Grids: what they say, and what is wrong in them is told before anything runs."""

from __future__ import annotations

import pytest
import yaml

from pyunlearn.model.load import load_model
from pyunlearn.recipes import grids, matching, names, read
from pyunlearn.runs import ConfigError
from pyunlearn.runs.grid import load_grid, make_cells, make_grid
from pyunlearn.runs.overrides import load_config
from pyunlearn.runs.run import run
from pyunlearn.training.folder import write_model


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """F and R, where the tests are; M may be a name on the Hub."""
    monkeypatch.chdir(tmp_path)
    for name in "FR":
        (tmp_path / name).write_text('{"question": "q", "answer": "a"}\n')


def cells_of(values, overrides=(), **words):
    return make_cells(make_grid(values), "out", overrides, words)


def test_every_combination_is_a_run_with_every_seed(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "run: {unlearn: {epochs: 3, retain: gd}}\n"
        "axes:\n"
        "- {unlearn.recipe: [npo_kl, sga+mrd], unlearn.learning_rate: [1e-4, 0.001]}\n"
        "- {unlearn.forget: me, unlearn.retain: [[gd, kl], []], unlearn.batch_size: 2}\n"
        "seeds: [4, 7]\n"
    )
    grid = load_grid(str(file))
    assert grid.name == "mine"
    cells = make_cells(grid, tmp_path / "out")
    assert [cell.name for cell in cells[::2]] == [
        "npo_kl-learning_rate-1e-4", "npo_kl-learning_rate-0.001", "sga_mrd-learning_rate-1e-4",
        "sga_mrd-learning_rate-0.001", "retain-gd-kl", "retain-none",
    ]  # fmt: skip
    assert [cell.seed for cell in cells] == [4, 7] * 6
    first, mrd, me = cells[0].config, cells[5].config, cells[8].config
    assert (first.name, first.seed) == ("npo_kl-learning_rate-1e-4", 4)
    assert first.folder == tmp_path / "out/runs/npo_kl-learning_rate-1e-4/seed4"
    assert (first.unlearn.learning_rate, first.unlearn.epochs) == (1e-4, 3)
    assert [term.name for term in first.unlearn.retain] == ["kl"]  # the recipe's, in the place of what all have
    assert (mrd.unlearn.sampling.by, mrd.unlearn.batch_size, mrd.seed) == ("mrd", 1, 7)
    assert [term.name for term in me.unlearn.retain] == ["gd", "kl"]
    assert me.unlearn.batch_size == 2


def test_one_setting_alone_and_what_all_runs_are_told():
    (cell,) = cells_of({"name": "one", "axes": {"unlearn.epochs": 2}}, ["unlearn.batch_size=3"], model="M", forget="F")
    assert cell.name == "one"
    assert (cell.config.model.name_or_path, cell.config.data.forget.path) == ("M", "F")
    assert (cell.config.unlearn.epochs, cell.config.unlearn.batch_size) == (2, 3)
    same = {"axes": {"unlearn.epochs": [1, 2], "memorise.epochs": [3]}}
    assert [cell.name for cell in cells_of(same)] == [
        "unlearn.epochs-1-memorise.epochs-3", "unlearn.epochs-2-memorise.epochs-3",
    ]  # fmt: skip


def test_a_star_is_all_recipes_of_such_names_each_method_once():
    assert matching(["npo*"]) == ["npo", "npo_kl"]  # npo_gd has npo's terms
    assert matching(["npo_gd", "?ga", "*_ap+mrd"][::2]) == ["npo_gd", "dpo_ap+mrd", "idk_ap+mrd"]
    found = matching(["*"])
    assert all(any(read(name).unlearn == read(other).unlearn for other in found) for name in names())
    assert len(found) == len({str(read(name).unlearn) for name in names()})
    assert [cell.name for cell in cells_of({"axes": {"unlearn.recipe": "wga*"}})] == ["wga", "wga_gd", "wga_kl"]


@pytest.mark.parametrize("name", grids())
def test_the_grids_that_are_here_have_runs(name):
    grid = load_grid(f"grid:{name}")
    cells = make_cells(grid, "out", [], {"model": "M", "forget": "F", "retain": "R"} if name == "uwc" else {})
    assert grid.name == name
    assert grid.summary
    if name == "uwc":
        assert len(cells) == 10 + 10 + 10 + 30 + 30
        one = next(cell.config.unlearn for cell in cells if cell.name == "wtnpo_kl-alpha-1.5-beta-7.0")
        assert one.forget[0].options == {"alpha": 1.5, "beta": 7.0}
        assert [term.name for term in one.retain] == ["kl"]
        assert (one.epochs, one.batch_size * one.gradient_accumulation_steps, one.warmup) == (5, 16, "epoch")
        assert one.learning_rate is None  # by the model's size, unless it is told
        deep = next(cell.config.unlearn for cell in cells if cell.name == "rmu-layer-deep-c-0.05")
        assert (deep.forget[0].options, deep.retain[0].name) == ({"layer": "deep", "c": 0.05}, "kl")
    elif name == "tutorial":
        weights = {cell.name: cell.config.unlearn.retain[0].coefficient for cell in cells if "_kl" in cell.name}
        assert weights == {f"ga_kl-coefficient-{value}": value for value in (1.0, 10.0, 20.0)}
        assert len(cells) == 8 + 1 + 3
        (plain,) = (cell.config.unlearn for cell in cells if cell.name == "npo-retain-none")
        assert ([term.name for term in plain.forget], plain.retain) == (["npo"], [])
    else:
        assert name == "embedded"
        tricks = {f"{each}-{trick}" for each in ("ga_kl", "npo_kl") for trick in ("temperature-2", "keep-0.8")}  # UWC's
        more = {"npo-retain-none", "ga_kl-coefficient-10.0", "ga_kl-coefficient-20.0"}  # the tutorial's
        assert {cell.name for cell in cells} == {*matching(["*"]), *tricks, *more}
        assert {cell.seed for cell in cells} == {0, 1, 2}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("[1]", "grid: needs sections run, axes and seeds, got list"),
        ("{axis: {}}", "grid: axis: unknown key; did you mean axes"),
        ("{unlearn.epochs: [1]}", r"unlearn.epochs: unknown key; .* did you mean axes: \{unlearn.epochs: ...\}\?"),
        ("{axes: {}}", r"grid: axes: needs keys of settings with lists of values, or a list of these, got \{\}"),
        ("{axes: {unlearn.retain: []}}", r"axes: unlearn.retain: has no value; .* is \[\[\]\]"),
        ("{axes: {seed: [1]}}", "axes: seed: is told by seeds"),
        ("{axes: {'': [1]}}", "^grid: axes: '': needs a setting's key, e.g. unlearn.learning_rate"),
        ("{axes: {unlearn..epochs: [1]}}", r"axes: 'unlearn\.\.epochs': needs a setting's key"),
        ("{axes: {unlearn.epochs=3: [1]}}", "axes: 'unlearn.epochs=3': needs a setting's key"),
        ("{run: {seed_: 1, num_threads: 1}, axes: {num_threads.x: [1]}}",
         r"^x-1, seed 0: axes: num_threads\.x: num_threads is 1, not a section"),
        ("{run: {output: x}, axes: {unlearn.epochs: 1}}", "run.output: is told by --out"),
        ("{run: 3, axes: {unlearn.epochs: 1}}", "run: needs sections of a run's configuration, got 3"),
        ("{name: a/b, axes: {unlearn.epochs: 1}}", "name: needs letters, .* got 'a/b'"),
        ("{name: .., axes: {unlearn.epochs: 1}}", r"name: needs .*, but first, \. alone, got '\.\.'"),
        ("{axes: {unlearn.recipe: [ga, GA]}}", "axes: ga, seed 0 and ga, seed 0 are the same run"),
        ("{run: {geffect: {}}, axes: {unlearn.recipe: [ga, bss, altpo, whp, task_vector]}}",
         "(?s)^bss, seed 0: .*geffect: is measured on the rows of the data, and bss is of .*task_vector, seed 0: "),
        ("{seeds: 0, axes: {unlearn.epochs: 1}}", "seeds: needs how many, 1 at least, or a list .*, got 0"),
        ("{seeds: 20240101, axes: {unlearn.epochs: 1}}", r"seeds: .* 1000 at most, got 20240101; .* is \[20240101\]"),
        ("{seeds: [1, 1], axes: {unlearn.epochs: 1}}", r"seeds: needs .* without any twice, got \[1, 1\]"),
        ("{axes: {unlearn.recipe: [npo_kll, ga]}}", "^npo_kll, seed 0: unlearn.recipe='npo_kll': did you mean npo_kl"),
        ("{axes: {unlearn.recipe: x*}}", r"axes: unlearn.recipe: recipe='x\*': is like none of"),
        ("{seeds: 2, axes: {unlearn.lerning_rate: [1, 2]}}",
         r"^lerning_rate-1, seed 0 and 3 more: unlearn.lerning_rate: unknown key; did you mean learning_rate\?"),
        ("{axes: {unlearn.recipe: wga, unlearn.forget.options.beta: [1]}}", 
         "^wga-beta-1, seed 0: .*wga: option='beta': .*needs one of alpha"),
        ("{axes: {unlearn.epochs: [1, -1, -2]}}",
         "^epochs--1, seed 0: unlearn.epochs: needs a number above 0, got -1\nepochs--2, seed 0: .*got -2$"),
        ("{axes: {unlearn.epochs: [5, 5.0]}}", "axes: epochs-5, seed 0 and epochs-5.0, seed 0 are the same run"),
        ("{axes: [{unlearn.epochs: [5]}, {unlearn.epochs: [5]}]}", "are the same run; leave one out"),
        ("{axes: {unlearn.recipe: [npo+mrd, npo_mrd]}}", "npo_mrd, seed 0: unlearn.recipe='npo_mrd'"),
        ("{axes: {model.name_or_path: [a b, a_b]}}", "name_or_path-a_b, seed 0 have one name"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_run_and_near_names(values, message):
    with pytest.raises(ConfigError, match=message):
        cells_of(yaml.safe_load(values))


def test_files_words_and_overrides_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.yaml: no such file; needs a grid, .* or grid:NAME"):
        load_grid("nothing.yaml")
    with pytest.raises(ValueError, match="grid='uwcc': did you mean uwc"):
        load_grid("grid:uwcc")
    (tmp_path / "bad.yaml").write_text("axes: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not valid YAML"):
        load_grid(str(tmp_path / "bad.yaml"))
    axes = {"axes": {"unlearn.epochs": [1, 2]}}
    with pytest.raises(ConfigError, match=r"--set unlearn.epochs=3: unlearn.epochs is an axis of the grid"):
        cells_of(axes, ["unlearn.epochs=3"])
    for override, place in (("output=x", "--out"), ("seed = 7", "seeds"), ("name=x", "name, beside run")):
        with pytest.raises(ConfigError, match=rf"^--set {override}: is told by {place}, for all runs"):
            cells_of({"axes": {"unlearn.epochs": 1}}, [override])
    with pytest.raises(ValueError, match=r"(?s)by which model.*\n  pyunlearn sweep GRID --model MODEL --forget F "):
        cells_of(axes, forget="F")
    with pytest.raises(ValueError, match=r"--model=M and --set model.name_or_path=N: both are"):
        cells_of(axes, ["model.name_or_path=N"], model="M")


def test_a_long_name_is_cut_and_told_apart_from_others(tmp_path):
    layers = [[f"model.layers.{n}.self_attn.q_proj.weight" for n in range(most)] for most in (12, 13)]
    grid = {"run": {"model": {"options": {"num_hidden_layers": 13}}}, "axes": {"unlearn.train_only": layers}}
    cells = cells_of(grid)
    names = [cell.name for cell in cells]
    assert names[0][:150] == names[1][:150]
    assert names[0] != names[1]
    assert names == [cell.name for cell in cells_of(grid)]
    for name in names:
        (tmp_path / f"{name}-seed123456789.txt").touch()


MINE = {"model.name_or_path": "org/name", "data.forget": "F", "data.retain": "R"}


@pytest.mark.parametrize(
    ("axis", "values", "message"),
    [
        ("data.forget", ["F", "forgt.jsonl"], r"forgt\.jsonl, seed 0: data\.forget: no such file: forgt\.jsonl; "
         r"did you mean forget\.jsonl\?"),
        ("data.retain", ["R", "nowhere/R.csv"], r"R\.csv, seed 0: data\.retain: .*; the folder nowhere does not exist"),
        ("data.forget", ["F", "F.xlsx"], r"xlsx, seed 0: data\.forget: F\.xlsx: \.xlsx is not read: save its sheet"),
        ("data.forget.limit", [1, 0], r"limit-0, seed 0: data\.forget\.limit: needs 1 at least, got 0"),
        ("data.refusals", ["F", "forget.json"], r"json, seed 0: data\.refusals: .*; did you mean forget\.jsonl\?"),
        ("evaluate.sets.more", ["F", "./more"], r"more, seed 0: evaluate\.sets\.more: no such file: more"),
        ("evaluate.embedder", ["org/name", "./modle"], r"modle, seed 0: evaluate\.embedder: no such folder: .* model"),
        ("model.tokenizer", ["org/name", "./modle"], r"modle, seed 0: model\.tokenizer: no such folder: .* model\?"),
        ("model.name_or_path", ["org/name", "./modle"], r"modle, seed 0: model\.name_or_path: no such folder: "
         r"\./modle; did you mean model\?"),
        ("model.name_or_path", ["gpt2", "F"], r"F, seed 0: model\.name_or_path='F': is a file; needs a folder or a"),
        ("model.name_or_path", ["gpt2", "model"], r"model, seed 0: model\.name_or_path='model': no config\.json there"),
        ("model.gguf_file", ["m.gguf", "n.gguf"], r"n\.gguf, seed 0: model\.gguf_file: .*; did you mean m\.gguf\?"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_before_anything_runs(tmp_path, axis, values, message):
    (tmp_path / "F").rename(tmp_path / "forget.jsonl")
    (tmp_path / "F").symlink_to(tmp_path / "forget.jsonl")
    (tmp_path / "F.xlsx").touch()
    (tmp_path / "model").mkdir()
    if axis == "model.gguf_file":
        pytest.importorskip("gguf")
        write_gguf(tmp_path / "m.gguf")
    shared = {key: value for key, value in MINE.items() if not axis.startswith(key)}
    shared |= {"model.name_or_path": "embedded"} if axis == "model.gguf_file" else {}
    if axis == "data.forget.limit":
        shared["data.forget.path"] = "F"
    with pytest.raises(ConfigError, match=message) as told:
        cells_of({"axes": {axis: values}}, [f"{key}={value}" for key, value in shared.items()])
    assert len(str(told.value).splitlines()) == 1  # the other value is none of them


def write_gguf(path, **more):
    """A header alone: three layers, and more as the writer calls it."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(3)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize("more", [{"vocab_size": 40}, {"token_list": [f"t{n}" for n in range(40)]}])
def test_a_gguf_file_tells_its_layers_and_tokens(tmp_path, more):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", **more)
    words = {"gguf_file": "m.gguf", "forget": "F", "retain": "R"}
    layers = {"axes": {"unlearn.recipe": "rmu", "unlearn.forget.options.layer": [3, 99]}}
    with pytest.raises(ConfigError, match=r"^rmu-layer-99, seed 0: unlearn.forget: rmu: layer=99: m.gguf has 3 layers"):
        cells_of(layers, **words)
    tops = {"axes": {"unlearn.recipe": "bst", "unlearn.forget.options.k": [40, 41]}}
    with pytest.raises(ConfigError, match=r"^bst-k-41, seed 0: .* k=41: the vocabulary of m.gguf has 40 tokens$"):
        cells_of(tops, **words)
    (tmp_path / "n.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:60])
    with pytest.raises(ConfigError, match=r"model.gguf_file: .*n.gguf: is damaged or no GGUF file"):
        cells_of(layers, **words | {"gguf_file": "n.gguf"})


@pytest.mark.parametrize("name", ["embedded", "model"])
def test_parameters_that_the_model_does_not_have(tmp_path, name):
    write_model(tmp_path / "model", *load_model(texts=["some words"], options={"num_hidden_layers": 2}))
    axes = {"unlearn.train_only": [[r".*layers\.1\..*"], [r".*layers\.1\..*", "nothing"]]}
    grid = {"axes": {"model.lora": [None], **axes}}
    words = {"model": name, "forget": "F", "retain": "R"}
    with pytest.raises(ConfigError, match=r"nothing, seed 0: unlearn.train_only='nothing': matches no parameter"):
        cells_of(grid, **words)
    grid["axes"]["model.lora"] = {}
    assert len(cells_of(grid, **words)) == 2  # an adapter's names are known when it is there


def test_a_run_alone_says_the_same_and_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError) as told:
        cells_of({"name": "one", "axes": {"data.retain": "Q.jsonl"}}, model="org/name", forget="F")
    for error, overrides in (
        (FileNotFoundError, ["data.retain=Q.jsonl"]),
        (ValueError, ["unlearn.forget=rmu", "unlearn.forget.options.layer=4", "model.name_or_path=embedded"]),
    ):
        config = load_config(None, ["model.name_or_path=org/name", "data.forget=F", "data.retain=R", *overrides])
        with pytest.raises(error) as alone:
            run(config)
        assert not (tmp_path / "runs").exists()
        if error is FileNotFoundError:
            assert str(told.value) == f"one, seed 0: {alone.value}"
        else:
            assert "layer=4: embedded has 3 layers" in str(alone.value)
