"""What is run on several processes: a file a room, a function a case, `case(folder)` -> what each process saves."""

from collections.abc import Callable
from typing import TypeVar

Case = TypeVar("Case", bound=Callable)


def joins_itself(case: Case) -> Case:
    """What the case calls starts torch.distributed; for others it has been started when they begin."""
    case.joins_itself = True  # type: ignore[attr-defined]
    return case
