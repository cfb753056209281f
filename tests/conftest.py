import gc
import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

# how long an example takes says what else the machine does
settings.register_profile("pyunlearn", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pyunlearn")

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never reach for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # looked at when triton is first imported, which importing torch does not do

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started by `&` in a script: tests of Ctrl-C need Python's own
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory):
    """What evaluations keep between runs."""
    os.environ["PYUNLEARN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def imports_need_no_collection():
    """A training collects garbage: over all that the libraries have made at import, that took longer than its steps."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """What takes minutes comes first, so that no worker is left alone with it."""
    items.sort(key=lambda item: item.path.name != "test_install.py")
