"""What a job reads, told by its content: so that nothing computed from other data or another model is mixed in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .._files import digest_file
from ..data import QA
from ..model.combined import FILE as COMBINED
from ..model.combined import PARTS
from ..model.load import EMBEDDED
from ..store import digest_json
from ..training.generic import read_anchors
from ..training.rows import UnlearnData
from .config import RunConfig
from .data import RunData
from .sections import ModelConfig

TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
MODEL = ("*.safetensors", "config.json", "adapter_config.json", COMBINED, *TOKENIZER)
MODEL_FILES = MODEL + tuple(f"{part}/{name}" for part in PARTS for name in ("*.safetensors", "config.json"))


def fingerprints(config: RunConfig, data: RunData) -> dict[str, str]:
    """BLAKE2b (32 hex digits) of what a run reads, by the key of its configuration."""
    more = {"data.holdout": data.holdout, "data.unknown": data.unknown}
    more |= {f"evaluate.sets.{name}": items for name, items in data.sets.items()}
    digests = {key: digest_pairs(items) for key, items in more.items()}
    made = config.unlearn.reinforce
    if made is not None and made.anchors is not None:
        digests["unlearn.reinforce.anchors"] = digest_json(read_anchors(made.anchors))
    return {**data_fingerprints(data), **digests, **model_fingerprints(config.model)}


def data_fingerprints(data: UnlearnData) -> dict[str, str]:
    """Of the pairs and refusals to unlearn with, as read: where they lie, and what else is in their files, does not
    count."""
    return {
        "data.forget": digest_pairs(data.forget),
        "data.retain": digest_pairs(data.retain),
        "data.refusals": digest_json(data.refusals),
    }


def digest_pairs(items: Sequence[QA]) -> str:
    return digest_json([item.to_json() for item in items])


def model_fingerprints(source: ModelConfig) -> dict[str, str]:
    """Of a model's and its tokenizer's files; the name of what is none here (embedded, or on the Hub)."""
    name, gguf = source.name_or_path, source.gguf_file
    folder = Path(name)
    files = matching(folder, MODEL_FILES) if gguf is None else [Path(gguf) if name == EMBEDDED else folder / gguf]
    fingerprints = {"model": digest_files(files, folder) or f"{name} {gguf}"}
    if (base := source.adapters_base) is not None:
        fingerprints |= {"model's base": model_fingerprints(ModelConfig(name_or_path=base))["model"]}
    if source.tokenizer is not None:
        folder = Path(source.tokenizer)
        fingerprints["model.tokenizer"] = digest_files(matching(folder, TOKENIZER), folder) or source.tokenizer
    return fingerprints


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def digest_files(files: Iterable[Path], folder: Path) -> str | None:
    """Over names, in the folder, and content of those that are there; None where there is none."""
    names = {file: file.relative_to(folder).as_posix() if folder in file.parents else file.name for file in files}
    digests = {name: digest_file(file) for file, name in names.items() if file.is_file()}
    return digest_json(digests) if digests else None
