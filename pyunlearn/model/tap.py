"""One forward with its hidden states tapped: what enters the LM head, and what enters blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..distributed import is_sharded, whole
from .causal_lm import CausalLM


class Tap:
    """Keeps the hidden states that leave the layers `numbers` of one forward, and those that the head would get.

    last: the deepest that is wanted, where the forward may end; None: the head's input, for which the head then gets no
    rows. Raises RuntimeError for a model that is compiled together with a module that has to be watched.
    """

    def __init__(self, lm: CausalLM, numbers: Collection[int], last: int | None = None):
        self.lm = lm
        depth = lm.depth if numbers else 0  # without layers to tell it from, the head's input needs no number
        self.end, self.last = depth, depth if last is None else last
        # DDP, FSDP and the like have to see the end of a forward.
        self.stops = self.last < depth and not lm.wrapped and not lm.sharded
        # What enters the next block, not what leaves this one: there reentrant checkpointing has cut the graph.
        self.following = {number: lm.blocks[number] for number in numbers if number < depth}
        self.states: dict[int, Tensor] = {}
        self.head_calls = 0
        self.output: Any = None
        check_compiled(lm, list(self.following.values()))

    def run(self, inputs: Mapping[str, Any]) -> None:
        """Calls the model, wrappers included. Raises RuntimeError if it does not call its head exactly once."""
        hooks = [self.lm.head_layer.register_forward_pre_hook(self._before_head)]
        for number, block in self.following.items():
            hooks.append(block.register_forward_pre_hook(partial(self._before_block, number), with_kwargs=True))
        try:
            self.output = self.lm.called(**inputs, use_cache=False)
        except Reached:
            return
        finally:
            for hook in hooks:
                hook.remove()
        if self.head_calls != 1:
            raise RuntimeError(
                f"{type(self.lm.given).__name__}: its head was called {self.head_calls} times in a forward, needs once "
                "(of DataParallel's threads each calls it: use one process a GPU)"
            )

    def at(self, number: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(N, H): the states of layer `number` at `rows` of the flattened batch, whose input_ids have `shape`."""
        hidden = whole(self.states[number])
        if hidden.shape[:2] != shape:
            raise ValueError(
                f"{type(self.lm.given).__name__}: hidden states {tuple(hidden.shape)} for input_ids {tuple(shape)}; "
                "needs one position a token (prompt-learning adapters add positions and are not supported)"
            )
        hidden = hidden.reshape(-1, hidden.size(-1)).index_select(0, rows.to(hidden.device))
        # FSDP's backward sets out from the model's outputs, DDP's waits for every parameter: hang the outputs, of no
        # elements, on what is used.
        if self.lm.sharded or (self.lm.wrapped and self.last < self.end):
            hidden = hidden + self.output.logits.sum()
        return hidden

    def _before_head(self, head: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        self.head_calls += 1
        self.states[self.end] = args[0]
        few = 1 if is_sharded(getattr(head, "weight", None)) else 0  # DTensors fail on none
        return (args[0][:, :few],)

    def _before_block(self, number: int, block: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        self.states[number] = args[0] if args else kwargs["hidden_states"]
        if self.stops and number == self.last:
            raise Reached


class Reached(Exception):
    """The deepest layer that is wanted has been reached."""


def check_compiled(lm: CausalLM, blocks: list[nn.Module]) -> None:
    """Raises RuntimeError where the head or a block is part of a compiled module.

    Its graph either lacks the hook or, made now, would keep it for good.
    """
    watched = [lm.head_layer, *blocks]
    for module in lm.called.modules():
        compiled = module._compiled_call_impl is not None or "_orig_mod" in module._modules
        if compiled and any(each in module.modules() for each in watched):
            raise RuntimeError(
                f"{type(module).__name__}: is compiled together with its head"
                + (" or a layer whose hidden states are wanted" if blocks else "")
                + "; compile the decoder instead (model.get_decoder().compile())"
            )
