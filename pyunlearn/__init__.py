"""pyunlearn: kernels and runs for LLM unlearning.

    import pyunlearn as pu

    stats = pu.token_stats_of(model, batch, outputs=("logp", "entropy"))  # of logits: token_stats
    loss = pu.objectives.wga(stats.logp, stats.mask)

Whole runs: `pu.UnlearnTrainer`, `pu.ReferenceCache`, or the command `pyunlearn run`. In trainers of others:
`pyunlearn.integrations`. Each name is imported, and torch with it, when it is first asked for; `import pyunlearn.ops`
registers the operators, for programs that were exported with them.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import objectives, ops
    from .geffect import g_effect, pointwise_g_effect
    from .model.cache import ReferenceCache
    from .model.stats import token_stats_of
    from .mrd import MRDResult, mrd
    from .ops import (
        OuterSum,
        TokenStats,
        gaussian_noise,
        ghost_dot,
        linear_token_stats,
        linear_value_and_grad,
        perturbed,
        token_stats,
        value_and_grad,
    )
    from .ops.segment_dot import segment_dot
    from .training.trainer import UnlearnTrainer

__version__ = "0.1.0"
__all__ = [
    "MRDResult",
    "OuterSum",
    "ReferenceCache",
    "TokenStats",
    "UnlearnTrainer",
    "g_effect",
    "gaussian_noise",
    "ghost_dot",
    "linear_token_stats",
    "linear_value_and_grad",
    "mrd",
    "objectives",
    "ops",
    "perturbed",
    "pointwise_g_effect",
    "segment_dot",
    "token_stats",
    "token_stats_of",
    "value_and_grad",
]

# Where names are from that are not those of modules, or from ops.
_FROM = {
    "MRDResult": ".mrd",
    "ReferenceCache": ".model.cache",
    "UnlearnTrainer": ".training.trainer",
    "g_effect": ".geffect",
    "pointwise_g_effect": ".geffect",
    "token_stats_of": ".model.stats",
}


def __getattr__(name: str) -> Any:
    if name in ("objectives", "ops"):
        return import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module 'pyunlearn' has no attribute {name!r}")
    value = getattr(import_module(_FROM.get(name, ".ops"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`mrd` is the function, also where the module of that name has been imported, which would take its place."""

    @property
    def mrd(self) -> Any:
        return vars(self).get("mrd") or import_module(".mrd", __name__).mrd

    @mrd.setter
    def mrd(self, value: Any) -> None:
        if not isinstance(value, ModuleType):
            vars(self)["mrd"] = value

    @mrd.deleter
    def mrd(self) -> None:
        vars(self).pop("mrd", None)


sys.modules[__name__].__class__ = _Package
