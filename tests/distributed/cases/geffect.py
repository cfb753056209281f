"""G-effects on two processes: half of the sequences each, the model sharded over both."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import pyunlearn as pu
from pyunlearn.geffect import gradient_of
from tests.float64 import make_model
from tests.geffect.common import ids_of, in_parts, nll, sample_losses


def sharded_model(mesh: DeviceMesh) -> nn.Module:
    model = make_model("llama")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def message(error: type[Exception], call: Callable[[], Any]) -> str:
    try:
        call()
    except error as caught:
        return str(caught)
    return ""


def fsdp(_: Path) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    forget, retain = (ids_of(4, seed)[2 * rank : 2 * rank + 2] for seed in (1, 2))
    model = sharded_model(mesh)
    with torch.no_grad():
        nll(forget)(model)  # leaves the root unsharded
    plain = pu.g_effect(model, nll(forget, -1.0), {"unlearn": nll(forget), "retain": nll(retain)})
    metrics = {"unlearn": in_parts(forget), "retain": in_parts(retain)}
    parts = pu.g_effect(model, in_parts(forget, -1.0), metrics)
    results = {"plain": plain.per_parameter, "parts": parts.per_parameter, "cosine": plain.cosine}
    shared = {"unlearn": gradient_of(model, nll(forget)), "retain": gradient_of(model, nll(retain))}
    results["shared"] = pu.g_effect(model, nll(forget, -1.0), shared).per_parameter
    for name, shape in (("replicas", (2, 1)), ("shards", (1, 2))):
        hybrid = sharded_model(init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))
        metrics = {"unlearn": nll(forget), "retain": nll(retain)}
        results[name] = pu.g_effect(hybrid, nll(forget, -1.0), metrics).per_parameter
    results["pointwise"] = message(
        TypeError, lambda: pu.pointwise_g_effect(model, {"ids": forget}, sample_losses, shared["retain"])
    )

    def spoiled(model: nn.Module) -> torch.Tensor:
        """Not finite in the rows of the head that rank 1 holds."""
        return nll(forget)(model) + model.lm_head(torch.full((16,), math.inf).double())[-1]

    results["not_finite"] = message(ArithmeticError, lambda: gradient_of(model, spoiled))
    return results
