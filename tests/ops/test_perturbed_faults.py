"""`perturbed` when something goes wrong: exceptions, Ctrl-C at any instruction, threads, blocks out of order."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest
import torch
from torch import nn

import pyunlearn as pu
from pyunlearn.ops import guard, modes, noise, parameters, perturbation

from .perturbed_model import EVERY, IDS, assert_restored, make, state


@pytest.mark.parametrize("mode", EVERY)
def test_restored_after_an_exception(mode):
    model = make(bfloat16_numbers=True)
    before = state(model)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError), pu.perturbed(model, sigma=0.1, mode=mode):
            model(IDS * (1 // 0))
        assert_restored(model, before)
        with pytest.raises(IndexError), pu.perturbed(model, sigma=0.1, mode=mode):  # inside of a forward
            model(IDS + 1000)
        assert_restored(model, before)
        with pytest.raises(ValueError, match="draw=-1"), pu.perturbed(model, sigma=0.1, mode=mode) as it:
            it.to(-1)
        assert_restored(model, before)
        assert torch.isfinite(model(IDS)).all()


def test_no_memory_for_the_scratch():
    """A scratch of 4 PB cannot be had; nothing has changed by then."""
    huge = nn.ParameterDict({"weight": nn.Parameter(torch.ones(1).expand(1 << 50)), "layer": torch.ones(3)})
    memory = huge["weight"].data_ptr(), huge["layer"].data_ptr()
    for mode in ("overlay", "streamed"):
        with pytest.raises(RuntimeError, match="memory"), pu.perturbed(huge, mode=mode):
            pass
        assert (huge["weight"].data_ptr(), huge["layer"].data_ptr()) == memory
        assert huge["layer"].tolist() == [1, 1, 1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class InterruptAt:
    """Sends SIGINT at the n-th bytecode instruction of these modules' code and the block's, by tracing."""

    FILES = tuple(module.__file__ for module in (perturbation, guard, modes, parameters, noise))

    def __init__(self, n):
        self.left = n

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in self.FILES and frame.f_code is not block.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self


def block(it):
    it.to(2)
    it.to(None)


def interrupted_at(n, model, mode):
    """-> (whether KeyboardInterrupt came out, whether the program got to instruction n)."""
    trace = InterruptAt(n)
    before = sys.gettrace()
    try:
        sys.settrace(trace)
        with pu.perturbed(model, sigma=0.1, draw=1, mode=mode) as it:
            block(it)
    except KeyboardInterrupt:
        return True, trace.left <= 0
    finally:
        sys.settrace(before)
    return False, trace.left <= 0


@pytest.mark.parametrize("mode", EVERY)
def test_interrupt_at_any_instruction(mode):
    """Wherever Ctrl-C arrives, in entering, moving on, the block or the restore: it gets through, and w is w."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    model[0].weight.data = model[0].weight.data.bfloat16().float()
    before = state(model)
    n, step = 1, 3
    while True:
        came, reached = interrupted_at(n, model, mode)
        assert_restored(model, before)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not reached:
            break
        assert came, n
        n += step
    assert n > 1000


def test_interrupts_from_outside():
    """Signals of another thread at random times; each is a KeyboardInterrupt in the end."""
    model = make(bfloat16_numbers=True)
    before = state(model)
    got = 0
    for i in range(40):
        timer = threading.Timer(1e-4 * (i % 20), signal.raise_signal, [signal.SIGINT])
        try:
            timer.start()
            for mode in ("snap", "overlay") * 200:
                with pu.perturbed(model, sigma=0.1, mode=mode) as it:
                    it.to(1)
        except KeyboardInterrupt:
            got += 1
        timer.join()
        assert_restored(model, before)
    assert got == 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_handler_that_does_not_raise(number):
    """It is called, the block goes on with perturbed weights, and the handler is there again afterwards."""
    model, seen = make(), []

    def handler(signum, _):
        seen.append(signum)

    old = signal.signal(number, handler)
    try:
        with torch.no_grad(), pu.perturbed(model, sigma=0.1) as it:
            expected = model(IDS)
            os.kill(os.getpid(), number)
            assert seen == [number]
            assert torch.equal(model(IDS), expected)
            with pu.perturbed(model, sigma=0.1, draw=9):  # a block in a block
                os.kill(os.getpid(), number)
            assert torch.equal(model(IDS), expected)
            it.to(1)
        assert seen == [number] * 2
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, old)


def test_works_in_another_thread():
    model, result = make(), []
    before = state(model)

    def work():
        with torch.no_grad(), pu.perturbed(model, sigma=0.1):
            result.append(model(IDS))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with torch.no_grad(), pu.perturbed(model, sigma=0.1):
        assert torch.equal(model(IDS), result[0])
    assert_restored(model, before)


@pytest.mark.parametrize("mode", ["overlay", "copy"])
def test_blocks_left_out_of_order_are_both_restored(mode):
    layer = torch.nn.Linear(3, 3)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    outer, inner = (pu.perturbed(layer, sigma=0.1, draw=draw, mode=mode) for draw in (0, 1))
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="left before a block entered later"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    for name, p in layer.named_parameters():
        assert torch.equal(p, before[name])


def test_another_thread_is_refused():
    layer, raised = torch.nn.Linear(3, 3), []

    def other():
        try:
            with pu.perturbed(layer, sigma=0.1):
                pass
        except RuntimeError as error:
            raised.append(str(error))

    with pu.perturbed(layer, sigma=0.1):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread is inside a block on these weights" in raised[0]
