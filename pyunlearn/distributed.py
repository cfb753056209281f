"""Processes and shards: who computes what under torchrun, and tensors of which a rank holds a part."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


class Processes:
    """The processes of torch.distributed (one, where it is not initialised), and which of the work is this one's.

    device: of this process. count, rank: of those that share work out. first: whether this is rank 0 of all. writes:
    whether this process keeps what it has computed.
    """

    def __init__(self, device: torch.device, together: bool = False):
        """together: the model is sharded, so that every process has to take part in every forward."""
        self.started = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.device = device
        self.first = not self.started or torch.distributed.get_rank() == 0
        self.count = torch.distributed.get_world_size() if self.started and not together else 1
        self.rank = torch.distributed.get_rank() if self.count > 1 else 0
        self.writes = self.first or self.count > 1

    @staticmethod
    def start() -> Processes:
        """Those that torchrun started, joined (by gloo where there is no accelerator); one, without torchrun."""
        from accelerate import PartialState

        return Processes(PartialState(cpu=not torch.accelerator.is_available()).device)

    def wait(self) -> None:
        """For all the others."""
        if self.started:
            torch.distributed.barrier()

    def in_turn(self, make: Callable[[], T]) -> T:
        """What `make` gives; the first process's before the others begin. See first_first."""
        with self.first_first():
            return make()

    @contextmanager
    def first_first(self) -> Iterator[None]:
        """The first process runs the block before the others do.

        Where the block raises there, the others do not begin: the same exception is raised in their place.
        """
        if self.first:
            try:
                yield
            except BaseException as error:
                self.agree(portable(error))
                raise
            self.agree(None)
            return
        failure: BaseException | None = self.agree(None)
        if failure is not None:
            raise failure
        yield

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of the items."""
        return list(items[self.rank :: self.count])

    def combine(self, values: Tensor) -> Tensor:
        """The sum over processes of which all but one have 0 at any place: the same bits for any number of them."""
        if self.count == 1:
            return values
        shared = values.to(self.device, copy=True)
        torch.distributed.all_reduce(shared)
        return shared.cpu()

    def agree(self, value: T) -> T:
        """The first process's value, on all."""
        if not self.started:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, 0)
        return values[0]


def portable(error: BaseException) -> BaseException:
    """The exception as another process gets it: itself, or a RuntimeError that names it if it cannot be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"on the first process: {type(error).__name__}: {error}")


# ---- parts of tensors ------------------------------------------------------------------------------------------------


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor: laid out over ranks, in parts or as copies."""
    return hasattr(tensor, "device_mesh")  # a program without DTensors does not import them


def whole(tensor: Any) -> Tensor:
    """The tensor itself, gathered from all ranks where it is laid out over them."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Any) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_fsdp(model: nn.Module) -> bool:
    """Whether torch's fully_shard (FSDP2) has the model or parts of it."""
    return any(hasattr(type(module), "set_reshard_after_forward") for module in model.modules())
