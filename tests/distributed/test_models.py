"""Models sharded over two processes, FSDP2 and tensor parallel, against one process."""

import pytest
import torch

from pyunlearn.model.fingerprint import model_fingerprint

from .cases.models import FSDP, batch_of, loss_of, make
from .launch import run_case


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_case("models.sharded", tmp_path_factory.mktemp("models"))


def gradients(batches, tied=False):
    """Of the mean over batches, as FSDP averages over ranks."""
    model, reference = make(tied=tied), make(1)
    (sum(loss_of(model, batch, reference) for batch in batches) / len(batches)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", FSDP)
def test_fsdp(ranks, name):
    expected = gradients([batch_of(0), batch_of(1)], tied=FSDP[name][1])
    for rank in ranks:
        assert rank[name].keys() == expected.keys()
        for parameter, gradient in expected.items():
            torch.testing.assert_close(rank[name][parameter], gradient, msg=lambda m, p=parameter: f"{p}: {m}")


def test_fingerprints_are_those_of_one_process(ranks):
    expected = model_fingerprint(make())
    assert [rank["fingerprints"] for rank in ranks] == 2 * [[expected, expected]]


def test_a_head_that_fsdp_has_put_away_is_refused(ranks):
    assert "in the root FSDP group" in ranks[0]["refused"]


def test_tensor_parallel(ranks):
    expected = gradients([batch_of(0)])
    for rank in ranks:
        found = rank["tensor parallel"]["gradients"]
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=lambda m, name=name: f"{name}: {m}")
    assert ranks[0]["tensor parallel"]["layout"] == "(Shard(dim=0),)"
