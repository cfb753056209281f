"""Why MRD needs IEEE float32: Algorithm 1 against sigma, in float64, float32, TF32 and bfloat16. Draws a figure.

    python -m benchmarks.studies.mrd.precision [--run runs/demo]

The model is the embedded demo's, memorised (`pyunlearn score` leaves it in runs/demo), scored on 8 of its samples. Each
point is the mean over samples and draws of |S|; the truth grows in proportion to sigma. TF32 is emulated: the inputs of
all matrix products are rounded to its 10 bits. In float64 the norms alone are float32, as transformers has them.
Writes mrd_precision.json and mrd_precision.svg.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.overrides import TorchFunctionMode

import pyunlearn as pu
from pyunlearn._files import write_text
from pyunlearn.data import QADataset, collate, generate_authors
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.load import load_model

from ...measure import commit, machine, versions
from ...results import RESULTS

SIGMAS = (1e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 1e-3)
PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, torch.addmm,
            Tensor.addmm_, F.scaled_dot_product_attention}  # fmt: skip


class EmulatedTF32(TorchFunctionMode):
    """Inputs of matrix products lose 13 of their 23 bits, rounded to nearest."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            args = tuple(ten_bits(x) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args)
        return func(*args, **(kwargs or {}))


def ten_bits(x: Tensor) -> Tensor:
    return ((x.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def ways(model: Any) -> dict[str, tuple[Any, AbstractContextManager, str]]:
    """name -> (model, what is switched on around `pu.mrd`, how weights are perturbed)."""
    return {
        "float64": (copy.deepcopy(model).double(), nullcontext(), "overlay"),
        "float32": (model, nullcontext(), "overlay"),
        "TF32 products": (model, EmulatedTF32(), "overlay"),
        "bfloat16 activations": (model, torch.autocast("cpu", torch.bfloat16), "overlay"),
        "bfloat16 weights": (copy.deepcopy(model).bfloat16(), nullcontext(), "copy"),
    }


def measure(model: Any, batch: dict[str, Tensor], num_draws: int, sigmas: Sequence[float]) -> dict[str, list[float]]:
    means: dict[str, list[float]] = {}
    for name, (its, switched, mode) in ways(model).items():
        options: Any = {"mode": mode, "check_draws": 0, "allow_low_precision": True, "progress": False}
        means[name] = []
        for sigma in sigmas:
            with switched:
                means[name].append(float(pu.mrd(its, [batch], "algorithm1", num_draws, sigma, **options).value.mean()))
    return means


def draw(sigmas: Sequence[float], means: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(means.items(), ("k-", "o", "^", "s", "D"), strict=True):
        axes.plot(sigmas, values, style, label=name, markersize=5, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="sigma", ylabel="E |S|, mean over samples")
    axes.legend(frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.mrd.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the embedded demo")
    parser.add_argument("--num-draws", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>)")
    args = parser.parse_args(words)
    model, tokenizer = load_model(str(args.run / "memorised"))
    rows = QADataset(generate_authors().forget[: args.samples], tokenizer, CausalLM.of(model).context_length)
    batch = collate([rows[i] for i in range(len(rows))], 0)
    means = measure(model, batch, args.num_draws, SIGMAS)
    out = args.out or RESULTS / machine()["folder"]
    record = {"sigma": SIGMAS, "mean": means, "num_draws": args.num_draws, "samples": args.samples,
              "device": machine()["name"], "versions": versions(), "commit": commit()}  # fmt: skip
    write_text(out / "mrd_precision.json", json.dumps(record, indent=1) + "\n")
    draw(SIGMAS, means, out / "mrd_precision.svg")
    for i, sigma in enumerate(SIGMAS):
        print(f"{sigma:g}", *(f"{name} {values[i] / means['float64'][i]:.3g}" for name, values in means.items()))


if __name__ == "__main__":
    main()
