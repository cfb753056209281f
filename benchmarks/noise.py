"""Perturbing all weights of a model, one draw after another: ours by mode, and the ways it is done elsewhere.

    python -m benchmarks.noise [--small] [--rounds 7] [--threads 2] [--device cpu]

A run goes from the weights of one draw to those of the next. Where that takes a restore of its own (adding the noise,
subtracting the same noise again), the run is both, as in MeZO. `bytes` is the least traffic of a run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pyunlearn as pu

SIGMA = 1e-5
Run = Callable[[int], None]  # of the draw


@dataclass(frozen=True)
class Perturb:
    """Weights N(0, 0.02^2) of these shapes."""

    op = "perturbed"
    name: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    device: str = "cpu"

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def weights(self) -> nn.ParameterList:
        g = torch.Generator().manual_seed(0)
        tensors = (torch.randn(shape, generator=g) * 0.02 for shape in self.shapes)
        # bfloat16 numbers in float32 too: every mode can take them
        return nn.ParameterList([t.bfloat16().to(self.dtype).to(self.device) for t in tensors])

    def bytes(self, impl: str) -> int:
        source = self.dtype.itemsize
        target = 4 if impl == "overlay" else source
        return self.numel * (source + target) * (2 if impl == "MeZO" else 1)


def ours(weights: nn.ParameterList, mode: str) -> tuple[pu.perturbed, Run]:
    it = pu.perturbed(weights, sigma=SIGMA, mode=mode, backend="cuda" if weights[0].is_cuda else None)
    it.__enter__()
    return it, it.to


@torch.no_grad()
def randn_like(weights: nn.ParameterList) -> None:
    """Noise added and never taken off again: half of what is needed."""
    for p in weights:
        p.add_(torch.randn_like(p), alpha=SIGMA)


@torch.no_grad()
def mezo(weights: nn.ParameterList, draw: int) -> None:
    """The noise of a seed parameter by parameter, added, drawn again and subtracted."""
    for scale in (1, -1):
        torch.manual_seed(draw)
        for p in weights:
            z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
            p.data = p.data + scale * z * SIGMA


def implementations(case: Perturb) -> dict[str, Callable[[nn.ParameterList], tuple[pu.perturbed | None, Run]]]:
    runs: dict[str, Callable[[nn.ParameterList], tuple[pu.perturbed | None, Run]]] = {
        "randn_like + add_": lambda w: (None, lambda draw: randn_like(w)),
        "MeZO": lambda w: (None, lambda draw: mezo(w, draw)),
    }
    for mode in ("overlay", "copy", "snap") if case.dtype == torch.float32 else ("overlay",):
        runs[mode] = lambda w, mode=mode: ours(w, mode)  # type: ignore[misc]
    return runs


def cases(small: bool = False, device: str = "cpu") -> list[Perturb]:
    numel, width = (1 << 14, 64) if small else (50_000_000, 2048)
    model = ((width, width), (width,)) * (numel // width**2)
    return [
        Perturb("one tensor", torch.float32, ((numel,),), device),
        Perturb("matrices and vectors", torch.float32, model, device),
        Perturb("matrices and vectors", torch.bfloat16, model, device),
    ]


def measure(case: Perturb, impl: str, rounds: int) -> tuple[list[float], float]:
    """(seconds of every run, rms difference of the weights from what they were at the end, in sigma)."""
    weights = case.weights()
    before: list[Tensor] = [p.detach().clone() for p in weights]
    it, run = implementations(case)[impl](weights)
    times = []
    for draw in range(rounds + 1):
        if case.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run(draw)
        if case.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if it is not None:
        it.__exit__(None, None, None)
    squares = sum(
        float((p.detach().double() - q.double()).square().sum()) for p, q in zip(weights, before, strict=True)
    )
    return times[1:], (squares / sum(q.numel() for q in before)) ** 0.5 / SIGMA


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    titles = ("case", "dtype", "implementation", "best ns an element", "median", "GB/s", "x randn_like + add_")
    print(f"| {' | '.join(titles)} | left behind, sigma |\n{'|---' * (len(titles) + 1)}|")
    for case in cases(args.small, args.device):
        base = None
        for impl in implementations(case):
            times, left = measure(case, impl, args.rounds)
            best, median = min(times), sorted(times)[len(times) // 2]
            base = base or best
            figures = (
                f"{best / case.numel * 1e9:.3f} | {median / case.numel * 1e9:.3f} | {case.bytes(impl) / best / 1e9:.1f}"
            )
            print(f"| {case.name} | {str(case.dtype)[6:]} | {impl} | {figures} | {base / best:.2f} | {left:.1e} |")


if __name__ == "__main__":
    main()
