"""Loading the model a run starts from: embedded, a folder, a Hub id or a GGUF file. No remote code, no pickle."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from .._hints import path_hint
from ..data import check_vocabulary, padding_id
from ..runs.config import EMBEDDED, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    config: ModelConfig, *, texts: Sequence[str] = (), seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model (evaluation mode, on the CPU) and its tokenizer.

    texts: what the embedded model's tokenizer is trained on; unused otherwise. seed: of the embedded model's weights.

    Raises FileNotFoundError for a missing folder, file or Hub id (also when the Hub cannot be reached), ImportError
    where a GGUF file needs the `gguf` package, ValueError for weights that are not safetensors and for a tokenizer that
    makes ids the model has no embedding for.
    """
    if config.embedded:
        model, tokenizer = build_embedded(config, texts, seed)
    else:
        model, tokenizer = load_pretrained(config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_id(tokenizer))
    check_vocabulary(model, tokenizer)
    return model.eval(), tokenizer


def process_state() -> PartialState:
    """This process among those of torchrun (if any) and its device; without an accelerator they speak by gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def build_embedded(config: ModelConfig, texts: Sequence[str], seed: int) -> tuple[Any, Any]:
    from ..data.tiny import tiny_llama, train_tokenizer

    if not texts:
        raise ValueError(f"model.name_or_path={EMBEDDED} trains its tokenizer on the run's data; name a model instead")
    options = dict(config.options)
    vocabulary = options.pop("vocab_size", 2048)
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        length = options.get("max_position_embeddings", 256)
        tokenizer = train_tokenizer(texts, vocab_size=vocabulary, max_length=length)
    return tiny_llama(tokenizer, seed=seed, **options).to(getattr(torch, config.dtype)), tokenizer


def load_pretrained(config: ModelConfig) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    source, gguf = locate(config)
    known: dict[str, Any] = {"use_safetensors": True} if gguf is None else gguf_options(gguf)
    try:
        tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else load_tokenizer(source, gguf)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, config.dtype), trust_remote_code=False, **known
        )
    except OSError as error:
        raise missing(source, error) from error
    quantizer = getattr(model, "hf_quantizer", None)
    if gguf is not None and quantizer is not None:
        quantizer.remove_quantization_config(model)  # its weights are dense now, so it can be trained and saved
    return model, tokenizer


def gguf_options(gguf: str) -> dict[str, Any]:
    """Dense weights, whatever the file's: older transformers unpack always, newer ones when told."""
    import transformers

    packed = getattr(transformers, "GgufConfig", None)
    return {"gguf_file": gguf} | ({} if packed is None else {"quantization_config": packed(dequantize=True)})


def load_tokenizer(source: str, gguf: str | None = None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, **({} if gguf is None else {"gguf_file": gguf})
        )
    except OSError as error:
        raise missing(source, error) from error


def locate(config: ModelConfig) -> tuple[str, str | None]:
    """(folder or Hub id, name of the GGUF file in it or None), checked as far as can be without the network."""
    source, gguf = config.name_or_path, config.gguf_file
    if gguf is not None:
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(f"model.gguf_file={gguf!r} needs the gguf package: pip install 'pyunlearn[gguf]'")
        path = Path(gguf) if source == EMBEDDED else Path(source) / gguf
        if path.is_file():
            return str(path.parent), path.name
        if source == EMBEDDED or Path(source).is_dir():
            raise FileNotFoundError(f"model.gguf_file: no such file: {path}{path_hint(path)}")
    folder = Path(source)
    if gguf is None and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"model.name_or_path={source!r}: no config.json there; for a GGUF file in it set model.gguf_file"
            )
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"model.name_or_path={source!r}: the folder has no .safetensors weights; no other kind is loaded"
            )
    elif folder.is_file():
        raise ValueError(
            f"model.name_or_path={source!r}: is a file; needs a folder or a Hub id (GGUF: model.gguf_file)"
        )
    elif source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model.name_or_path: no such folder: {source}{path_hint(folder)}")
    return source, gguf


def missing(source: str, error: OSError) -> FileNotFoundError:
    """The one error for what from_pretrained could not find or fetch."""
    reason = str(error).strip().splitlines()[0]
    return FileNotFoundError(
        f"model or tokenizer {source!r}: not a folder here and not available from the Hub ({reason}); "
        "check the name and the connection (HF_HUB_OFFLINE unset), or give the path of a downloaded folder"
    )
