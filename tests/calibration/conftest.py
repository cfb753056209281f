"""The tiny world's fixtures."""

from ..tiny import arguments, tiny, tiny_config, tiny_settings  # noqa: F401 (fixtures)
