from dataclasses import replace

import pytest

from pyunlearn.objectives import registry


@pytest.fixture
def own_registry():
    """What a test registers is gone after it."""
    definitions = {name: replace(each, variants=dict(each.variants)) for name, each in registry.DEFINITIONS.items()}
    functions = dict(registry._PUBLIC)
    yield
    for dictionary, before in ((registry.DEFINITIONS, definitions), (registry._PUBLIC, functions)):
        dictionary.clear()
        dictionary.update(before)
    for name in definitions:
        registry._document(name)
