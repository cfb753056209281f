"""Of this folder: a model of each kind of head with a batch, a small model with rows, and a cache's path."""

import pytest

from ..tiny import tiny
from . import small, variants

__all__ = ["tiny"]


@pytest.fixture(scope="module", params=sorted(variants.MODELS))
def variant(request):
    return variants.make(request.param)


@pytest.fixture(scope="module")
def llama():
    return variants.make("llama")


@pytest.fixture
def batch():
    return variants.make_batch()


@pytest.fixture(scope="module")
def model():
    return small.make()


@pytest.fixture(scope="module")
def rows():
    return small.make_rows()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "reference.safetensors"
