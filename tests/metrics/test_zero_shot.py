"""lm-eval on a model of ours, against the likelihoods that its own reading gives; where lm-eval is installed."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics.zero_shot import zero_shot

ROWS = [
    {"q": "Where was Ada born?", "choices": ["By the sea.", "In a town.", "On a hill."], "gold": 0},
    {"q": "Is Di a poet?", "choices": ["No, not at all.", "Yes.", "Perhaps."], "gold": 1},
    {"q": "Who taught Cy?", "choices": ["No one.", "Ada did, for years.", "Bo."], "gold": 1},
    {"q": "What does Bo write?", "choices": ["Long novels.", "Songs.", "Short plays."], "gold": 2},
]
TASK = """
task: own_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"{row['q']} {choice}" for row in ROWS for choice in row["choices"]], vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=64)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    return model


def nll(model, tokenizer, question, choice):
    prompt = tokenizer(question)["input_ids"]
    if prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    ids = prompt + tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logp[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))


def test_accuracy_is_that_of_the_likeliest_choice(model, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'pyunlearn[eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(TASK.format(data=data))
    model.train()
    result = zero_shot(model, tokenizer, ["own_choices"], folder=tmp_path / "tasks", batch_size=3)
    assert model.training
    model.eval()
    losses = [[nll(model, tokenizer, row["q"], choice) for choice in row["choices"]] for row in ROWS]
    right = [own.index(min(own)) == row["gold"] for own, row in zip(losses, ROWS, strict=True)]
    assert result["own_choices"]["acc"] == sum(right) / len(ROWS)
    assert 0 < sum(right) < len(ROWS)  # else the test could not fail
    with pytest.raises(ValueError, match=r"task='own_choises': did you mean own_choices "):
        zero_shot(model, tokenizer, ["own_choises"], folder=tmp_path / "tasks")


def test_what_is_missing_is_told(model, tokenizer):
    with pytest.raises(ValueError, match="tasks='boolq': needs one or more names"):
        zero_shot(model, tokenizer, "boolq")
    if importlib.util.find_spec("lm_eval") is None:
        with pytest.raises(ImportError, match=r"zero_shot needs lm-eval .*pip install 'pyunlearn\[eval\]'"):
            zero_shot(model, tokenizer, ["boolq"])
