"""What else happens to the weights of a model while `perturbed` holds them: refused beforehand, or found and undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..distributed import local
from .parameters import Weight, changed, point


class Guard:
    """Over the parameters of `weights`, from its making until `release`.

    state_dict, load_state_dict, copies and pickles of a module that holds one of them raise RuntimeError. What cannot
    be refused shows afterwards: writes by the parameters' versions, conversions (`.half()`, `.to(device)`) by where
    their memory is, and other parameters in their places. Writes through `.data` have no version, and do not show.
    """

    def __init__(self, model: nn.Module, weights: Sequence[Weight]):
        self.weights = weights
        weight_of = {id(p): weight for weight in weights for p in weight.parameters}
        self.places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.hooks: list[Any] = [register_optimizer_step_post_hook(self.stepped)]
        refusal = Refusal()
        for module in model.modules():
            held = [(module, key, p) for key, p in module._parameters.items() if p is not None and id(p) in weight_of]
            if held:
                self.hooks.append(module.register_state_dict_pre_hook(refusal))
                self.hooks.append(module.register_load_state_dict_pre_hook(refusal))
            # FSDP itself puts others in the places of sharded ones
            self.places += [place for place in held if not weight_of[id(place[2])].sharded]
        self.look()

    def stepped(self, optimizer: Optimizer, *_: Any) -> None:
        """Counts as a write: fused kernels change no version."""
        moved = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        changed([weight for weight in self.weights if any(id(p) in moved for p in weight.parameters)])

    def look(self) -> None:
        """From now on the parameters as they are count as untouched."""
        self.known = [(weight.name, p, seen(p)) for weight in self.weights for p in weight.parameters]

    def touched(self) -> dict[str, bool]:
        """The names of weights that are not as they were at the last look: whether they were written to."""
        ousted = {id(p) for module, key, p in self.places if module._parameters.get(key) is not p}
        names: dict[str, bool] = {}
        for name, p, was in self.known:
            now = seen(p)
            if id(p) in ousted or now != was:
                names[name] = names.get(name, False) or now[0] != was[0]
        return names

    def put_back(self) -> None:
        """The parameters in their places, and each on the memory it had."""
        point([(p, weight.local) for weight in self.weights if not weight.sharded for p in weight.parameters])
        for module, key, p in self.places:
            module._parameters[key] = p

    def release(self) -> None:
        for hook in self.hooks:
            hook.remove()


def seen(parameter: nn.Parameter) -> tuple[Any, ...]:
    """What changes with a write, a conversion and another memory."""
    memory = local(parameter)
    version = None if parameter.is_inference() else parameter._version
    return version, memory.device, memory.dtype, memory.data_ptr(), memory.shape, memory.stride()


class Uncopied:
    """No copy and no pickle of it is made, nor of a module that has it, or a method of it, for a hook."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse()


class Refusal(Uncopied):
    def __call__(self, *_: Any) -> NoReturn:
        refuse()


def refuse() -> NoReturn:
    raise RuntimeError("perturbed: needs its block to be left before the model's weights are saved, loaded or copied")
