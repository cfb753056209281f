"""The tiny world's fixtures."""

from ..tiny import arguments, tiny  # noqa: F401 (fixtures)
