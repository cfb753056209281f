"""G-effects of a model sharded over two processes, against the whole on one."""

import pytest

import pyunlearn as pu

from ..float64 import make_model
from ..geffect.test_g_effect import METRICS, OBJECTIVE, assert_is
from .launch import run_case


def test_fsdp2_equals_one_process(tmp_path):
    """Two processes with half of the data each, FSDP2 over blocks and root, against the whole on one."""
    first, second = run_case("geffect.fsdp", tmp_path)
    assert first == second
    whole = pu.g_effect(make_model("llama"), OBJECTIVE, METRICS)
    assert_is(whole, first["plain"])
    assert_is(whole, first["parts"])
    assert first["cosine"] == pytest.approx(whole.cosine, rel=1e-12)
    assert first["shared"] == first["plain"]
    for layout in ("replicas", "shards"):  # HSDP: two replicas of the whole, one replica in two shards
        assert_is(whole, first[layout])
    assert "is sharded, needs whole parameters" in first["pointwise"]
    assert first["not_finite"] == "loss: the gradient of 'lm_head.weight' is not finite"  # on either rank
