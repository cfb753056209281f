"""Blocks of a model as torch.compile makes them: one graph for all, of any lengths, each held against the blocks' own.

Between its products of matrices a block does many small things, each a walk through memory of its own; compiled, they
are few. What is compiled is a block's `forward` and its backward, where gradients are wanted: hooks stay outside, and
what reads the model without gradients, or outside of a step, meets the model's own code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .._declined import decline
from .causal_lm import CausalLM
from .forward import supervised_hidden
from .packed import WINDOWS
from .packing import Packing, tolerance_of

COMPILED = "compiled blocks"  # the optimisation, for those told that it is not used
TRIED = ((8, 56), (6, 47))  # rows and tokens of the batch that graphs are made on, and of one that they have to serve
COMMON = 5  # tokens that these rows begin with
BESIDE = 0.01  # times the largest norm: what a small gradient may be off by is told by that too
LIMIT = 64  # graphs of one kind of block: sizes of 1 have their own, and whatever else a block decides by


class Compiling:
    """Runs a model's blocks compiled, where each graph, when it was made, said the same as the block itself.

    declined: why it does not. graphs: made so far; seconds: that making and trying them took.

        compiling = Compiling()
        with compiling(model, packing):      # around forward and backward; the model is afterwards as it was
            loss(model).backward()

    The first time, graphs are made on a batch of their own, always the same, so that they do not depend on the rows
    that a training begins, or goes on, with. torch keeps what it has compiled on disk (TORCHINDUCTOR_CACHE_DIR).
    """

    def __init__(self) -> None:
        self.declined: dict[str, str] = {}
        self.graphs, self.seconds = 0, 0.0
        self._used = self._begun = False
        self._trying = False
        self._compiled: dict[type, Callable[..., Any]] = {}

    def as_dict(self) -> dict[str, Any]:
        """Whether it was of use, and why not."""
        return {"used": self._used, "declined": self.declined}

    @contextmanager
    def __call__(self, model: nn.Module | CausalLM, packing: Packing | None = None) -> Iterator[None]:
        """packing: of the rows inside, which the graphs are made for."""
        lm = CausalLM.of(model)
        if not self._begun and (reason := reason_not_to_compile(lm)) is not None:
            self._refuse(reason)
        if self.declined:
            self._begun = True
            yield
            return
        import torch._dynamo as dynamo  # takes seconds
        import torch.fx.experimental._config as tracing

        blocks = [*lm.blocks]
        settings: Any = dynamo.config, tracing  # both get their `patch` as they are imported
        limit, sizes = settings[0].patch(cache_size_limit=LIMIT), settings[1].patch(use_duck_shape=False)
        with limit, sizes:  # sizes that are equal once are not so for good
            try:
                for block in blocks:
                    vars(block)["forward"] = MethodType(self._forward_of(type(block)), block)
                if not self._begun:
                    self._begun = True
                    self._try(lm, packing)
                yield
            finally:
                for block in blocks:
                    vars(block).pop("forward", None)

    def _forward_of(self, kind: type[nn.Module]) -> Callable[..., Any]:
        """Of a block, in the place of its own."""
        own: Callable[..., Any] = kind.forward

        def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.declined or not torch.is_grad_enabled():
                return own(block, *args, **kwargs)
            if kind not in self._compiled:
                self._compiled[kind] = torch.compile(apart(own), backend=self._backend, fullgraph=True, dynamic=True)
            compiled, before, start = self._compiled[kind], self.graphs, time.perf_counter()
            try:
                found = compiled(block, *args, **kwargs)
            except Exception as error:
                if not (self._trying or from_compiler(error)):
                    raise
                self._refuse(f"{type(block).__name__} does not compile ({told(error)})")
            else:
                if self.graphs != before or self._trying:
                    made = self.graphs
                    self._refuse(reason_from_trial(block, own, compiled, args, kwargs))
                    if self.graphs != made:
                        self._refuse(f"{type(block).__name__} is compiled anew for a trial")
                    self.seconds += time.perf_counter() - start
            if self.declined:
                return own(block, *args, **kwargs)
            self._used = True
            return found

        return forward

    def _backend(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        made = compile_fx(graph, inputs, config_patches={"fallback_random": True})  # dropout draws as it does without
        self.graphs += 1
        return made

    def _try(self, lm: CausalLM, packing: Packing | None) -> None:
        """On rows of lengths of their own, through every block, as the rows of a step will go."""
        lm = CausalLM(lm.alone)  # wrappers count forwards
        for rows, tokens in TRIED:
            batch, made = make_batch(lm, rows, tokens), self.graphs
            like = None if packing is None else Packing(packing.share)
            self._trying = not made
            try:
                with random_kept(lm.device), torch.enable_grad(), like or nullcontext():
                    if like is None or not like.hidden(lm, {"": batch}, {"": "supervised"}):
                        supervised_hidden(lm, batch)
            finally:
                self._used = self._trying = False
            if made and self.graphs != made:
                self._refuse(f"{lm.name} needs a graph for each length of rows")
            if self.declined:
                return

    def _refuse(self, reason: str | None) -> None:
        if reason is not None:
            self.declined[COMPILED] = decline(COMPILED, reason)


def reason_not_to_compile(lm: CausalLM) -> str | None:
    """Why the blocks are not compiled, as far as that can be told without trying."""
    if lm.sharded or (lm.wrapped and not isinstance(lm.called, nn.parallel.DistributedDataParallel)):
        return "sharded weights are gathered around each block's own forward"
    if any(each._compiled_call_impl is not None or "_orig_mod" in each._modules for each in lm.given.modules()):
        return f"{lm.name} is compiled already, in whole or in part"
    try:
        blocks = [*lm.blocks]
    except TypeError as error:
        return str(error)
    if any("forward" in vars(block) for block in blocks):
        return f"the blocks of {lm.name} have been given other forwards"
    if any(reentrant(block) for block in blocks):
        return "gradient checkpointing with use_reentrant=True runs blocks without gradients first"
    return None


def reentrant(block: nn.Module) -> bool:
    """Whether its activations are computed again by torch's older checkpoints."""
    options = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(getattr(block, "gradient_checkpointing", False) and options.get("use_reentrant", False))


def make_batch(lm: CausalLM, rows: int, tokens: int) -> dict[str, Tensor]:
    """Rows that begin with the same COMMON tokens, padded, of `tokens` at most, all that the model takes as one."""
    limits = [lm.context_length, *(getattr(lm.config, name, None) for name in WINDOWS)]
    longest = min([tokens, *(limit for limit in limits if limit)])
    row, place = torch.arange(rows)[:, None], torch.arange(longest)[None]
    ids = 3 + place + (place >= COMMON) * (row + 1) * (longest + 1)
    lengths = longest - row % max(1, longest - COMMON - 1)
    mask = (place < lengths).long()
    ids = ids % lm.vocab_size * mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: value.to(lm.device) for name, value in batch.items()}


def reason_from_trial(
    block: nn.Module,
    own: Callable[..., Any],
    compiled: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str | None:
    """Why a block is not run compiled, by trying both ways, forward and backward; None: they say the same."""
    name = type(block).__name__
    try:
        expected = states_and_gradients(block, own, args, kwargs)
        found = states_and_gradients(block, compiled, args, kwargs)
    except Exception as error:  # in ways of their own
        return f"{name} does not compile ({told(error)})"
    for what, ours, theirs in zip(("hidden states", "gradients", "gradients"), found, expected, strict=True):
        if not agree(ours, theirs):
            return f"the {what} of {name} are others"
    return None


def states_and_gradients(
    block: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What leaves the block; of a sum in which each number has another weight, gradients of inputs and of weights."""
    from torch.utils import _pytree as pytree

    leaves, form = pytree.tree_flatten((args, dict(kwargs)))
    inputs: list[Tensor] = []
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.requires_grad:
            inputs.append(leaf := x.detach().requires_grad_())
            leaves[i] = leaf if x._base is None else leaf.view_as(leaf)  # a graph is of views, or of none
    weights = [weight for weight in block.parameters() if weight.requires_grad]
    args, kwargs = pytree.tree_unflatten(leaves, form)
    plain = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)  # not those of who runs the block
    with random_kept(next(block.parameters()).device), plain:
        states = [x for x in pytree.tree_leaves(forward(block, *args, **kwargs)) if isinstance(x, Tensor)]
        states = [x for x in states if x.requires_grad]
        total = sum((x * torch.linspace(1, 64, x.numel(), device=x.device).cos().view_as(x)).sum() for x in states)
        wanted = inputs + weights
        gradients = torch.autograd.grad(total, wanted, allow_unused=True) if wanted else ()  # type: ignore[arg-type]
    known = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, gradients, strict=True)]
    return [x.detach() for x in states], known[: len(inputs)], known[len(inputs) :]


def agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Each as far as the dtype that it was computed in can tell; one that is nothing but rounding beside the others,
    as a bias of keys has, as far as they can."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return False
    norms = [float(x.double().norm()) for x in expected]
    beside = BESIDE * max(norms, default=0.0)
    return all(
        float((ours.double() - theirs.double()).norm()) <= tolerance_of(ours) * (norm + beside)
        for ours, theirs, norm in zip(found, expected, norms, strict=True)
    )


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, for which graphs are kept apart from those that others have made of it."""
    if not isinstance(function, FunctionType):
        return function
    code = function.__code__.replace()
    copied = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def random_kept(device: torch.device) -> Any:
    """A context in which what is drawn at random has not been drawn afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def from_compiler(error: Exception) -> bool:
    """Whether it says that something cannot be compiled, or not once more, and not what went wrong in a run of it."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def told(error: Exception) -> str:
    """Its kind, and what it says first."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])
