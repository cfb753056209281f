"""One process, and tensors that no other has a part of; tests/distributed has what several do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyunlearn import distributed
from pyunlearn.distributed import Processes

CPU = torch.device("cpu")


@pytest.mark.parametrize("together", [False, True])
def test_one_process_does_everything(together):
    processes = Processes(CPU, together)
    assert (processes.started, processes.count, processes.rank) == (False, 1, 0)
    assert processes.first
    assert processes.writes
    assert processes.share(range(4)) == [0, 1, 2, 3]
    values, word = torch.ones(3), ["word"]
    assert processes.combine(values) is values
    assert processes.agree(word) is word
    assert processes.in_turn(lambda: 7) == 7
    processes.wait()


def test_an_exception_passes(monkeypatch):
    processes = Processes(CPU)
    with pytest.raises(ZeroDivisionError):
        processes.in_turn(lambda: 1 // 0)
    with pytest.raises(KeyboardInterrupt), processes.first_first():
        raise KeyboardInterrupt


def test_plain_tensors_are_whole_and_local():
    tensor = torch.ones(2)
    assert not distributed.is_sharded(tensor)
    assert not distributed.is_sharded(None)
    assert distributed.whole(tensor) is tensor
    assert distributed.local(tensor) is tensor
    assert not distributed.is_fsdp(nn.Linear(2, 2))
