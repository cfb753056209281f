"""Imports among the benchmarks run one way: studies beside scale, both on kernels and on what all share."""

from __future__ import annotations

from ..test_arrows import circles, imports_in

LEVEL = {"__main__": 0, "studies": 1, "scale": 1, "kernels": 2, "measure": 3, "results": 3, "shapes": 3}
IMPORTS = [
    (each.importer, each.module)
    for each in imports_in("benchmarks")
    if each.importer != "benchmarks" and each.module.startswith("benchmarks.")
]


def test_no_circles():
    assert len(IMPORTS) > 60
    assert not circles(IMPORTS)


def test_arrows():
    for importer, module in IMPORTS:
        above, below = (name.split(".")[1] for name in (importer, module))
        assert above == below or LEVEL[above] < LEVEL[below], f"{importer} imports {module}"
