import pytest
import torch

from pyunlearn import _C


@pytest.fixture(params=["auto", "avx2", "portable"])
def instruction_set(request):
    """Each code path this CPU can run; on one without AVX2 the name is refused, and the best path runs again."""
    try:
        yield _C.choose_instruction_set(request.param)
    except ValueError:
        yield _C.choose_instruction_set("auto")
    finally:
        _C.choose_instruction_set("auto")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
