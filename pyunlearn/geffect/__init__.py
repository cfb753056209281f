"""The gradient effect (G-effect): dot products of gradients, streamed, in total, per layer and per sample."""

from .effect import GEffect, g_effect
from .pointwise import PointwiseGEffect, gradient_of, pointwise_g_effect

__all__ = ["GEffect", "PointwiseGEffect", "g_effect", "gradient_of", "pointwise_g_effect"]
