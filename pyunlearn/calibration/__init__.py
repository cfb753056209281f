"""What is made of a model before and after unlearning, without training: mixtures of the two, and hybrids by layer.

`uwc` calibrates how much of the unlearning a model keeps (Wang et al., 2025), `cru` which of its layers (the tutorial's
component-wise replacement). Both take the two models' tensors from files, one at a time (`model.tensors`): the one
model in memory is what comes out. `reliability` tells by which metrics such models can be compared: attacks, and
correlations.
"""

from ..model.tensors import Tensors, stored, write_tensors
from .cru import choose_count, components, influence_order
from .reliability import Correlation, noised, pearson, prefixed, read_at
from .uwc import Search, blend, mix, scale_adapter, search

__all__ = [
    "Correlation",
    "Search",
    "Tensors",
    "blend",
    "choose_count",
    "components",
    "influence_order",
    "mix",
    "noised",
    "pearson",
    "prefixed",
    "read_at",
    "scale_adapter",
    "search",
    "stored",
    "write_tensors",
]
