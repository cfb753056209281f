"""The modes of `perturbed` (perturbation.py has the table): overlay, streamed, snap, copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._declined import decline
from .contract import shares_memory
from .guard import Uncopied
from .memory import empty, free_bytes
from .noise import LARGEST, Plan
from .parameters import Weight, point
from .pieces import Noise, Piece, parameter_id

MODES = ("auto", "overlay", "streamed", "snap", "copy")


def choose_mode(asked: str, weights: Sequence[Weight], sigma: float) -> tuple[str, str | None]:
    """The mode to take, and why "auto" did not take overlay. Raises ValueError where it cannot be had."""
    sharded = next((weight.name for weight in weights if weight.sharded), None)
    if asked in ("overlay", "streamed") and sharded is not None:
        raise ValueError(f"mode={asked!r}: {sharded!r} is sharded; needs 'auto', 'snap' or 'copy'")
    if asked == "snap":
        unfit = next((weight.name for weight in weights if not holds_bfloat16(weight)), None)
        if unfit is not None:
            raise ValueError(f"mode='snap': needs float32 parameters that hold bfloat16 numbers; {unfit!r} does not")
    if asked in ("snap", "copy"):
        folded = next((weight.name for weight in weights if shares_memory(weight.local)), None)
        if folded is not None:
            raise ValueError(
                f"mode={asked!r}: needs weights whose elements lie apart; those of {folded!r} share memory"
            )
    if asked != "auto":
        return asked, None
    if sharded is None and room_for(scratch_sizes(weights)):
        return "overlay", None
    why = "sharded parameters stay where they are" if sharded else "its scratch needs more than half of the free memory"
    declined = f"overlay: {decline('overlay', why)}"
    if snaps_well(weights, sigma):
        return "snap", declined
    why = "it needs float32 parameters that hold bfloat16 numbers, 99 % of which rounding brings back"
    declined += f"; snap: {decline('snap', why)}"
    if sharded is None:
        return "streamed", declined
    half = next((weight.name for weight in weights if weight.local.dtype.itemsize < 4), None)
    if half is not None:
        raise ValueError(
            f"mode='auto': {half!r} is in half precision, which rounds the noise off, and the parameters of a sharded "
            "model cannot be replaced; keep them in float32 (FSDP2: MixedPrecisionPolicy), or pass mode='copy'"
        )
    return "copy", declined


def make_mode(
    mode: str, model: nn.Module, weights: Sequence[Weight], sigma: float, seed: int, backend: str | None
) -> Mode:
    """Takes all the memory it needs; the weights are as they were until its first `move`."""
    if mode == "overlay":
        return Overlay(weights, seed, backend, new_scratch(scratch_sizes(weights)))
    if mode == "streamed":
        return Streamed(model, weights, seed, backend)
    return Snap(weights, sigma, seed, backend) if mode == "snap" else Copy(weights, seed, backend)


class Mode(Uncopied):
    def move(self, noise: Noise | None) -> None:
        """From one draw, or the weights as they are, to the next, or back."""
        raise NotImplementedError

    def leave(self) -> None:
        """The weights' own memory as it was; the parameters are put back on it afterwards."""


Kind = tuple[torch.device, torch.dtype]


def scratch_kind(weight: Weight) -> Kind:
    return weight.local.device, torch.promote_types(weight.local.dtype, torch.float32)


def place_of(weight: Weight) -> tuple[int, int, tuple[int, ...]]:
    """(elements before, elements, strides) of a weight's scratch, counted from 64 bytes on: as its own memory lies, for
    BLAS sums in another order where a matrix lies otherwise. Elements that share memory are set apart, row by row."""
    w = weight.local
    if shares_memory(w):
        return 0, w.numel(), torch.empty(w.shape, device="meta").stride()
    before = w.data_ptr() % 64 // w.itemsize if w.dtype == scratch_kind(weight)[1] else 0
    return before, 1 + sum((n - 1) * step for n, step in zip(w.shape, w.stride(), strict=True)), w.stride()


def room(weight: Weight) -> int:
    """Elements of scratch, whole 64 bytes."""
    before, count, _ = place_of(weight)
    return (before + count + 15) // 16 * 16


def scratch_sizes(weights: Sequence[Weight]) -> dict[Kind, int]:
    """Elements of scratch by kind."""
    sizes: dict[Kind, int] = {}
    for weight in weights:
        kind = scratch_kind(weight)
        sizes[kind] = sizes.get(kind, 0) + room(weight)
    return sizes


def room_for(sizes: dict[Kind, int]) -> bool:
    """Whether a scratch of these sizes takes at most half of the memory that is free on each device."""
    needed: dict[torch.device, int] = {}
    for (device, dtype), n in sizes.items():
        needed[device] = needed.get(device, 0) + n * dtype.itemsize
    return all(n <= free_bytes(device) // 2 for device, n in needed.items())


def new_scratch(sizes: dict[Kind, int]) -> dict[Kind, Tensor]:
    return {(device, dtype): empty((n,), dtype, device) for (device, dtype), n in sizes.items()}


class Moves:
    """target = source + noise for many weights in one launch, whatever their strides."""

    def __init__(self, weights: Sequence[tuple[Weight, Tensor, Tensor]], seed: int, backend: str | None):
        self.seed, pieces = seed, []
        self.strided: list[tuple[Tensor, Tensor, Tensor]] = []  # between source and target: where noise is added, flat
        for weight, source, target in weights:
            if not (source.is_contiguous() and target.is_contiguous()):
                between = torch.empty(target.shape, dtype=target.dtype, device=target.device)
                self.strided.append((source, between, target))
                source = target = between
            pieces.append(weight.piece(source.view(-1), target.view(-1)))
        self.plan = Plan(pieces, backend)

    def run(self, noise: Noise | None) -> None:
        for source, between, _ in self.strided:
            between.copy_(source)
        self.plan.run(self.seed, add=noise)
        for _, between, target in self.strided:
            target.copy_(between)


class Overlay(Mode):
    def __init__(self, weights: Sequence[Weight], seed: int, backend: str | None, scratch: dict[Kind, Tensor]):
        self.shown: list[tuple[nn.Parameter, Tensor]] = []
        moves, free = [], dict(scratch)
        for weight in weights:
            kind, (before, count, strides) = scratch_kind(weight), place_of(weight)
            view = free[kind][before : before + count].as_strided(weight.local.shape, strides)
            free[kind] = free[kind][room(weight) :]
            moves.append((weight, weight.local, view))
            self.shown += [(p, view) for p in weight.parameters]
        self.moves = Moves(moves, seed, backend)

    def move(self, noise: Noise | None) -> None:
        self.moves.run(noise)
        point(self.shown)


class Copy(Mode):
    def __init__(self, weights: Sequence[Weight], seed: int, backend: str | None):
        self.moves = Moves([(weight, weight.local.clone(), weight.local) for weight in weights], seed, backend)

    def move(self, noise: Noise | None) -> None:
        self.moves.run(noise)

    def leave(self) -> None:
        self.move(None)


class Snap(Mode):
    def __init__(self, weights: Sequence[Weight], sigma: float, seed: int, backend: str | None):
        self.seed = seed
        self.strided = Copy([weight for weight in weights if not weight.local.is_contiguous()], seed, backend)
        inplace, aside = [], []
        for weight in weights:
            if weight.local.is_contiguous():
                flat = weight.local.view(-1)
                inplace.append(weight.piece(flat, flat))
                at = lost_by_rounding(flat, sigma)
                logical = weight.starts[(at // weight.length).cpu()] + (at % weight.length).cpu()
                aside.append(Piece(flat[at], flat, parameter_id(weight.name), logical, 1, places=at))
        self.plan, self.aside = Plan(inplace, backend), Plan(aside, backend)
        self.now: Noise | None = None  # what the weights hold

    def move(self, noise: Noise | None) -> None:
        if noise is not None or self.now is not None:
            self.plan.run(self.seed, add=noise, remove=self.now)
            self.now = noise
            self.aside.run(self.seed, add=noise)
        self.strided.move(noise)

    def leave(self) -> None:
        self.move(None)


def in_blocks(flat: Tensor) -> Iterator[Tensor]:
    return iter(flat.split(1 << 24))  # no temporary as large as an embedding


def holds_bfloat16(weight: Weight) -> bool:
    """Whether a float32 parameter's every element is a bfloat16 number."""
    if weight.local.dtype != torch.float32:
        return False
    return not any(bool((block.view(torch.int32) & 0xFFFF).any()) for block in in_blocks(weight.local.reshape(-1)))


def lost_by_rounding(flat: Tensor, sigma: float) -> Tensor:
    """Positions of bfloat16 numbers w (in float32) that bfloat16((w + s) - s) may miss for some |s| <= 6.77 sigma.

    In float32 (w + s) - s is off by 2^-24 (2 |w| + |s|) at most, and bfloat16 rounds back what is off by less than
    2^-9 |w|. +0 comes back by itself, -0 does not.
    """
    small = 1.001 * 2**-15 * LARGEST * sigma
    positions = []
    for i, block in enumerate(in_blocks(flat)):
        magnitude = block.abs()
        fits = (magnitude >= small) & (magnitude <= 1e38) | (block.view(torch.int32) == 0)
        positions.append((~fits).nonzero().squeeze(-1) + (i << 24))
    return torch.cat(positions)


def snaps_well(weights: Sequence[Weight], sigma: float) -> bool:
    """Whether "snap" is possible and at most one weight in 100 is to be kept aside (pruned weights may all be -0)."""
    if not all(holds_bfloat16(weight) and not shares_memory(weight.local) for weight in weights):
        return False
    aside = sum(lost_by_rounding(weight.local.reshape(-1), sigma).numel() for weight in weights)
    return 100 * aside <= sum(weight.local.numel() for weight in weights)


class Streamed(Mode):
    """An overlay for every unit (a layer, or a module outside of the layers), shown around the unit's forward."""

    def __init__(self, model: nn.Module, weights: Sequence[Weight], seed: int, backend: str | None):
        self.noise: Noise | None = None
        self.busy: nn.Module | None = None  # the unit that has the scratch which all whole units share
        self.resident: list[nn.Module] = []  # shown outside of their forwards
        self.hooks: list[RemovableHandle] = []
        of = {id(p): weight for weight in weights for p in weight.parameters}
        units = []
        for module, (parameters, whole) in units_of(model).items():
            own = list({id(of[id(p)]): of[id(p)] for p in parameters if id(p) in of}.values())
            if own:
                units.append((module, own, whole))
        sizes: dict[Kind, int] = {}
        for _, own, whole in units:
            for kind, n in scratch_sizes(own).items() if whole else ():
                sizes[kind] = max(n, sizes.get(kind, 0))
        shared = new_scratch(sizes)
        self.units: dict[nn.Module, tuple[Overlay, bool]] = {}
        for module, own, whole in units:
            scratch = shared if whole else new_scratch(scratch_sizes(own))
            self.units[module] = Overlay(own, seed, backend, scratch), whole

    def move(self, noise: Noise | None) -> None:
        self.noise = noise
        for module in self.resident:
            self.units[module][0].move(noise)
        if not self.hooks:
            for module, (overlay, _) in self.units.items():
                hide(overlay)
                self.hooks.append(module.register_forward_pre_hook(self.show, prepend=True))
                self.hooks.append(module.register_forward_hook(self.put_away, always_call=True))

    def leave(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def show(self, module: nn.Module, *_: Any) -> None:
        overlay, whole = self.units[module]
        if torch.is_grad_enabled():
            raise RuntimeError("mode='streamed': is forward only, needs torch.no_grad()")
        if whole and self.busy is not None:
            names = f"{type(module).__name__} inside {type(self.busy).__name__}"
            raise RuntimeError(f"mode='streamed': a layer called by another one ({names}); pass mode='overlay'")
        self.busy = module if whole else self.busy
        overlay.move(self.noise)

    def put_away(self, module: nn.Module, *_: Any) -> None:
        hide(self.units[module][0])
        if self.busy is module:
            self.busy = None

    @contextmanager
    def showing(self, module: nn.Module) -> Iterator[None]:
        if module not in self.units:
            raise ValueError(f"resident: {type(module).__name__} is not streamed as one module")
        self.show(module)
        self.resident.append(module)
        try:
            yield
        finally:
            self.resident.remove(module)
            self.put_away(module)


def units_of(module: nn.Module) -> dict[nn.Module, tuple[list[nn.Parameter], bool]]:
    """What streams its parameters together: {module: (parameters, whether they are all that are used in its forward)}.

    The members of every nn.ModuleList (layers) and the modules without children, each whole; and of the other modules
    what they hold themselves.
    """
    children = list(module.children())
    if not children:
        return {module: (list(module.parameters()), True)}
    units = {module: (list(module.parameters(recurse=False)), False)}
    for child in children:
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            units[child] = list(child.parameters()), True
        else:
            units |= units_of(child)
    return units


def hide(overlay: Overlay) -> None:
    """Nothing reads a pristine weight by mistake: a parameter that is not shown is empty."""
    point([(parameter, view.new_empty(0)) for parameter, view in overlay.shown])
