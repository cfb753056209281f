"""The Hub is asked once, for two seconds, before a library that would ask it again and again; the cache before it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from threading import Thread

from ._files import read_json
from ._hints import path_hint

SECONDS = 2.0  # that an answer may take; HF_HUB_ETAG_TIMEOUT says otherwise
INDEX = "model.safetensors.index.json"
TOKENIZER = re.compile(r"tokenizer\.(json|model)|vocab\.(json|txt)|.*\.model")  # any of them, beside its configuration


def here_or_asked(source: str, part: str) -> str:
    """The folder to load a part of a model from: `source`, or, where the cache has all of it, that of a Hub id.

    part: "weights", "tokenizer", or the name of a file. Returns a Hub id as it came where the Hub has it, or is not to
    be asked (HF_HUB_OFFLINE). Raises as `check_hub` for what is neither here nor there.
    """
    if Path(source).is_dir():
        return source
    if (folder := in_cache(source, part)) is not None:
        return str(folder)
    check_hub(source)
    return source


def in_cache(source: str, part: str) -> Path | None:
    """Where a part of a model on the Hub has been downloaded to, all of it; else None."""
    from huggingface_hub import try_to_load_from_cache

    first = {"weights": "config.json", "tokenizer": "tokenizer_config.json"}.get(part, part)
    try:
        found = try_to_load_from_cache(source, first)
        if found is not None and not isinstance(found, str):  # known not to be on the Hub
            found = try_to_load_from_cache(source, "config.json")
    except ValueError:  # no id of the Hub
        return None
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    if part == "weights":
        index = folder / INDEX
        named = read_json(index, "get the model's files again")["weight_map"].values() if index.is_file() else ()
        complete = all((folder / name).is_file() for name in named or ("model.safetensors",))
    else:
        complete = part != "tokenizer" or any(TOKENIZER.fullmatch(file.name) for file in folder.iterdir())
    return folder if complete else None


def check_hub(source: str, kind: str = "model") -> None:
    """Raises FileNotFoundError, within SECONDS, unless the Hub has a repository of this name and shows it.

    kind: "model" or "dataset". Nothing is asked where HF_HUB_OFFLINE is set, or for a data set that is in the cache.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    if is_offline_mode() or (kind == "dataset" and (prepared / source.replace("/", "___")).is_dir()):
        return
    host, seconds = constants.ENDPOINT, float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or SECONDS)
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(source, "README.md", repo_type=kind), timeout=seconds)
            answers.append(None)
        except Exception as error:  # told by the caller's thread
            answers.append(error)

    asking = Thread(target=ask, daemon=True)  # a name server may take longer than any timeout of a connection
    asking.start()
    asking.join(seconds + 0.5)
    answer = answers[0] if answers else TimeoutError()
    if answer is None or isinstance(answer, EntryNotFoundError):
        return
    if isinstance(answer, GatedRepoError):
        reason = f"{host} shows it to those who were granted access; log in by `hf auth login`"
    elif isinstance(answer, RepositoryNotFoundError):
        reason = f"{host} shows you none of this name"
    elif isinstance(answer, ValueError):
        reason = "the Hub has no such names"
    elif "Timeout" in type(answer).__name__:
        reason = f"{host} gives no answer within {seconds:g} s; HF_HUB_ETAG_TIMEOUT=10 waits longer"
    else:
        reason = f"{host} cannot be reached: {type(answer).__name__}"
    raise not_there(source, reason, kind)


def not_there(source: str, reason: str, kind: str = "model") -> FileNotFoundError:
    """The one error for what is neither here nor to be had."""
    what, path = "data set" if kind == "dataset" else "model or tokenizer", Path(source)
    return FileNotFoundError(
        f"{what} {source!r}: not a folder here and not available from the Hub ({reason}); check the name and "
        "the connection (HF_HUB_OFFLINE unset), or give the path of a downloaded folder"
        + (path_hint(path) if path.parent.is_dir() else "")
    )
