"""The tiny world's fixtures, and the processes' end."""

import pytest

from ..tiny import arguments, tiny  # noqa: F401 (fixtures)
from .launch import stop_all


@pytest.fixture(scope="session", autouse=True)
def processes_end():
    yield
    stop_all()
