"""linear_token_stats with a head sharded over two processes: the numbers of one process, the same bits on both."""

import re

import pytest
import torch

from pyunlearn.ops.backends import native
from pyunlearn.ops.contract import Options

from .cases.head import CASES, PLAIN, V, case, problem
from .launch import run_case


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_case("head.sharded", tmp_path_factory.mktemp("head"))


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks, name):
    expected, values = case(CASES[name], shard=False), ranks[0]["cases"][name]
    assert values.keys() == expected.keys()
    half = CASES[name].get("dtype") == torch.bfloat16 or "autocast" in CASES[name]
    for key, value in expected.items():
        gradients = {"atol": 2e-5, "rtol": 1e-2 if half else 2e-6}  # half precision: rounded once, here as there
        bound = gradients if key.startswith("d") else {"atol": 2e-6, "rtol": 2e-6}
        torch.testing.assert_close(values[key], value, **bound, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_on_both_ranks_and_in_every_run(ranks, name):
    first = ranks[0]["cases"][name]
    for other in (ranks[1]["cases"][name], ranks[0]["again"][name]):
        assert other.keys() == first.keys()
        for key, value in first.items():
            assert torch.equal(value, other[key]), key


def test_the_states_of_the_ranks_merge_in_rank_order(ranks):
    """The same shards by hand: one state a rank, as the parts of one."""
    tensors, options, states = problem(without=("x", "b", "ref_weight")), Options(PLAIN), []
    rows = tensors["targets"] != -100
    hidden, targets = tensors["hidden"][rows], tensors["targets"][rows]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for columns in (slice(0, 751), slice(751, V)):
            logits = torch.nn.functional.linear(hidden, tensors["weight"][columns], tensors["bias"][columns])
            states.append(native.new_state(logits, len(targets), V))
            native.accumulate(logits, targets, None, states[-1], options, columns.start, V, True)
    finally:
        torch.set_num_threads(threads)
    stats, _ = native.finish(torch.cat(states, 1), targets, False, options, V)
    values = ranks[0]["cases"]["no reference, no adapter"]
    for name, line in zip(options.outputs, stats, strict=True):
        assert torch.equal(values[name][rows], line.double()), name


def test_parts_of_the_states_stay_in_rank_order(ranks):
    for rank in ranks:
        assert rank["gathered"][2, :, 3].tolist() == [203, 213, 1203, 1213]
        assert rank["gathered"].shape == (3, 4, 4)


def test_gradients_are_laid_out_as_their_tensors(ranks):
    assert ranks[0]["layouts"] == dict.fromkeys(("weight", "bias", "b"), "(Shard(dim=0),)")


def test_a_head_that_is_gathered_says_so(ranks):
    for rank in ranks:
        assert rank["declined"]["logp"] == {}
        assert "the head is gathered" in rank["declined"]["topk"]["vocabulary parallel"]


REFUSED = {
    "by hidden columns": r"weight: needs Shard\(0\) on one mesh dimension.*got \(Shard\(dim=1\),\)",
    "replicated": r"weight: needs Shard\(0\) on one mesh dimension.*got \(Replicate\(\),\)",
    "partial": r"weight: needs Shard\(0\) on one mesh dimension.*got \(Partial\(sum\),\)",
    "twice": r"weight: needs Shard\(0\) on one mesh dimension.*over a mesh of shape \(2, 1\)",
    "uneven": r"weight: needs 751 of its 1501 rows on this rank, in even chunks, got 500",
    "plain bias": r"bias: needs the layout of weight, \(Shard\(dim=0\),\).*got a plain tensor",
    "plain weight": r"bias: needs the layout of weight, a plain tensor; got \(Shard\(dim=0\),\)",
    "plain B": r"adapter\[1\]: needs the layout of weight",
    "B by columns": r"adapter\[1\]: needs the layout of weight.*got \(Shard\(dim=1\),\)",
    "reference by columns": r"reference\[1\]: needs the layout of weight.*got \(Shard\(dim=1\),\)",
    "rows of hidden": r"hidden: needs a plain tensor, or Replicate\(\).*got \(Shard\(dim=0\),\)",
    "rows of targets": r"targets: needs a plain tensor, or Replicate\(\).*got \(Shard\(dim=0\),\)",
    "hidden alone": r"hidden: needs a plain tensor, or Replicate\(\) over the mesh of weight, a plain tensor",
    "another mesh": r"hidden: needs a plain tensor, or Replicate\(\).*mesh of shape \(2, 1\)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_layouts_are_refused(ranks, name):
    assert re.search(REFUSED[name], ranks[0]["refusals"][name])
