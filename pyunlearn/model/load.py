"""Loading the model a run starts from: embedded, a folder, a Hub id or a GGUF file. No remote code, no pickle."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from .._files import read_json
from .._hints import path_hint
from .._hub import here_or_asked, not_there
from ..data import padding_id
from .causal_lm import CausalLM, check_causal
from .combined import FILE, PARTS, find_combined, make_combined, strength_of
from .lora import WEIGHTS, base_of, find_adapter, merge, read_adapter
from .quantize import check_quantize, quantize_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED: Final = "embedded"
logger = logging.getLogger(__name__)


def load_model(
    name_or_path: str = EMBEDDED,
    *,
    gguf_file: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "float32",
    options: Mapping[str, Any] | None = None,
    texts: Sequence[str] = (),
    seed: int = 0,
    quantize: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model (evaluation mode, on the CPU) and its tokenizer.

    name_or_path: a folder, a Hub id, or "embedded" for the tiny Llama built here; of a LoRA adapter too, which is
    merged into the base that it names; a folder of two models whose logits are combined (`model.combined`).
    quantize: "nf4" or "int8", on bitsandbytes' own device, of a model that is not built here; adapters stay on top of
    it then. gguf_file: a path, or a name inside name_or_path. tokenizer: folder or Hub id, where it is not the model's.
    dtype: "float32", "bfloat16" or "float16".
    options: sizes of the embedded model. texts: what its tokenizer is trained on. seed: of its weights.

    Weights that the files have and the model has not are told in the log.
    Raises FileNotFoundError for a missing folder, file or Hub id (also when the Hub cannot be reached), ImportError
    where a GGUF file needs the `gguf` package, an adapter peft or `quantize` bitsandbytes, ValueError for weights that
    are not safetensors, are missing or of another shape, and for a tokenizer that makes ids the model has no embedding
    for.
    """
    model: Any
    its_tokenizer: Any
    if quantize is not None:
        check_quantize(quantize)
    if name_or_path == EMBEDDED and gguf_file is None:
        model, its_tokenizer = build_embedded(tokenizer, options or {}, texts, seed)
        model.to(getattr(torch, dtype))
    else:
        model, its_tokenizer = load_pretrained(name_or_path, gguf_file, tokenizer, dtype, quantize)
    if its_tokenizer.pad_token_id is None:
        its_tokenizer.pad_token = its_tokenizer.convert_ids_to_tokens(padding_id(its_tokenizer))
    CausalLM.of(model).check_tokenizer(its_tokenizer)
    return model.eval(), its_tokenizer


def with_random_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Another model of this one's configuration, dtype and device, as it is before any training (evaluation mode).

    The global generators stay as they are.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.random.default_generator.manual_seed(seed)
        other: Any = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=model.dtype)
    return other.to(model.device).eval()


def build_embedded(
    tokenizer: str | None, options: Mapping[str, Any], texts: Sequence[str], seed: int
) -> tuple[Any, Any]:
    from ..data.tiny import tiny_llama, train_tokenizer

    if not texts:
        raise ValueError(f"model.name_or_path={EMBEDDED} trains its tokenizer on the run's data; name a model instead")
    sizes = dict(options)
    vocabulary = sizes.pop("vocab_size", 2048)
    if tokenizer is not None:
        made: Any = load_tokenizer(tokenizer)
    else:
        made = train_tokenizer(texts, vocab_size=vocabulary, max_length=sizes.get("max_position_embeddings", 256))
    return tiny_llama(made, seed=seed, **sizes), made


def load_pretrained(
    name_or_path: str, gguf_file: str | None, tokenizer: str | None, dtype: str, quantize: str | None = None
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    source, gguf = locate(name_or_path, gguf_file)
    if gguf is None and (adapter := find_adapter(source)) is not None:
        return load_adapted(adapter, tokenizer, dtype, quantize)
    if gguf is None and (combined := find_combined(source)) is not None:
        return load_combined(combined, tokenizer, dtype, quantize)
    options = {} if gguf is None else gguf_options(gguf)
    if gguf is None:
        check_kind(source)
    options |= {} if quantize is None else quantize_options(quantize, dtype)
    its_tokenizer = load_tokenizer(tokenizer) if tokenizer else load_tokenizer(source, gguf)
    model = load_weights(AutoModelForCausalLM, source, dtype, **options)
    quantizer = getattr(model, "hf_quantizer", None)
    if gguf is not None and quantizer is not None:
        quantizer.remove_quantization_config(model)  # its weights are dense now, so it can be trained and saved
    return model, its_tokenizer


def load_adapted(folder: Path, tokenizer: str | None, dtype: str, quantize: str | None) -> tuple[Any, Any]:
    """The base that an adapter names, with it merged in, or on top of a quantised one; the adapter's own tokenizer,
    where its folder has one.

    Raises FileNotFoundError that names adapter and base if the base is not to be had.
    """
    base = base_of(folder)
    own = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    try:
        model, its_tokenizer = load_pretrained(base, None, tokenizer or own, dtype, quantize)
    except FileNotFoundError as error:
        raise baseless(folder, base, error) from None
    adapted = read_adapter(model, folder)
    return adapted if quantize is not None else merge(adapted), its_tokenizer


def baseless(folder: str | Path, base: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(f"{folder}: is an adapter on {base!r}, which is not to be had: {error}")


def load_combined(folder: Path, tokenizer: str | None, dtype: str, quantize: str | None) -> tuple[Any, Any]:
    """The two models of the folder as one (`model.combined`). Raises ValueError for a part that is missing."""
    strength = strength_of(folder)
    for name in PARTS:
        if not (folder / name / "config.json").is_file():
            raise ValueError(f"{folder}: is a combined model ({FILE}) without {name}/; get the model's files again")
    base, reinforced = (load_pretrained(str(folder / name), None, str(folder), dtype, quantize)[0] for name in PARTS)
    return make_combined(base, reinforced, strength), load_tokenizer(tokenizer or str(folder))


def check_kind(source: str) -> None:
    """Raises TypeError, from its config.json alone, for a model that is no causal LM of text."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    folder = here_or_asked(source, "weights")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except OSError as error:
        raise missing(source, error) from None
    check_causal(config, f"model {source!r}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise TypeError(
            f"model {source!r}: transformers has no causal LM of the kind {config.model_type}; needs a model that "
            "writes text, such as a Llama"
        )


def load_encoder(kind: Any, name_or_path: str, what: str, spared: str | None = None) -> tuple[Any, Any]:
    """A model that writes nothing, of a kind (an Auto class of transformers), and its tokenizer: float32, on the CPU.

    what: the argument that errors name. spared: weights with this in their name may be absent, as no one asks for them.
    Raises as `load_model`.
    """
    source, _ = locate(name_or_path, None, what)
    return load_weights(kind, source, "float32", spared).eval(), load_tokenizer(source)


def load_weights(kind: Any, source: str, dtype: str, spared: str | None = None, **options: Any) -> Any:
    folder = here_or_asked(source, options.get("gguf_file", "weights"))
    try:
        if "gguf_file" not in options:
            check_index(folder)
            options["use_safetensors"] = True
        model, info = kind.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            **options,
        )
    except OSError as error:
        raise missing(source, error) from None
    if spared is not None:
        info["missing_keys"] = [name for name in info["missing_keys"] if spared not in name]
    check_weights(source, info)
    model.name_or_path = model.config.name_or_path = source  # not the cache's folder
    return model


def check_index(source: str) -> None:
    """Raises ValueError if the index of a sharded checkpoint names anything but safetensors files beside it."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return
    named = read_json(index, "get the model's files again")
    named = named.get("weight_map") if isinstance(named, dict) else None
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{index}: needs a 'weight_map' from weights to files; get the model's files again")
    for name in named.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or {"/", "\\"} & {*name}:
            raise ValueError(f"{index}: names the file {name!r}, needs .safetensors files in the same folder")


def check_weights(source: str, info: Mapping[str, Any]) -> None:
    """Raises ValueError that names weights which the files lack or have in another shape; logs those left over."""
    if absent := sorted(info["missing_keys"]):
        raise ValueError(
            f"model {source!r}: its files lack {some(absent)}, which would be random; needs all its weights"
        )
    if others := sorted(info["mismatched_keys"]):
        name, shape, needed = others[0]
        raise ValueError(
            f"model {source!r}: {name} has shape {tuple(shape)} in its files, config.json needs {tuple(needed)}"
            + (f", and {len(others) - 1} more differ" if len(others) > 1 else "")
        )
    if unused := sorted(info["unexpected_keys"]):
        logger.warning(
            "model %r: its files have %s, for which the model has no place; not loaded", source, some(unused)
        )


def some(names: Sequence[str]) -> str:
    """The first of them, and how many more.

    >>> some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def gguf_options(gguf: str) -> dict[str, Any]:
    """Dense weights, whatever the file's: older transformers unpack always, newer ones when told."""
    import transformers

    packed = getattr(transformers, "GgufConfig", None)
    return {"gguf_file": gguf} | ({} if packed is None else {"quantization_config": packed(dequantize=True)})


def load_tokenizer(source: str, gguf: str | None = None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    folder = here_or_asked(source, gguf or "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **({} if gguf is None else {"gguf_file": gguf})
        )
    except OSError as error:
        raise missing(source, error) from None


def locate(source: str, gguf: str | None, what: str = "model.name_or_path") -> tuple[str, str | None]:
    """(folder or Hub id, name of the GGUF file in it or None), checked as far as can be without the network.

    what: the argument that errors name.
    """
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
        adapter, combined = find_adapter(source) is not None, find_combined(source) is not None
        if not adapter and not combined and not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{what}={source!r}: no config.json there; for a GGUF file in it set model.gguf_file"
            )
        if not combined and not any(folder.glob(WEIGHTS if adapter else "*.safetensors")):
            raise ValueError(
                f"{what}={source!r}: the folder has no .safetensors weights; no other kind is loaded "
                "(pickle can run code): convert them where you trust them, by from_pretrained(...).save_pretrained(...)"
            )
    else:
        check_name(source, what)
    return source, gguf


def check_name(source: str, what: str) -> None:
    """Raises for what is neither a folder here nor can be a Hub id; what: the argument that errors name."""
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{what}={source!r}: is a file; needs a folder or a Hub id (GGUF: model.gguf_file)")
    if not folder.is_dir() and is_path(source):
        raise FileNotFoundError(f"{what}: no such folder: {source}{path_hint(folder)}")


def is_path(source: str) -> bool:
    """Whether a name can be no Hub id, or is below a folder that is here."""
    parts = Path(source).parts
    return source.count("/") > 1 or source.startswith((".", "/", "~")) or (len(parts) > 1 and Path(parts[0]).is_dir())


def missing(source: str, error: OSError) -> FileNotFoundError:
    """The one error for what from_pretrained could not find or fetch."""
    return not_there(source, str(error).strip().splitlines()[0])
