"""A callback that goes on where a checkpoint left it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState


class Remembering(TrainerCallback, ExportableState):
    """memory: a dataclass of plain values, all that a resumed run needs; it is in the trainer_state.json of every
    checkpoint, under the callback's name. absent: what is told of a checkpoint without it."""

    absent: ClassVar[str]
    memory: Any

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": asdict(self.memory)}

    def remembers(self, state: TrainerState) -> bool:
        """Takes the memory from the checkpoint that a training goes on from; False where one begins.

        Raises ValueError for a checkpoint without it.
        """
        if state.global_step == 0:
            return False
        stored: Any = state.stateful_callbacks or {}
        kept = stored.get(type(self).__name__)
        if kept is None:
            raise ValueError(self.absent)
        self.memory = type(self.memory)(**kept["attributes"])
        return True
