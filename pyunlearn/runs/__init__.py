"""Whole runs: configuration, trainer, the main job, and its report."""

from .config import ConfigError, RunConfig, load_config

__all__ = ["ConfigError", "RunConfig", "load_config"]
