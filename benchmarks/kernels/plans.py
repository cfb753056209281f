"""Which cases are run, in which order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from .cases import (
    BEYOND,
    ENTROPY,
    FROZEN,
    KINDS,
    KL,
    LINEAR_KL,
    MANY_PAIRS,
    MANY_TENSORS,
    MEAN,
    NLL,
    NORMS,
    ONE_PAIR,
    ONE_TENSOR,
    STATISTICS,
    TOKENS,
    TOKENS_ENTROPY,
    Case,
    Linear,
    Logits,
    Norms,
    Pairs,
    Perturb,
    Product,
)


def cpu_cases(small: bool = False) -> list[Case]:
    """The foundation's shapes (512 x 49152 logits; SmolLM2's head), one case at an eighth of the rows and at five times
    the columns, which should cost as much an element; `small` for a smoke test."""
    n, v, h, rows = (16, 999, 32, 64) if small else (512, 49152, 576, 1024)
    kinds = (NLL, ENTROPY, STATISTICS, KL)
    cases: list[Case] = [Logits(name, d, n, v) for d in (torch.float32, torch.bfloat16) for name in kinds]
    if not small:
        cases += [Logits(ENTROPY, torch.bfloat16, *shape) for shape in ((64, v), (256, 256000))]
    cases += [Linear(MEAN, torch.float32, rows, v, h), Linear(BEYOND, torch.float32, 2 * rows, v, h)]
    return [*cases, *weights("cpu", small)]


def weights(device: str, small: bool) -> Iterator[Case]:
    """What is done to all weights or gradients of a model, of 50 million parameters on a CPU and 1 billion on a GPU."""
    numel, width = (1 << 14, 64) if small else (50_000_000, 2048) if device == "cpu" else (1 << 30, 4096)
    model = ((width, width), (width,)) * (numel // width**2)
    float32, bfloat16 = torch.float32, torch.bfloat16
    yield Perturb(ONE_TENSOR, float32, ((numel,),), device)
    for dtype in (float32, bfloat16):
        yield Perturb(MANY_TENSORS, dtype, model, device)
    for dtype in (float32, bfloat16):
        yield Pairs(ONE_PAIR, dtype, ((numel,),), device)
        yield Pairs(MANY_PAIRS, dtype, model, device)
    names, sizes = list(NORMS)[3:], (11008, 4096)
    if small or device == "cpu":
        names, sizes = (list(NORMS)[:1], (24, 40)) if small else (list(NORMS)[1:3], (1536, 576))
    for name in names:
        for dtype in (float32, bfloat16):
            yield Norms(name, dtype, *sizes, device)


def gpu_weights(device: str = "cuda", small: bool = False) -> Iterator[tuple[Case, bool]]:
    for case in weights(device, small):
        yield case, False


ROWS = (1, 64, 1024, 8192, 32768)
VOCABULARIES = (32000, 50304, 128256, 151936, 256000)
COMPILED = ((8192, 128256), (8192, 32000), (64, 128256), (8192, 256000))  # each costs seconds of compilation


def gpu_logits(device: str = "cuda", small: bool = False) -> Iterator[tuple[Logits, bool]]:
    """(case, whether torch.compile alone runs it), the most telling first: a run that ends early has those."""
    rows, sizes, compiled = (ROWS, VOCABULARIES, COMPILED) if not small else ((1, 8), (128, 999), ((8, 128),))
    main = [(n, v) for n, v in itertools.product(rows, sizes) if n == rows[-2] or v == sizes[len(sizes) // 2]]
    rest = [shape for shape in itertools.product(rows, sizes) if shape not in main]
    for name, (n, v) in itertools.product(KINDS, main):
        yield Logits(name, torch.bfloat16, n, v, device), False
    for name, (n, v) in itertools.product((ENTROPY, NLL, STATISTICS, KL), compiled):
        yield Logits(name, torch.bfloat16, n, v, device), True
    for (n, v), name in itertools.product(rest, KINDS):
        yield Logits(name, torch.bfloat16, n, v, device), False
    for name, n, v in itertools.product(KINDS, rows[-2:-4:-1], sizes[::2]):
        yield Logits(name, torch.float32, n, v, device), False


def gpu_linear(device: str = "cuda", small: bool = False) -> Iterator[tuple[Case, bool]]:
    """As `gpu_logits`; the ceiling and the 4096 x 4096 x 131072 target first. torch.compile runs none of them."""
    yield Product(torch.bfloat16, 256 if small else 8192, device), False
    if small:
        shapes, target, others = [(16, 999, 32)], (8, 512, 16), (16, 999, 32)
    else:
        shapes = [(n, 128256, h) for h in (4096, 2048) for n in (4096, 1024, 16384)]
        target, others = (4096, 131072, 4096), (4096, 128256, 4096)
    for name in (TOKENS_ENTROPY, MEAN):
        yield Linear(name, torch.bfloat16, *target, device), False
    for n, v, h in shapes:
        yield Linear(MEAN, torch.bfloat16, n, v, h, device), False
    for name in (BEYOND, FROZEN, TOKENS, LINEAR_KL):
        yield Linear(name, torch.bfloat16, *others, device), False
    for n, v, h in shapes:
        yield Linear(TOKENS_ENTROPY, torch.bfloat16, n, v, h, device), False
