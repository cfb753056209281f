import doctest
import os
import signal
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyunlearn as pu
from benchmarks.measure import peak_bytes
from pyunlearn.ops import modes, noise, parameters, perturbation

IN_MEMORY = ("overlay", "copy", "snap")  # modes whose parameters hold the perturbed weights inside the whole block
EVERY = (*IN_MEMORY, "streamed")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x + self.linear(self.norm(x)) * self.scale


class Model(nn.Module):
    """Tied embedding and head, a parameter of the root, frozen and strided ones, a buffer."""

    def __init__(self, width=17, vocabulary=23):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(5, width))
        self.layers = nn.ModuleList([Block(width) for _ in range(3)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.randn(width))
        self.layers[1].linear.weight.data = torch.randn(width, width).t()  # not contiguous
        self.layers[2].requires_grad_(False)

    def forward(self, ids):
        x = self.embedding(ids) + self.position + self.offset
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.arange(10).view(2, 5)


def make(dtype=torch.float32, bfloat16_numbers=False, seed=0):
    torch.manual_seed(seed)
    model = Model()
    if bfloat16_numbers:
        for p in model.parameters():
            p.data.copy_(p.data.bfloat16())
    return model.to(dtype)


def bits(tensor):
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(whole[tensor.element_size()]).clone()


def state(model):
    """All that has to be as it was."""
    return {
        name: (bits(p), p.data_ptr(), p.dtype, p.stride(), p.requires_grad, p.shape)
        for name, p in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    }


def assert_restored(model, before):
    after = state(model)
    assert after.keys() == before.keys()
    for name, (was, *rest) in before.items():
        assert torch.equal(after[name][0], was), name
        assert list(after[name][1:]) == rest, name


def perturbed_weight(name, w, sigma, seed, draw, sign=1):
    wide = torch.promote_types(w.dtype, torch.float32)
    z = pu.gaussian_noise(w.numel(), seed=seed, draw=draw, name=name).view(w.shape).to(wide)
    return w.detach().to(wide) + z * (sign * sigma)


# ---- what is seen inside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", IN_MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_are_w_plus_sigma_z(mode, dtype):
    """By element, name and draw; tied ones once, frozen ones too, strided ones in logical order, buffers never."""
    if mode == "snap" and dtype != torch.float32:
        pytest.skip("snap is for float32")
    model = make(dtype, bfloat16_numbers=mode == "snap")
    before, clean = state(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    with pu.perturbed(model, sigma=1e-2, seed=3, draw=5, mode=mode) as it:
        assert it.mode == mode
        for draw, sign in ((5, 1), (6, 1), (6, -1), (2**32 - 1, 1), (5, 1)):
            it.to(draw, sign)
            for name, p in model.named_parameters():
                expected = perturbed_weight(name, clean[name], 1e-2, 3, draw, sign)
                assert p.dtype == (dtype if mode == "copy" else expected.dtype)
                assert torch.equal(p, expected.to(p.dtype)), (name, draw, sign)
        assert model.head.weight is model.embedding.weight
        it.to(None)
        for name, p in model.named_parameters():
            assert torch.equal(p, clean[name].to(p.dtype))
        assert torch.equal(bits(model.offset), before["offset"][0])
    assert_restored(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mode_gives_the_same_forward(dtype):
    """In float32 to the last bit, streamed too; the baseline as well."""
    model = make(dtype, bfloat16_numbers=True)
    before, results = state(model), {}
    for mode in EVERY if dtype == torch.float32 else ("overlay", "streamed"):
        with torch.no_grad(), pu.perturbed(model, sigma=1e-2, draw=None, mode=mode) as it:
            outputs = [model(IDS)]
            for draw in (0, 1, 0):
                it.to(draw)
                outputs.append(model(IDS))
        results[mode] = outputs
        assert_restored(model, before)
    for outputs in results.values():
        assert all(map(torch.equal, outputs, results["overlay"]))
        assert all(output.dtype == torch.float32 for output in outputs)
        assert not torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[1], outputs[3])


def test_eager_backend_agrees():
    model = make(bfloat16_numbers=True)
    for mode in EVERY:
        outputs = []
        for backend in ("cpu", "eager"):
            with torch.no_grad(), pu.perturbed(model, sigma=1e-2, mode=mode, backend=backend) as it:
                it.to(3)
                outputs.append(model(IDS))
        torch.testing.assert_close(*outputs, atol=2e-6, rtol=2e-6)


def test_wrappers_change_nothing():
    model = make()
    with torch.no_grad(), pu.perturbed(model, sigma=1e-2):
        expected = model(IDS)
    for wrapped in (
        torch.compile(model, backend="eager"),
        nn.DataParallel(model),
        nn.DataParallel(torch.compile(model)),
    ):
        with torch.no_grad(), pu.perturbed(wrapped, sigma=1e-2) as it:
            assert [weight.name for weight in it.weights] == [name for name, _ in model.named_parameters()]
            assert torch.equal(model(IDS), expected)


def test_memory_shared_by_two_parameters_is_perturbed_once():
    """Tied by their data, not as one object."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight.data = model["a"].weight.data
    before = state(model)
    for mode in ("overlay", "copy"):
        with pu.perturbed(model, sigma=0.1, mode=mode):
            assert model["a"].weight.data_ptr() == model["b"].weight.data_ptr()
            assert not torch.equal(bits(model["b"].weight), before["b.weight"][0])
        assert_restored(model, before)


def test_names_choose_parameters():
    model = make()
    clean = {name: p.detach().clone() for name, p in model.named_parameters()}
    for asked, moved in (
        (["head.weight", "position"], {"embedding.weight", "position"}),  # the tied one has its first name
        ([name for name, p in model.named_parameters() if p.requires_grad], None),
        ([], set()),
    ):
        moved = set(asked) if moved is None else moved
        with pu.perturbed(model, sigma=0.1, parameters=asked):
            for name, p in model.named_parameters():
                expected = perturbed_weight(name, clean[name], 0.1, 0, 0) if name in moved else clean[name]
                assert torch.equal(p, expected), name


# ---- and after -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", EVERY)
def test_two_hundred_draws_leave_no_trace(mode):
    model = make(bfloat16_numbers=True)
    before = state(model)
    with torch.no_grad(), pu.perturbed(model, sigma=1e-5, mode=mode) as it:
        for draw in range(200):
            it.to(draw, 1 - 2 * (draw % 2))
        chained = model(IDS)
    assert_restored(model, before)
    with torch.no_grad(), pu.perturbed(model, sigma=1e-5, draw=199, sign=-1, mode=mode):
        assert torch.equal(model(IDS), chained)  # history plays no part
    assert_restored(model, before)


@pytest.mark.parametrize("mode", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_weights_come_back_bitwise(mode, dtype):
    """NaN with its payload, infinities, both zeros, the smallest and the largest numbers."""
    if mode == "snap" and dtype == torch.bfloat16:
        pytest.skip("snap is for float32")
    layer = nn.Linear(256, 256, bias=False)
    patterns = torch.arange(65536, dtype=torch.int32) << 16  # every bfloat16 number there is
    layer.weight.data = patterns.view(torch.float32).view(256, 256).to(dtype)
    before = state(layer)
    for sigma in (1e-5, 1.0, 1e30, 1e-37):
        with torch.no_grad(), pu.perturbed(layer, sigma=sigma, mode=mode) as it:
            for draw in range(3):
                it.to(draw)
        assert_restored(layer, before)


@settings(max_examples=80, deadline=None)
@given(
    scale=st.floats(-12, 3), sigma=st.floats(-8, 2), draws=st.lists(st.integers(0, 2**32 - 1), max_size=4),
    numel=st.integers(1, 400), seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_snap_is_exact_at_any_scale(scale, sigma, draws, numel, seed):
    """Weights of 10^scale, noise of 10^sigma: also where many of them have to be kept aside."""
    w = (torch.randn(numel, generator=torch.Generator().manual_seed(seed % 2**31)) * 10**scale).bfloat16().float()
    holder = nn.ParameterDict({"w": nn.Parameter(w.clone())})
    with pu.perturbed(holder, sigma=10**sigma, seed=seed, mode="snap") as it:
        for draw in draws:
            it.to(draw)
            assert torch.equal(holder["w"], perturbed_weight("w", w, 10**sigma, seed, draw))
    assert torch.equal(bits(holder["w"]), bits(w))


def test_few_weights_are_kept_aside():
    """Weights like those of a model: less than one in a million needs it."""
    w = (torch.randn(1 << 21) * 0.02).bfloat16().float()
    w[:1000] = 0
    assert modes.lost_by_rounding(w, 1e-5).numel() <= 2
    assert modes.lost_by_rounding(-w[:1000], 1e-5).tolist() == list(range(1000))  # -0


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


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


class InterruptAt:
    """Sends SIGINT at the n-th bytecode instruction of these modules' code and the block's, by tracing."""

    FILES = tuple(module.__file__ for module in (perturbation, modes, parameters, noise))

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


# ---- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["overlay", "copy"])
def test_gradients_are_those_of_the_perturbed_weights(mode):
    model = make()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pu.perturbed(model, sigma=0.1, mode=mode):
        grads = torch.autograd.grad(model(IDS).square().mean(), parameters)
        moved = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = make()
    other.load_state_dict(moved, strict=False)
    expected = torch.autograd.grad(other(IDS).square().mean(), [p for p in other.parameters() if p.requires_grad])
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("mode", IN_MEMORY)
def test_a_graph_does_not_outlive_its_weights(mode):
    """No silent gradient of other weights than those of the forward."""
    model = make(bfloat16_numbers=True)
    loss = model(IDS).square().mean()
    with pu.perturbed(model, mode=mode) as it:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        loss = model(IDS).square().mean()
        it.to(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        loss = model(IDS).square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(IDS).square().mean().backward()


def test_inference_tensors():
    with torch.inference_mode():
        model = make()
        before = state(model)
        with pu.perturbed(model, sigma=0.1):
            assert not torch.equal(bits(model.position), before["position"][0])
        assert_restored(model, before)


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_auto(monkeypatch):
    def mode_of(model):
        with torch.no_grad(), pu.perturbed(model) as it:
            return it.mode

    numbers, whole, half = make(bfloat16_numbers=True), make(), make(torch.bfloat16)
    assert [mode_of(model) for model in (numbers, whole, half)] == ["overlay"] * 3
    size = sum(p.numel() + -p.numel() % 16 for p in whole.parameters()) * 4
    monkeypatch.setattr(modes, "free_bytes", lambda device: 2 * size)
    assert mode_of(whole) == "overlay"
    monkeypatch.setattr(modes, "free_bytes", lambda device: 2 * size - 1)
    assert [mode_of(model) for model in (numbers, whole, half)] == ["snap", "streamed", "streamed"]
    numbers.position.data.mul_(-0.0)  # too many to keep aside
    assert mode_of(numbers) == "streamed"


def test_streamed_holds_one_layer():
    """Its scratch is as large as the largest unit, and what the root itself holds; overlay's as the whole model."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(64, 256))
            self.first = nn.Linear(256, 128, bias=False)
            self.layers = nn.ModuleList([nn.Linear(256, 256, bias=False) for _ in range(6)])

        def forward(self, x):
            self.first(x)
            for layer in self.layers:
                x = layer(x + self.position[0])
            return x

    model, x = Deep().bfloat16(), torch.ones(1, 256)

    def call(mode):
        with torch.no_grad(), pu.perturbed(model, mode=mode):
            return model(x)

    root, layer = 4 * 64 * 256, 4 * 256 * 256
    streamed, overlay = peak_bytes(lambda: call("streamed"), "cpu"), peak_bytes(lambda: call("overlay"), "cpu")
    assert root + layer <= streamed < 1.05 * (root + layer)
    assert root + layer // 2 + 6 * layer <= overlay


def test_streamed_says_where_it_cannot_serve():
    model = make()
    before = state(model)
    with pu.perturbed(model, mode="streamed"):
        with pytest.raises(RuntimeError, match=r"needs torch.no_grad\(\)"):
            model(IDS)
        with torch.no_grad(), pytest.raises(RuntimeError):  # a weight outside of its module's forward is empty
            nn.functional.linear(torch.ones(1, 17), model.head.weight)
    assert_restored(model, before)

    class Caller(Block):
        def forward(self, x):
            return self.other[0](x)

    model.layers[0].__class__ = Caller
    model.layers[0].other = [model.layers[1]]  # a list hides it from nn.Module
    with torch.no_grad(), pu.perturbed(model, mode="streamed"):
        with pytest.raises(RuntimeError, match="a layer called by another one \\(Block inside Caller\\)"):
            model(IDS)
        model.layers[0].other = [nn.Identity()]
        model(IDS)
    assert_restored(model, before)


def test_resident_shows_a_weight_outside_of_a_forward():
    model = make()
    with pu.perturbed(model, sigma=0.1):
        expected = model.embedding.weight.detach().clone()
    with torch.no_grad(), pu.perturbed(model, sigma=0.1, mode="streamed") as it:
        with it.resident(model.head):
            assert torch.equal(model.head.weight, expected)
        assert model.head.weight.numel() == 0
        with pytest.raises(ValueError, match="resident: Linear is not streamed as one module"):
            it.resident(model.layers[0].linear).__enter__()
    with pu.perturbed(model, sigma=0.1) as it, it.resident(model.head):
        assert torch.equal(model.head.weight, expected)


def test_streamed_layers_in_lists_of_lists():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.groups = nn.ModuleList([nn.ModuleList([nn.Linear(3, 3)]), nn.ModuleDict({"a": nn.Linear(3, 3)})])

        def forward(self, x):
            return self.groups[1]["a"](self.groups[0][0](x))

    model, x = Nested(), torch.ones(2, 3)
    with torch.no_grad():
        with pu.perturbed(model, sigma=0.1):
            expected = model(x)
        with pu.perturbed(model, sigma=0.1, mode="streamed"):
            assert torch.equal(model(x), expected)


# ---- shards ----------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_runs_of_a_box(data):
    whole = data.draw(st.lists(st.integers(1, 6), max_size=4))
    offset = [data.draw(st.integers(0, n - 1)) for n in whole]
    shape = [data.draw(st.integers(1, n - o)) for n, o in zip(whole, offset, strict=True)]
    starts, length = parameters.runs(whole, shape, offset)
    elements = torch.arange(max(1, torch.Size(whole).numel())).view(whole)
    for d, (o, n) in enumerate(zip(offset, shape, strict=True)):
        elements = elements.narrow(d, o, n)
    assert torch.equal((starts[:, None] + torch.arange(length)).flatten(), elements.flatten())


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sigma=0), "sigma=0: needs a finite number > 0"),
        (dict(sigma=-1e-5), "sigma=-1e-05"),
        (dict(sigma=float("nan")), "sigma=nan"),
        (dict(sigma=float("inf")), "sigma=inf"),
        (dict(sigma=1e-46), "sigma=1e-46"),
        (dict(sigma=1e38), "sigma=1e\\+38"),
        (dict(seed=-1), "seed=-1: needs 0 <= seed < 2\\^64"),
        (dict(seed=2**64), "seed="),
        (dict(draw=2**32), "draw=4294967296: needs 0 <= draw < 2\\^32"),
        (dict(draw=-1), "draw=-1"),
        (dict(sign=0), "sign=0: needs \\+1 or -1"),
        (dict(mode="inplace"), "mode='inplace': needs one of"),
        (dict(mode="snap"), "mode='snap': needs float32 parameters that hold bfloat16 numbers; 'position'"),
        (dict(parameters=["position", "nobody"]), "parameters: the model has none of the name 'nobody'"),
        (dict(backend="gpu"), "backend='gpu'"),
    ],
)
def test_bad_arguments(options, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message), pu.perturbed(model, **options):
        pass
    assert_restored(model, before)


def test_bad_models():
    integers = nn.ParameterDict({"a": nn.Parameter(torch.ones(2)), "q": nn.Parameter(torch.ones(2).int(), False)})
    with pytest.raises(TypeError, match=r"q: needs bfloat16, float16, float32 or float64, got torch\.int32"):
        pu.perturbed(integers).__enter__()
    with pu.perturbed(integers, sigma=1.0, parameters=["a"]):
        assert integers["q"].tolist() == [1, 1]
        assert integers["a"].tolist() != [1, 1]
    with pytest.raises(ValueError, match="weight: needs loaded weights, is on the meta device"):
        pu.perturbed(nn.Linear(2, 2, device="meta")).__enter__()
    with pytest.raises(TypeError, match="parameters='weight': needs a collection"):
        pu.perturbed(nn.Linear(2, 2), parameters="weight").__enter__()


def test_names_with_one_id():
    """CRC-32 of "plumless" is that of "buckeroo"."""
    assert noise.parameter_id("plumless") == noise.parameter_id("buckeroo")
    model = nn.ParameterDict({"plumless": torch.ones(2), "buckeroo": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'(plumless|buckeroo)' and '(plumless|buckeroo)': their names have one"):
        pu.perturbed(model).__enter__()
    with pu.perturbed(model, parameters=["plumless"]):
        pass


def test_use_outside_of_the_block():
    it = pu.perturbed(make())
    with pytest.raises(RuntimeError, match="needs to be called inside the with block"):
        it.to(1)
    with it, pytest.raises(RuntimeError, match="is entered already"):
        it.__enter__()
    with it:  # again, after it was left
        it.to(3)


def test_docstring_example():
    names = {"torch": torch, "nn": nn, "gaussian_noise": pu.gaussian_noise}
    result = doctest.testmod(perturbation, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


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
