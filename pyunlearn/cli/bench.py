"""`pyunlearn bench`."""

from __future__ import annotations

import typer

from .shared import clean_errors


def bench(context: typer.Context) -> None:
    """Time the kernels against eager PyTorch and the peers that are installed, on this machine: pyunlearn bench -h."""
    with clean_errors(debug=False):
        try:
            from ..benchmarks.__main__ import main

            status = main(context.args, "pyunlearn bench")
        except ModuleNotFoundError as error:
            raise ImportError(f"needs {error.name}, which is not installed: pip install 'pyunlearn[bench]'") from None
        raise typer.Exit(status)
