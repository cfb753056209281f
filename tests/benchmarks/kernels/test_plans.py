"""The shapes that were asked for are measured."""

import itertools

import torch

from benchmarks.kernels import cases, peers, plans, targets


def test_gpu_cases_cover_the_shapes_asked_for():
    logits = [case for case, _ in plans.gpu_logits()]
    bf16 = {(case.name, case.n, case.v) for case in logits if case.dtype == torch.bfloat16}
    assert bf16 == set(itertools.product(cases.KINDS, plans.ROWS, plans.VOCABULARIES))
    assert {case.name for case in logits if case.dtype == torch.float32} == set(cases.KINDS)
    linear = [case for case, _ in plans.gpu_linear()]
    assert {(case.n, case.v, case.h) for case in linear if case.name == cases.MEAN} >= set(
        itertools.product((1024, 4096, 16384), (128256,), (2048, 4096))
    )
    assert (cases.TOKENS_ENTROPY, *targets.TARGET_SHAPE) in {(case.name, case.n, case.v, case.h) for case in linear}
    passes = {cases.NLL: 3, cases.ENTROPY: 3, cases.STATISTICS: 1, cases.KL: 5, cases.AT_ONCE: 2}
    for case in logits:
        assert case.bytes == passes[case.name] * case.n * case.v * case.dtype.itemsize
        assert peers.of(case).keys() <= {"liger", "liger sum", "quack", "quack in place", "trl"}
    frozen = cases.Linear(cases.FROZEN, torch.bfloat16, 10, 100, 20)
    assert frozen.flops == 2 * 2 * 10 * 100 * 20
    assert frozen.bytes == 2 * (2 * 100 * 20 + 3 * 10 * 20)
