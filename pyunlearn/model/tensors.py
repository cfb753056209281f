"""The tensors of a model, in memory each once, and on disk by name, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..store import save_tensors

SHARD = 1 << 30  # bytes of a file: what is copied to be written is no more than that, or one tensor

Names = Mapping[str, Sequence[str]]  # of every tensor that a model has, by the first of them


def stored(model: nn.Module) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Every parameter and saved buffer once, by the first of its names, with all of them: tied weights have several."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (tensor, []))[1].append(name)
    return {names[0]: (tensor, tuple(names)) for tensor, names in found.values()}


class Tensors:
    """Those of a folder's safetensors files, of which none is in memory until it is read.

    Raises ValueError that names a file which is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(str(path), framework="pt") as file:
                    self.files.update(dict.fromkeys(file.keys(), path))
            except SafetensorError as error:
                raise ValueError(f"{path}: is damaged or no safetensors file ({error})") from None

    def hold(self, model: nn.Module) -> bool:
        """Whether there is, by one of its names, all that the model has."""
        return all(any(name in self.files for name in names) for _, names in stored(model).values())

    def read(self, names: Iterable[str]) -> Tensor:
        """The tensor that has one of these names, on the CPU. Raises KeyError for none."""
        name = next((name for name in names if name in self.files), None)
        if name is None:
            raise KeyError(f"{self.folder}: has no tensor {', '.join(names)}")
        with safe_open(str(self.files[name]), framework="pt") as file:
            return file.get_tensor(name)

    def check(self, model: nn.Module) -> None:
        """Raises ValueError that names the first tensor that is missing here or has another shape than the model's."""
        for name, (tensor, names) in stored(model).items():
            held = next((each for each in names if each in self.files), None)
            if held is None:
                raise ValueError(f"{name}: {self.folder} does not have it; needs two models of one architecture")
            with safe_open(str(self.files[held]), framework="pt") as file:
                shape = tuple(file.get_slice(held).get_shape())
            if shape != tuple(tensor.shape):
                raise ValueError(
                    f"{name}: has shape {tuple(tensor.shape)} before unlearning and {shape} in {self.folder}; needs "
                    "two models of one architecture"
                )


@torch.no_grad()
def write_tensors(model: nn.Module, folder: str | Path, shard: int = SHARD) -> Tensors:
    """All that the model has, as `write_files`."""
    return write_files(((name, tensor) for name, (tensor, _) in stored(model).items()), folder, shard)


@torch.no_grad()
def write_files(tensors: Iterable[tuple[str, Tensor]], folder: str | Path, shard: int = SHARD) -> Tensors:
    """Tensors by name, as files of `shard` bytes or of one tensor, into a folder that is new or empty.

    Each is asked for when it is written: of what is made for that, no more is held than goes into a file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pending: dict[str, Tensor] = {}
    size = number = 0
    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard:
            save_tensors(pending, folder / f"{number:05d}.safetensors")
            pending, size, number = {}, 0, number + 1
        pending[name] = apart(tensor.detach().cpu().contiguous(), pending.values())
        size += tensor.nbytes
    save_tensors(pending, folder / f"{number:05d}.safetensors")
    return Tensors(folder)


def apart(tensor: Tensor, others: Iterable[Tensor]) -> Tensor:
    """The tensor, copied where it shares memory with others: safetensors takes none that do."""
    place = tensor.untyped_storage().data_ptr()
    return tensor.clone() if any(place == other.untyped_storage().data_ptr() for other in others) else tensor
