"""The search for the demo's recipe at a tiny size, and what it calls clean."""

from __future__ import annotations

import pytest

from benchmarks.results import RESULTS
from benchmarks.studies import demo
from pyunlearn.runs import load_config
from pyunlearn.training.method import UnlearnConfig

TINY = {
    "model.options": "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, vocab_size: 384}",
    "data": "{num_authors: 4, questions_per_author: 2, forget_fraction: 0.25, num_unknown: 8}",
    "memorise": "{epochs: 1, batch_size: 4}",
}


def test_a_line_a_recipe_and_nothing_twice(tmp_path, monkeypatch, capsys):
    words = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    words += ["idk + dpo + gd", "--seeds", "2", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    demo.main(words)
    page = (tmp_path / "demo_search.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [["| before", "2"], ["| idk + dpo + gd", "2"]]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert all(question.endswith("?") for question in lines[4].strip("| ").split(" | ")[1:])
    assert [line.split(" | ")[0] for line in lines[6:]] == ["| before", "| idk + dpo + gd"]
    monkeypatch.setattr(demo, "unlearned", lambda *_: pytest.fail("all is there"))
    demo.main(words)
    assert (tmp_path / "demo_search.md").read_text() == page
    with pytest.raises(SystemExit):
        demo.main(["wga+kl"])
    assert "recipe='wga+kl': did you mean wga + kl or" in capsys.readouterr().err


def test_the_demo_has_a_recipe_that_was_clean_on_every_seed():
    (name,) = (name for name, one in demo.RECIPES.items() if UnlearnConfig.model_validate(one) == load_config().unlearn)
    (file,) = RESULTS.rglob("demo_search.md")
    assert f"| {name} | 3 | 3 of 3 |" in file.read_text()


def test_clean_is_all_three():
    good = {"forget probability": 0.05, "held kept": 0.95, "forget fluent": 1.0}
    assert demo.clean(good)
    for key, value in (("forget probability", 0.1), ("held kept", 0.89), ("forget fluent", 0.9)):
        assert not demo.clean({**good, key: value})
