"""Models under FSDP2 and tensor parallelism on two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.fingerprint import model_fingerprint
from pyunlearn.model.forward import supervised_hidden
from pyunlearn.model.head import head_stats

V = 61  # odd: shards are uneven


def make(seed: int = 0, tied: bool = False) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch_of(rank: int) -> dict[str, Tensor]:
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(10 + rank))
    labels = ids.clone()
    labels[:, : 2 + rank] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of(model: nn.Module, batch: dict[str, Tensor], reference: nn.Module) -> Tensor:
    with torch.no_grad():
        pair = supervised_hidden(reference, batch).hidden, CausalLM.of(reference).read_head()
    found = supervised_hidden(model, batch, layers=[1])
    head = CausalLM.of(model).read_head()
    stats = head_stats(head, found.hidden, found.targets, ("logp", "kl_pq"), reference=pair)
    return (stats.kl_pq - stats.logp).sum() + found.layers[1].square().sum()


def layers_and_root(model: Any, mesh: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def root_alone(model: Any, mesh: Any) -> None:
    fully_shard(model, mesh=mesh)


def norm_and_head(model: Any, mesh: Any) -> None:
    """The grouping of transformers' own plan: the tail is one group that stays gathered."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def head_alone(model: Any, mesh: Any) -> None:
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)


FSDP: dict[str, tuple[Callable[[Any, Any], None], bool]] = {
    "layers and root": (layers_and_root, False),
    "layers and root, tied": (layers_and_root, True),
    "root alone": (root_alone, False),
    "root alone, tied": (root_alone, True),
    "norm and head": (norm_and_head, False),
}


def fsdp(shard: Callable[[Any, Any], None], tied: bool, mesh: Any) -> dict[str, Tensor]:
    """Gradients of two steps' second, so that a group that was not put back into its place shows."""
    model, reference, batch = make(tied=tied), make(1), batch_of(torch.distributed.get_rank())
    shard(model, mesh)
    for _ in range(2):
        model.zero_grad()
        loss_of(model, batch, reference).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def tensor_parallel(mesh: Any) -> dict[str, Any]:
    """The head over both ranks, as the model and as its reference; both have the same batch."""
    models = make(), make(1)
    for model in models:
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
        CausalLM.of(model).check_head()
    loss_of(models[0], batch_of(0), models[1]).backward()
    found = {name: parameter.grad for name, parameter in models[0].named_parameters()}
    layout = str(found["lm_head.weight"].placements)
    return {"gradients": found | {"lm_head.weight": found["lm_head.weight"].full_tensor()}, "layout": layout}


def fingerprints(mesh: Any) -> list[str]:
    """Before and after a step, in which shards are gathered."""
    model = make()
    layers_and_root(model, mesh)
    found = [model_fingerprint(model)]
    loss_of(model, batch_of(0), make(1)).backward()
    return [*found, model_fingerprint(model)]


def sharded(_: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    results: dict[str, Any] = {name: fsdp(*how, mesh) for name, how in FSDP.items()}
    results["tensor parallel"] = tensor_parallel(mesh)
    results["fingerprints"] = fingerprints(mesh)
    try:
        fsdp(head_alone, False, mesh)
    except TypeError as error:
        results["refused"] = str(error)
    return results
