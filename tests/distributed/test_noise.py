"""Sharded parameters are perturbed as whole ones are."""

from .launch import run_case


def test_two_processes_perturb_as_one_does(tmp_path):
    """DTensors on two gloo processes: dim 0, dim 1, uneven, empty; FSDP2."""
    for right, messages in run_case("noise.sharded", tmp_path):
        assert len(right) == 4 * 9 + 2
        assert [case for case, same in right.items() if not same] == []
        assert "'w' is in half precision" in messages["auto"]
        assert "mode='overlay': 'w' is sharded" in messages["overlay"]
        assert "mode='streamed': 'w' is sharded" in messages["streamed"]
        assert "mode='snap': needs float32" in messages["snap"]
