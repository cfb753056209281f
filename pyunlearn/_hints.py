"""The near names that an error tells for a word it does not know."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def near(word: Any, known: Iterable[Any]) -> list[str]:
    """The names in `known` that are like `word`, the nearest first, three at most; case does not matter.

    >>> near("tnpp", ["ga", "npo", "tnpo"])
    ['tnpo', 'npo']
    """
    names = {str(name).lower(): str(name) for name in known}
    return [names[name] for name in difflib.get_close_matches(str(word).lower(), names, n=3, cutoff=0.5)]


def hint(word: Any, known: Iterable[Any]) -> str:
    """What to tell after the word: near names where there are some, else all of them.

    >>> hint("tnpo", ["ga", "npo"])
    'did you mean npo? needs one of ga, npo'
    """
    known = [str(name) for name in known]
    if not known:
        return "there is none to choose from"
    close = near(word, known)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{meant}needs one of {', '.join(known)}"


def check_known(what: str, word: Any, known: Iterable[Any]) -> None:
    """Raises ValueError, `preset='papr': did you mean paper? needs one of paper, standard`, unless `known` has it."""
    known = list(known)
    if word not in known:
        raise ValueError(f"{what}={word!r}: {hint(word, known)}")


def path_hint(path: Path) -> str:
    """What to tell after a path where nothing is: names like it in its folder, or that there is no such folder."""
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist"
    close = near(path.name, (child.name for child in path.parent.iterdir()))
    return f"; did you mean {' or '.join(close)}?" if close else ""
