"""Which lanes the k largest are, and their order: what a stable sort of the row says."""

import pytest
import torch

from pyunlearn.ops.contract import Options
from pyunlearn.ops.from_logits import forward

from .rows import device_of, interpreted, skip_unless_taken


@pytest.mark.parametrize("k", [1, 3, 256])
def test_topk_takes_the_lowest_index_of_equals(k, fused):
    """Ties, both zeros, lanes at -inf and whole rows of one value: the lanes a stable sort takes, in its order."""
    logits = torch.zeros(4, 1100)
    logits[0, ::2] = -0.0
    logits[1] = torch.arange(1100).remainder(7).float()
    logits[2, 300:] = float("-inf")
    logits[3] = torch.randn(1100).bfloat16().float()
    logits = logits.to(device_of(fused))
    targets = torch.tensor([0, 1, 2, -100], device=logits.device)
    index, belief = forward(logits, targets, None, Options(("topk",), k=k), fused)[2:]
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k].int()
    assert torch.equal(index[:3], order[:3])
    assert index[3].eq(-1).all()
    assert belief[3].eq(0).all()
    torch.testing.assert_close(belief[:3], logits.gather(-1, order.long())[:3].softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("v", [7, 300, 2311, 20011])
def test_rows_of_any_order(v, begin, dtype, fused):
    """Sorted either way, with many equals or infinities, rows that begin on a whole pack or not; all at once or not."""
    skip_unless_taken(fused, dtype)
    v = min(v, 1500) if interpreted(fused) else v
    lanes = torch.arange(v, dtype=torch.float32)
    random = torch.randn(2, v, generator=torch.Generator().manual_seed(v))
    last = torch.where(lanes >= v - 300, float("inf"), random[0])
    low = torch.where(lanes == v // 2, 1.0, float("-inf"))
    kinds = [random[0], lanes / 64, -lanes / 64, 3 * random[1].sin().round(), torch.full((v,), -2.0), last, low]
    store = torch.full((len(kinds), v + begin + 2), float("nan"))
    store[:, begin : begin + v] = torch.stack(kinds)
    logits = store.to(device_of(fused), dtype)[:, begin : begin + v]
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices
    targets = torch.zeros(len(kinds), dtype=torch.int64, device=logits.device)
    for k in {1, min(7, v), min(v, 40 if interpreted(fused) else 256)}:
        index = forward(logits, targets, None, Options(("topk",), k=k), fused)[2]
        assert torch.equal(index, order[:, :k].int()), f"k={k}"


@pytest.mark.parametrize("v", [40, 9000])
def test_softcapped(v, fused):
    """Lanes that the softcap makes equal, or nearly so: those taken are as large as any, to its error."""
    v = min(v, 1100) if interpreted(fused) else v
    logits = torch.randn(3, v, generator=torch.Generator().manual_seed(v)).to(device_of(fused))
    logits[1] *= 100
    logits[2, v // 2 :] += 30
    targets = torch.zeros(3, dtype=torch.int64, device=logits.device)
    index = forward(logits, targets, None, Options(("topk",), k=20, softcap=8.0, temperature=0.7), fused)[2].long()
    z = 8 * (logits.double() / 8).tanh() / 0.7
    torch.testing.assert_close(z.gather(-1, index), z.topk(20).values, atol=1e-5, rtol=0)
    assert all(len(set(row)) == 20 for row in index.tolist())
