import json
import os
from pathlib import Path

import pytest

from pyunlearn.data import World, generate_authors
from pyunlearn.data.tiny import train_tokenizer

TOFU_FILES = (
    "forget01",
    "forget10_perturbed",
    "retain90",
    "retain_perturbed",
    "real_authors",
    "real_authors_perturbed",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def world() -> World:
    return generate_authors(8, 12, seed=1, forget_fraction=0.25)


@pytest.fixture
def tokenizer(world):
    return train_tokenizer(world.texts, vocab_size=600)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tofu(tmp_path_factory, world) -> Path:
    """The TOFU files where they are; else files of their names and shape."""
    folder = Path(os.environ.get("PYUNLEARN_TOFU", Path(__file__).parents[3] / "shared/data/tofu"))
    if folder.is_dir():
        return folder
    folder = tmp_path_factory.mktemp("tofu")
    for name in TOFU_FILES:
        rows = [item.to_json() for item in (world.forget if name.startswith("forget") else world.retain)]
        if not name.endswith("_perturbed"):
            rows = [{"question": row["question"], "answer": row["answer"]} for row in rows]
        if name == "real_authors":
            rows = [{**row, **{f"option{i}": str(i) for i in range(1, 5)}} for row in rows]
        if name == "real_authors_perturbed":
            rows = [
                {
                    key: value[:3] if key == "perturbed_answer" else value
                    for key, value in row.items()
                    if "para" not in key
                }
                for row in rows
            ]
        # no newline at the end, and slashes escaped, as in the published files
        text = "\n".join(json.dumps(row).replace("/", r"\/") for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "idontknow.txt").write_text("\n".join(world.refusals), encoding="utf-8")
    return folder
