"""Run by torchrun in test_g_effect.py: two processes, half of the sequences each, the model sharded over both."""

from __future__ import annotations

import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pyunlearn as pu
from tests.float64 import make_model
from tests.geffect.common import ids_of, in_parts, nll
from tests.two_processes import save_and_leave


def main(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    forget, retain = (ids_of(4, seed)[2 * rank : 2 * rank + 2] for seed in (1, 2))
    model = make_model("llama")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        nll(forget)(model)  # leaves the root unsharded
    plain = pu.g_effect(model, nll(forget, -1.0), {"unlearn": nll(forget), "retain": nll(retain)})
    metrics = {"unlearn": in_parts(forget), "retain": in_parts(retain)}
    parts = pu.g_effect(model, in_parts(forget, -1.0), metrics)
    results = {"plain": plain.per_parameter, "parts": parts.per_parameter, "cosine": plain.cosine}
    save_and_leave(results, folder)


if __name__ == "__main__":
    main(sys.argv[1])
