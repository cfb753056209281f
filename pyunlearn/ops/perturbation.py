"""perturbed: a model whose every weight w is w + sigma z inside a `with` block, and bitwise w again after it.

    with pu.perturbed(model, sigma=1e-5, seed=0, draw=None) as weights:
        clean = score(model)                # the baseline, by the very same kernels
        for k in range(200):
            weights.to(k)                   # draw k; the previous one is gone, in the same pass over memory
            scores.append(score(model))

z is `gaussian_noise` of the parameter's name: it depends on seed, draw, name and element, and on nothing else. Adding
noise and subtracting it again is not exact (float32: 1e-4 sigma after one cycle), so it is done in one of these ways:

==========  ==========================================================================================================
mode        what happens
==========  ==========================================================================================================
overlay     w is only read; w + sigma z goes to a scratch (float32; float64 for float64) that the parameters' `.data`
            points to inside the block. Nothing to restore. 4 more bytes a parameter (8 in float64; twice that where a
            weight is not contiguous). A bfloat16 model computes in float32 inside: adding 1e-5 to bfloat16 weights
            would move one in eight of them.
streamed    overlay of one layer at a time, around its forward: the scratch is as large as the largest layer. Forward
            only, under no_grad. Noise is made anew in each forward. Outside its module's forward a parameter is empty.
snap        float32 parameters that hold bfloat16 numbers (a checkpoint loaded in float32), in place, with no other
            memory: w + sigma z, minus sigma z, rounded to bfloat16, is w. Weights so small (below 2e-4 sigma) or so
            large that rounding could miss them, NaN and infinity are found beforehand and kept aside.
copy        in place, in the parameters' own dtype, with a copy of w. What half precision then rounds off is lost.
auto        overlay where its scratch takes at most half of the memory that is free; else snap where it is possible
            with less than 1 % kept aside; else streamed. Sharded parameters (DTensor, FSDP2) stay where they are: snap
            likewise, else copy.
==========  ==========================================================================================================

In float32 and float64 all of them give the same bits, whatever the strides: a scratch lies as the weight's memory does.
MRD, Definition 3.1 of arXiv:2504.06658, perturbs all parameters; frozen ones too. Buffers are left alone.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from .guard import Guard
from .modes import MODES, Mode, Streamed, choose_mode, make_mode
from .noise import DRAWS, SEEDS, check_range
from .parameters import Weight, changed, unwrapped, weights_of
from .pieces import Noise

_entered: list[perturbed] = []  # blocks that are open, in their order


class perturbed:
    """Context manager: the model's weights plus sigma * z of one draw at a time; bitwise restored on exit.

    Also after an exception, and after Ctrl-C: SIGINT and SIGTERM that arrive while weights change are delivered when
    the change is complete.

    Args:
        model: any module, plain or in DistributedDataParallel, torch.compile or FSDP2 (`fully_shard`); its parameters
            in bfloat16, float16, float32 or float64.
        sigma: standard deviation of the noise, > 0.
        seed: 0 <= seed < 2^64. draw: 0 <= draw < 2^32, or None for the weights as they are (the baseline of a mode).
        sign: +1 or -1: w + sigma z or w - sigma z (antithetic pairs).
        mode: one of MODES, see above. `.mode` tells what "auto" took, `.declined` why that is not overlay (or None).
        parameters: names of the parameters to perturb, as `model.named_parameters()` gives them without wrappers'
            prefixes; default all. A tied parameter has its first name, and answers to its others.
        backend: None (each device's default), "cpu", "cuda", "triton" or "eager".

    Raises:
        ValueError: an argument out of range, an unknown name, two names with one 32-bit id, a mode that cannot be had.
        RuntimeError: another thread is inside a block on the same weights; a block inside of one in mode "streamed";
            blocks left out of their order, or weights that something else has changed (after all are restored).
        TypeError: a parameter of another dtype (leave it out by `parameters=`), FSDP1's flat parameters.

    Inside, state_dict, load_state_dict, save_pretrained, deepcopy and pickle raise. What else writes to the weights (an
    optimizer), converts (`.half()`, `.to(device)`) or replaces them is undone on exit, which then raises (or warns, if
    there is an exception already); so does `to`. But in mode "snap" what was written stays, rounded to bfloat16, and
    writes through `.data` are not seen.

    Gradients: a graph made before or in the block must be used before the weights change (autograd raises otherwise);
    with overlay, `backward()` leaves gradients of the scratch's dtype, so ask `torch.autograd.grad` in a half precision
    model.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> before = layer.weight.detach().clone()
    >>> with perturbed(layer, sigma=0.5, seed=1, draw=7):
    ...     moved = layer.weight.detach() - before
    >>> torch.allclose(moved.flatten(), 0.5 * gaussian_noise(2, seed=1, draw=7, name="weight"))
    True
    >>> torch.equal(layer.weight, before)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float = 1e-5,
        seed: int = 0,
        draw: int | None = 0,
        sign: int = 1,
        mode: str = "auto",
        parameters: Collection[str] | None = None,
        backend: str | None = None,
    ):
        if not (math.isfinite(sigma) and float(torch.tensor(sigma, dtype=torch.float32)) > 0 and sigma <= 1e37):
            raise ValueError(f"sigma={sigma!r}: needs a finite number > 0 (in float32, and at most 1e37)")
        check_range("seed", seed, SEEDS)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: needs one of {MODES}")
        self.model, self.sigma, self.seed, self.backend = unwrapped(model), sigma, seed, backend
        self.draw, self.sign, self.mode = draw, sign, mode
        self._start, self._asked, self._names = (draw, sign), mode, parameters
        self._noise(draw, sign)  # raises now rather than on entry
        self._mode: Mode | None = None
        self._guard: Guard | None = None
        self._thread = 0
        self.declined: str | None = None
        self.weights: list[Weight] = []
        methods = (perturbed.__enter__, perturbed.to, perturbed.__exit__)
        self._signals = _Signals({method.__code__ for method in methods})

    def __enter__(self) -> perturbed:
        if self._mode is not None:
            raise RuntimeError("perturbed: is entered already")
        try:
            self._signals.hold()
            weights = weights_of(self.model, self._names)
            check_around([block for block in list(_entered) if block._shares(weights)])
            self.weights = [weight for weight in weights if weight.local.numel() > 0]
            self.mode, self.declined = choose_mode(self._asked, self.weights, self.sigma)
            self._mode = make_mode(self.mode, self.model, self.weights, self.sigma, self.seed, self.backend)
            self._guard = Guard(self.model, self.weights)
            self._thread = threading.get_ident()
            _entered.append(self)
            self._move(*self._start)
            self._signals.deliver()
        except BaseException:
            self._leave()
            raise
        return self

    def to(self, draw: int | None, sign: int = 1) -> None:
        """Moves on to another draw (None: the weights as they are): one pass that restores and perturbs anew."""
        if self._mode is None or self._guard is None:
            raise RuntimeError("perturbed: to() needs to be called inside the with block")
        if self._inner():
            raise RuntimeError("perturbed: to() needs the blocks that were entered later on its weights to be left")
        if touched := self._guard.touched():
            raise RuntimeError(f"perturbed: to() needs weights that it alone changes; {were_changed(touched)}")
        self._move(draw, sign)
        self._signals.deliver()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        inner = self._inner()
        touched: dict[str, bool] = {}
        for block in (*reversed(inner), self):  # each restores what it found
            touched |= block._leave()
        self._signals.deliver()
        if inner and error is None:
            raise RuntimeError("perturbed: was left before a block entered later on its weights; both are restored")
        if touched:
            lost = self.mode == "snap" and any(touched.values())
            rest = ", but for what was written over, of which mode 'snap' keeps no copy" if lost else ""
            message = f"perturbed: {were_changed(touched)}; they are restored{rest}"
            if error is None:
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=2)

    @contextmanager
    def resident(self, module: nn.Module) -> Iterator[None]:
        """Inside, `module`'s parameters can be used outside of its forward in mode "streamed" too (a head's weight).

        Raises ValueError for a module that is not streamed as one (a part of a layer, or a whole model).
        """
        if not isinstance(self._mode, Streamed):
            yield
            return
        with self._mode.showing(module):
            self._look()
            yield
        self._look()

    def _noise(self, draw: int | None, sign: int) -> Noise | None:
        if sign not in (1, -1):
            raise ValueError(f"sign={sign!r}: needs +1 or -1")
        if draw is None:
            return None
        check_range("draw", draw, DRAWS)
        return Noise(draw, sign * self.sigma)

    def _move(self, draw: int | None, sign: int) -> None:
        assert self._mode is not None
        self._mode.move(self._noise(draw, sign))
        self.draw, self.sign = draw, sign
        changed(self.weights)
        self._look()

    def _look(self) -> None:
        """What has changed by now was changed by these blocks."""
        for block in list(_entered):
            if block._guard is not None and block._shares(self.weights):
                block._guard.look()

    def _shares(self, weights: Sequence[Weight]) -> bool:
        own = {id(p) for weight in self.weights for p in weight.parameters}
        return any(id(p) in own for weight in weights for p in weight.parameters)

    def _inner(self) -> list[perturbed]:
        """The blocks entered later on its weights."""
        later = _entered[_entered.index(self) + 1 :] if self in _entered else []
        return [block for block in later if block._shares(self.weights)]

    def _leave(self) -> dict[str, bool]:
        """Everything as it was; what else has changed weights, as `Guard.touched`."""
        if self in _entered:
            _entered.remove(self)
        touched: dict[str, bool] = {}
        try:
            if self._guard is not None:
                touched = self._guard.touched()
                self._guard.release()
            if self._mode is not None:
                self._mode.leave()
        finally:
            if self._guard is not None:
                self._guard.put_back()
            changed(self.weights)
            self._look()
            self._mode, self._guard, self.weights = None, None, []
            self._signals.release()
        return touched


def check_around(blocks: Sequence[perturbed]) -> None:
    """Whether another one may be entered inside of these, on their weights. Raises RuntimeError."""
    for block in blocks:
        if block._thread != threading.get_ident():
            raise RuntimeError("perturbed: another thread is inside a block on these weights; give each its own model")
        if isinstance(block._mode, Streamed):
            raise RuntimeError(
                "perturbed: needs weights to perturb; the block around it, of mode 'streamed', hides them"
            )
        if block._guard is not None and (touched := block._guard.touched()):
            raise RuntimeError(f"perturbed: needs weights that it alone changes; {were_changed(touched)}")


def were_changed(names: Collection[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(repr, list(names)[:3]))}{more} were written to, converted or replaced inside the block"


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


class _Signals:
    """Between hold and release, SIGINT and SIGTERM that arrive inside of `critical` functions wait for deliver."""

    def __init__(self, critical: set[CodeType]):
        self.critical = critical
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self.pending: int | None = None

    def hold(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # handlers run in the main thread alone
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                self.handlers[number] = handler
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        # The frames tell, not a flag: a signal may arrive at the first instruction of __exit__.
        at = frame
        while at is not None:
            if at.f_code in self.critical:
                self.pending = number
                return
            at = at.f_back
        self.handlers[number](number, frame)

    def deliver(self) -> None:
        number = self.pending
        if number is not None:
            self.pending = None
            self.handlers[number](number, sys._getframe(2))

    def release(self) -> None:
        for number, handler in self.handlers.items():
            if signal.getsignal(number) == self.handle:
                signal.signal(number, handler)
