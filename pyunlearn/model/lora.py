"""LoRA through peft: a fresh adapter on a model to be trained, and adapter folders read into the model they are for.

An adapter folder holds adapter_config.json, which names its base, and adapter_model.safetensors. Reading one merges it
into the base's weights: one plain model, which is scored, probed, evaluated and trained as any other.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from .._files import read_json
from .._hints import hint
from .._hub import check_hub, in_cache
from ..ops.parameters import canonical

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
ALL_LINEAR: Final = "all-linear"
FACTORS = re.compile(r"\.(lora_\w+|original_module)\.")  # what a merged model does not have


def check_peft(what: str) -> None:
    """Raises ImportError, which calls what needs it `what`, unless peft is installed."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"{what} needs the peft package: pip install 'pyunlearn[lora]'")


def add_adapter(
    model: Any,
    *,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ALL_LINEAR,
    seed: int = 0,
    base: str | None = None,
    **options: Any,
) -> Any:
    """`model`, changed in place, under peft with a LoRA adapter, which alone requires gradients.

    It adds alpha / r times two factors of rank r to each target, and nothing before it is trained: with the adapter off
    the model stays what it was. targets: modules by name or by the end of it, or all linear layers but the head. seed:
    of its weights; the global generators stay as they are. base: where the model is found again, for a saved adapter;
    None is the model's own name. options: of peft's LoraConfig. Half-precision models have adapters in float32.

    Raises ImportError without peft, ValueError for a target that the model does not have, one whose weight is another
    layer's too (merged, it would change both), or options that peft does not take.
    """
    check_peft("model.lora")
    import peft

    if targets != ALL_LINEAR:
        targets = [targets] if isinstance(targets, str) else list(targets)
        check_targets(model, targets)
    own: Any = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets}
    try:
        config = peft.LoraConfig(**own, task_type="CAUSAL_LM", **options)
        adapted = wrap(model, config, seed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.lora: peft does not take its settings: {' '.join(str(error).split())}") from None
    check_alone(adapted, "model.lora.targets")
    if base is not None:
        config.base_model_name_or_path = base
    return adapted


def wrap(model: Any, config: Any, seed: int = 0) -> Any:
    import peft

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft makes them on the CPU
        warnings.simplefilter("ignore", FutureWarning)  # of names that it still asks transformers for
        torch.random.default_generator.manual_seed(seed)
        return peft.get_peft_model(model, config)


@contextmanager
def tried(model: Any, **settings: Any) -> Iterator[Any]:
    """`add_adapter(model, **settings)` inside, to look at; `model` is as it was afterwards."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = add_adapter(model, **settings)
    try:
        yield adapted
    finally:
        adapted.unload()
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def merge(adapted: Any) -> Any:
    """The plain model inside, its adapters added to its weights in place; all of it requires gradients again.

    Raises ValueError as `add_adapter` for a weight that two layers have.
    """
    check_alone(adapted, "model")
    return adapted.merge_and_unload().requires_grad_(True)


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raises ValueError that names the nearest layers for a target that is none."""
    layers = [name for name, module in model.named_modules() if getattr(module, "weight", torch.empty(0)).dim() == 2]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = dict.fromkeys(name.rpartition(".")[2] for name in layers)
            raise ValueError(f"model.lora.targets={target!r}: {hint(target, [ALL_LINEAR, *ends])}")


def check_alone(adapted: nn.Module, what: str) -> None:
    """Raises ValueError, which begins with `what`, for an adapter on a weight that more than one layer has."""
    uses = Counter(id(weight) for module in adapted.modules() for weight in module._parameters.values())
    for name, module in adapted.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "lora_A") and uses[id(weight)] > 1:
            raise ValueError(
                f"{what}: the adapter is on {name.rpartition('.')[2]!r}, whose weight is another layer's too "
                "(tie_word_embeddings); needs targets with weights of their own"
            )


def does_nothing(model: nn.Module) -> bool:
    """Whether the model is under peft with LoRA adapters that alone are trained and have not been yet: with them off it
    is the model that it is."""
    named = dict(model.named_parameters())
    zeros = [weight for name, weight in named.items() if re.search(r"\.lora_(B|embedding_A)\.", name)]
    trained = [name for name, weight in named.items() if weight.requires_grad]
    others = [name for name in trained if not re.search(r"\.(lora_\w+|modules_to_save)\.", name)]
    return bool(zeros) and not others and not any(bool(weight.any()) for weight in zeros)


def count_parameters(model: Any) -> tuple[int, int]:
    """How many require gradients, and how many there are, an adapter's too; those packed into 4 bits count as two."""
    if hasattr(model, "get_nb_trainable_parameters"):
        return model.get_nb_trainable_parameters()
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def saving(model: Any) -> dict[str, Any]:
    """Options of `model.save_pretrained`: an adapter goes without its base's embeddings, which nothing has changed."""
    return {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}


def merged_names(model: nn.Module) -> list[str] | None:
    """The parameters that the merged model would have, by their names in `model`; None for one not under peft.

    Under plain LoRA, noise on W of W + BA is noise on the merged weight; on the factors it would be another on top.
    """
    if not hasattr(model, "peft_config"):
        return None
    names = [canonical(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    return [name for name in names if not FACTORS.search(name)]


# ---- folders ---------------------------------------------------------------------------------------------------------


def find_adapter(source: str) -> Path | None:
    """The folder of an adapter, for a folder or a Hub id that is one; None for any other, or what cannot be looked up.

    Raises FileNotFoundError for an adapter on the Hub that has no safetensors weights.
    """
    folder = Path(source)
    if folder.exists():
        return folder if (folder / CONFIG).is_file() else None
    if not is_cached(source, CONFIG):
        if in_cache(source, "weights") is not None:  # a model, whole
            return None
        check_hub(source)
    found = fetch(source, CONFIG)
    if found is not None and fetch(source, WEIGHTS) is None:
        raise FileNotFoundError(
            f"model.name_or_path={source!r}: is an adapter whose {WEIGHTS} is not to be had, and no other kind is "
            "loaded (pickle can run code)"
        )
    return None if found is None else Path(found).parent


def is_cached(source: str, name: str) -> bool:
    """Whether a file of the Hub is in its cache, without asking there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(source, name), str)
    except HFValidationError:  # no name that the Hub has
        return False


def fetch(source: str, name: str) -> str | None:
    """One file of the Hub, from the cache where it is there; None where it cannot be had."""
    from transformers.utils import cached_file

    kinds = ("gated_repo", "missing_entries", "connection_errors")
    quiet: dict[str, Any] = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    try:
        return cached_file(source, name, **quiet)
    except OSError:  # there is no such id; whoever loads from it tells that
        return None


def base_of(folder: Path) -> str:
    """The base that an adapter's configuration names. Raises ValueError for another kind than LoRA, or without one."""
    file = folder / CONFIG
    settings = read_json(file, "get the adapter's files again")
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise ValueError(f"{file}: has peft_type={kind!r}, needs 'LORA'; merge others where they were made")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file}: has base_model_name_or_path={base!r}, needs the folder or Hub id of its base")
    # A folder with both in it may have been moved, and another may lie where it was.
    beside = (parent / Path(base).name for parent in folder.resolve().parents[:2])
    return next((str(path) for path in beside if Path(base).is_absolute() and path.is_dir()), base)


def read_adapter(model: Any, folder: Path) -> Any:
    """The base `model`, changed in place, under peft with the adapter of the folder.

    Raises ImportError without peft, ValueError for an adapter that does not fit, or lacks weights or has others.
    """
    check_peft(f"model.name_or_path={str(folder)!r}, an adapter,")
    import peft

    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        adapted = wrap(model, config)
        found = adapted.load_adapter(str(folder), "default", torch_device="cpu")
    except (RuntimeError, ValueError, TypeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{folder}: the adapter does not fit its base {base_of(folder)!r} ({told})") from None
    for wrong, names in (("lacks", found.missing_keys), ("has, and the base no place for,", found.unexpected_keys)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{folder / WEIGHTS}: {wrong} {sorted(names)[0]}{more}; get the adapter's files again")
    return adapted.eval()
