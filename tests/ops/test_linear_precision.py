"""What linear_token_stats sums in which precision, and what it holds while it does."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pyunlearn as pu
from benchmarks.measure import peak_bytes
from pyunlearn.ops import memory, projection

N, H, R, V = 33, 24, 3, 1500
SLICES, BLOCKS = N * 2 * 300, V * 2 * 5  # budgets in bfloat16: slices of 256 columns, blocks of 5 rows
PATHS = {
    "within": dict(),
    "slices": dict(budget_bytes=SLICES),
    "rows": dict(budget_bytes=BLOCKS, backend="eager"),
    "rows for top k": dict(budget_bytes=BLOCKS, outputs=("logp", "topk")),
}


def problem(dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, H), "weight": (V, H), "bias": (V,), "x": (N, R), "b": (V, R)}
    tensors = {name: (torch.randn(shape, generator=g)).to(dtype) for name, shape in shapes.items()}
    return tensors, torch.randint(0, V, (N,), generator=g)


def gradients(tensors, targets, **options):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    h, w, bias, x, b = leaves.values()
    stats = pu.linear_token_stats(h, w, targets, bias, **{"outputs": ("logp",), **options}, adapter=(x, b))
    upstream = torch.linspace(-2, 3, N)
    sum((upstream * value).sum() for value in stats.as_dict().values()).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_gradients_are_rounded_once(path, monkeypatch):
    """Of the d(logits) there are, every gradient is the exact sum of products up to its own last bit."""
    exact, tiles, add = {}, [], projection.Gradients.add

    def watch(self, d, rows=projection.ALL, columns=projection.ALL):
        (x, low), (w, up), wide = self.head.inputs, self.head.weights, d.double()
        if not exact:
            shapes = {"hidden": x, "x": low, "weight": w, "b": up, "bias": self.head.bias}
            exact.update({name: torch.zeros(like.shape, dtype=torch.float64) for name, like in shapes.items()})
        exact["hidden"][rows] += wide @ w[columns].double()
        exact["x"][rows] += wide @ up[columns].double()
        exact["weight"][columns] += wide.t() @ x[rows].double()
        exact["b"][columns] += wide.t() @ low[rows].double()
        exact["bias"][columns] += wide.sum(0)
        tiles.append(d.shape)
        add(self, d, rows, columns)

    monkeypatch.setattr(projection.Gradients, "add", watch)  # nothing public shows d(logits)
    ours = gradients(*problem(), **PATHS[path])
    assert len(tiles) == {"within": 1, "slices": 6}.get(path, 7)
    for name, gradient in ours.items():
        assert gradient.dtype == torch.bfloat16
        error, scale = (gradient.double() - exact[name]).abs(), exact[name].abs()
        assert bool((error <= scale * 2**-8 + 2e-6 * scale.max()).all()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_are_summed_in_float32(dtype):
    a, b = torch.randn(20, 700).to(dtype), torch.randn(700, 30).to(dtype)
    out = torch.zeros(20, 30)
    projection.product(a, b, out, add=True)
    projection.product(a, -b, out, add=True)
    projection.product(a, b, out, add=True)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("fraction", [1, 16])
def test_no_hidden_copies(dtype, with_reference, fraction):
    """Beyond the results: the logits within the budget, in float32 as the entropy needs them, a slice and dX beyond it,
    little that does not grow with V."""
    n, h, v = 256, 32, 8192
    hidden, weight = torch.randn(n, h).to(dtype).requires_grad_(), torch.randn(v, h).to(dtype).requires_grad_()
    reference = (hidden.detach(), weight.detach()) if with_reference else None
    outputs, targets = ("entropy", "kl_pq")[: 1 + with_reference], torch.randint(0, v, (n,))
    logits = n * v * 4 * (1 + with_reference)

    def forward():
        stats = pu.linear_token_stats(
            hidden, weight, targets, outputs=outputs, reference=reference, budget_bytes=logits // fraction
        )
        return sum(value.sum() for value in stats.as_dict().values())

    forward().backward()
    hidden.grad = weight.grad = None
    results = (hidden.numel() + weight.numel()) * dtype.itemsize
    small = n * h * 8 + n * 200  # dX in float32 twice, states and statistics
    if dtype == torch.bfloat16:  # what its GEMMs work in: 256 columns in float32
        small += (n + h) * projection.NARROWEST * 4
    assert peak_bytes(lambda: forward().backward(), "cpu") - results <= logits // fraction + small
    with torch.no_grad():
        assert peak_bytes(forward, "cpu") <= logits // fraction + small


BUDGETS = [None, N * 4 * 300, 0]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_checkpointing(budget, reentrant, backend):
    tensors, targets = problem(torch.float32)

    def loss(h, w, bias, x, b):
        stats = pu.linear_token_stats(
            h.tanh(), w, targets, bias, ("logp", "entropy"), budget_bytes=budget, backend=backend, adapter=(x, b)
        )
        return (stats.logp + stats.entropy).sum()

    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    plain = torch.autograd.grad(loss(*leaves), leaves)
    again = [leaf.detach().requires_grad_() for leaf in leaves]
    checkpoint(loss, *again, use_reentrant=reentrant).backward()
    for leaf, gradient in zip(again, plain, strict=True):
        assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("path", PATHS)
def test_autocast_around_the_backward_changes_nothing(path):
    tensors, targets = problem(torch.float32)
    expected = gradients(tensors, targets, **PATHS[path])

    def inside(forward, backward):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        h, w, bias, x, b = leaves.values()
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            stats = pu.linear_token_stats(h, w, targets, bias, **{"outputs": ("logp",), **PATHS[path]}, adapter=(x, b))
            loss = sum((torch.linspace(-2, 3, N) * value).sum() for value in stats.as_dict().values())
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            loss.backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    for name, gradient in inside(False, True).items():
        assert torch.equal(gradient, expected[name]), name
    for (name, a), b in zip(inside(True, True).items(), inside(True, False).values(), strict=True):
        assert a.dtype == torch.float32, name
        assert torch.equal(a, b), name


def test_autocast_off_inside_autocast_and_float64():
    tensors, targets = problem(torch.float32)
    expected = pu.linear_token_stats(tensors["hidden"], tensors["weight"], targets).logp
    wide = [tensors[name].double() for name in ("hidden", "weight")]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(pu.linear_token_stats(tensors["hidden"], tensors["weight"], targets).logp, expected)
        assert pu.linear_token_stats(*wide, targets).logp.dtype == torch.float64  # autocast leaves it alone
        with pytest.raises(TypeError, match=r"weight: needs the dtype of hidden, torch.float64, got torch.bfloat16"):
            pu.linear_token_stats(wide[0], tensors["weight"], targets)


def test_no_position_ignored():
    """ignore_index=None looks at no target, and takes none for ignored."""
    tensors, targets = problem(torch.float32)
    head = tensors["hidden"], tensors["weight"]
    stats = pu.linear_token_stats(*head, targets, ignore_index=None)
    assert torch.equal(stats.logp, pu.linear_token_stats(*head, targets).logp)
    assert bool(stats.mask.all())
    targets[4] = -100
    with pytest.raises(IndexError, match="row 4 holds -100"):
        pu.linear_token_stats(*head, targets, ignore_index=None)


def test_statistics_without_gradient_keep_no_graph():
    tensors, targets = problem(torch.float32)
    stats = pu.linear_token_stats(
        tensors["hidden"].requires_grad_(), tensors["weight"], targets, outputs=("greedy", "variance")
    )
    assert not stats.variance.requires_grad


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_an_adapter_equals_the_merged_head(budget, backend):
    tensors, targets = problem(torch.float64)
    h, w, bias, x, b = (tensor.requires_grad_() for tensor in tensors.values())
    reference = (h.detach() + 0.1, w.detach())
    rest = dict(outputs=("logp", "entropy", "kl_pq"), reference=reference, budget_bytes=budget, backend=backend)
    apart = pu.linear_token_stats(h, w, targets, bias, adapter=(x, b), **rest)
    joined = pu.linear_token_stats(torch.cat([h, x], 1), torch.cat([w, b], 1), targets, bias, **rest)
    for name, value in apart.as_dict().items():
        torch.testing.assert_close(value, joined.as_dict()[name], atol=1e-11, rtol=1e-11)
    both = [sum(v.sum() for v in stats.as_dict().values()) for stats in (apart, joined)]
    for a, c in zip(*(torch.autograd.grad(loss, (h, w, bias, x, b)) for loss in both), strict=True):
        torch.testing.assert_close(a, c, atol=1e-11, rtol=1e-11)


def test_an_adapter_compiles():
    tensors, targets = problem(torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def loss(h, w, bias, x, b):
        return pu.linear_token_stats(h, w, targets, bias, adapter=(x, b)).logp.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_reference_in_another_dtype():
    tensors, targets = problem(torch.float32)
    h, w = tensors["hidden"], tensors["weight"]
    results = [
        pu.linear_token_stats(
            h, w, targets, outputs="kl_pq", reference=((h + 0.1).to(dtype), w.to(dtype)), budget_bytes=budget
        ).kl_pq
        for dtype, budget in itertools.product((torch.float32, torch.float64), (None, 0))
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-4)


def test_free_memory_of_a_gpu_counts_what_torch_has_cached(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert memory.free_bytes(torch.device("cuda", 0)) == 1400


def test_the_driver_of_a_gpu_is_asked_once(monkeypatch):
    """From then on torch's own counters say what is left of its share."""
    asked, taken = [], iter([300, 300, 700, 5000])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(taken))
    memory.torchs_share.cache_clear()
    device = torch.device("cuda", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: asked.append(device) or 1400)
    budgets = [memory.budget_of(device) for _ in range(3)]
    memory.torchs_share.cache_clear()
    assert budgets == [(1700 - 300) // 4, (1700 - 700) // 4, 0]
    assert asked == [device]


T = torch.zeros(2, dtype=torch.long)
ARGUMENTS = {"hidden": torch.randn(2, 8), "weight": torch.randn(9, 8), "targets": T}
BAD = [
    (dict(budget_bytes=-1), ValueError, "budget_bytes=-1: needs None or a number of bytes >= 0"),
    (dict(bias=torch.zeros(9).double()), TypeError, "bias: needs the dtype of hidden, torch.float32"),
    (dict(adapter=torch.zeros(2, 8)), TypeError, r"adapter: needs a tuple \(x, B\), got Tensor"),
    (dict(adapter=(torch.zeros(2, 3), torch.zeros(9, 4))), ValueError, r"adapter\[0\], adapter\[1\]: need shapes"),
    (dict(adapter=(torch.zeros(1, 3), torch.zeros(9, 3))), ValueError, "adapter: needs x for the rows of hidden"),
    (dict(adapter=(torch.zeros(2, 3), torch.zeros(8, 3))), ValueError, "adapter: needs .* B for V=9"),
    (
        dict(adapter=(torch.zeros(2, 3).half(), torch.zeros(9, 3))),
        TypeError,
        r"adapter\[0\]: needs the dtype of hidden",
    ),
    (
        dict(adapter=(torch.zeros(2, 3), torch.zeros(9, 3).half())),
        TypeError,
        r"adapter\[1\]: needs the dtype of hidden",
    ),
    (
        dict(adapter=(torch.zeros(2, 3, device="meta"), torch.zeros(9, 3, device="meta"))),
        ValueError,
        r"adapter\[0\]: needs the device of hidden",
    ),
    (
        dict(outputs="kl_pq", reference=(torch.randn(2, 8), torch.randn(9, 8), torch.zeros(9).half())),
        TypeError,
        r"reference\[2\]: needs the dtype of reference\[0\]",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        pu.linear_token_stats(**{**ARGUMENTS, **change})


def nearby(hidden, weight):
    """A reference 5 % away: KL is a difference of logits that all but agree."""
    return hidden, weight, ((hidden.float() + 0.05 * torch.randn(hidden.shape)).bfloat16(), weight)


def near_uniform(hidden, weight):
    """Logits of 5 +- 0.02, in bfloat16 0.03 apart at least: the gradient of entropy is made of their differences."""
    hidden[:, 0], weight[:, 1:], weight[:, 0] = 1.0, 0.02 * weight[:, 1:], 5.0
    return hidden, weight, None


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(("output", "numbers"), [("kl_pq", nearby), ("kl_qp", nearby), ("entropy", near_uniform)])
def test_what_cancels_has_the_gradient_of_float32_in_bfloat16(output, numbers, backend, budget):
    """As far from float32's on the same numbers as rounding that one to bfloat16 takes it (0.17 %), and 0.1 % more."""
    hidden, weight = torch.randn(32, 512).bfloat16(), (torch.randn(2000, 512) / 512**0.5).bfloat16()
    hidden, weight, reference = numbers(hidden, weight)
    targets = torch.zeros(32).long()

    def gradients(dtype):
        x, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        kept = None if reference is None else tuple(t.to(dtype) for t in reference)
        stats = pu.linear_token_stats(
            x, w, targets, outputs=output, reference=kept, budget_bytes=budget, backend=backend
        )
        return torch.autograd.grad(getattr(stats, output).sum(), (x, w))

    for mine, whole in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        rounding = (whole.bfloat16().float() - whole).norm()
        assert (mine.float() - whole).norm() <= rounding + 1e-3 * whole.norm()
