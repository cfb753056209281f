"""The pretrained example, cut short: SmolLM2-135M from a GGUF file forgets eight questions of TOFU. Two minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyunlearn.model.load import load_model
from pyunlearn.runs import load_config
from pyunlearn.runs.run import run
from pyunlearn.training.callbacks import read_metrics

from .conftest import SMOLLM2, TOFU

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "smollm2_tofu.yaml"
SHORT = {
    "data.forget": f"{{path: {TOFU / 'forget01.jsonl'}, limit: 8}}",
    "data.retain": f"{{path: {TOFU / 'retain99.jsonl'}, limit: 8}}",
    "memorise.max_steps": 4,
    "memorise.gradient_accumulation_steps": 1,
    "unlearn.max_steps": 4,
    "unlearn.gradient_accumulation_steps": 1,
    "unlearn.learning_rate": 5e-5,
    "evaluate.metrics": "[probability, memorization_accuracy]",
    "evaluate.goal": "null",
}


def test_a_pretrained_model_from_gguf_forgets(tmp_path):
    gguf = Path(SMOLLM2)
    settings = {
        **SHORT,
        "model.name_or_path": gguf.parent,
        "model.gguf_file": gguf.name,
        "output": tmp_path / "run",
    }
    config = load_config(EXAMPLE, [f"{key}={value}" for key, value in settings.items()])
    result = run(config)

    rows = {(row["set"], row["metric"]): row for row in result.table}
    forget, retain = rows["forget", "probability"], rows["retain", "probability"]
    assert forget["before"] > 0.15  # the instruct model speaks English; four steps taught it some of the answers
    assert forget["after"] < 0.9 * forget["before"]
    assert retain["after"] / retain["before"] > forget["after"] / forget["before"]

    steps = read_metrics(result.folder / "metrics.jsonl")
    learned = [row["loss"] for row in steps if row["stage"] == "memorise"]
    assert learned[-1] < learned[0]
    first = next(row for row in steps if row["stage"] == "unlearn")
    assert first["retain.kl/loss"] == pytest.approx(0.0, abs=1e-4)

    model, tokenizer = load_model(str(result.folder / "checkpoint"))
    assert model.num_parameters() == 134_515_008
    assert tokenizer.chat_template
