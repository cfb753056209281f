"""A run of tiny shapes on the CPU, by part. Times mean nothing here."""

import pytest

from benchmarks.kernels.run import Session


@pytest.fixture
def session(tmp_path):
    return lambda part, seconds=60.0: Session(part, "cpu", tmp_path, seconds, small=True)
