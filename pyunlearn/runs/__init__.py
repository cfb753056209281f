"""Whole runs: configuration, the jobs of the commands, and their folders."""

from .config import ConfigError, RunConfig
from .overrides import load_config

__all__ = ["ConfigError", "RunConfig", "load_config"]
