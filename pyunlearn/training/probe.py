"""The G-effect of a run's own objectives on fixed samples of both sets: of one model, and all along a training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import objectives as registry
from .._declined import decline
from ..data import QADataset, collate
from ..data.tokenise import token_texts
from ..geffect import GEffect, g_effect, gradient_of, pointwise_g_effect
from ..model.causal_lm import CausalLM
from ..model.forward import IGNORE_INDEX, length_batches, supervised_stats
from ..objectives import TokenInputs
from ..objectives.reduction import Selection
from ..ops import token_stats
from .callbacks import append_metrics, read_metrics
from .settings import GEffectConfig
from .terms import Count, Term, TermLosses, count_items

ROLES = {"unlearn": "forget", "retain": "retain"}  # G-effect -> the samples of its negative log-likelihood
HEAT_SAMPLES = 2  # forget samples whose weights are kept token by token


class Probe:
    """Measures the G-effect of every term of the objective, and of their weighted sum, on a model.

    losses: the terms, with the reference of these very rows. rows: kind of sequence -> the fixed samples; "forget" and
    "retain" also give the metrics, the mean negative log-likelihood of their supervised tokens. settings: groups,
    batch_size and pointwise. bf16: losses run under autocast, as the training's. pad_to: tokens of every row, as the
    training's; None: the longest of its kind in the batch.

    A probe of as many samples as a step is about two steps of work: a forward and a backward a set for the metric, and
    one a term (pointwise: two more of the forget set). Its memory beyond a training step's: two gradients and a layer.
    """

    def __init__(
        self,
        losses: TermLosses,
        rows: Mapping[str, QADataset],
        settings: GEffectConfig,
        bf16: bool = False,
        pad_to: int | None = None,
    ):
        self.losses, self.settings, self.bf16 = losses, settings, bf16
        self.batches: dict[str, list[dict[str, dict[str, Tensor]]]] = {}  # role -> micro-batches of its kinds
        for role in ROLES.values():
            kinds = [kind for kind in rows if kind.startswith(role)]
            lengths = [sum(len(rows[kind][i]["input_ids"]) for kind in kinds) for i in range(len(rows[role]))]
            self.batches[role] = [
                {kind: collate([rows[kind][i] for i in batch], rows[kind].pad_token_id, pad_to) for kind in kinds}
                for batch in length_batches(lengths, settings.batch_size)
            ]
        self.tokens = {role: self._count(role, ((role,), "supervised", "tokens", Selection())) for role in self.batches}
        self.texts = [text_of(rows["forget"], i) for i in range(min(HEAT_SAMPLES, len(rows["forget"])))]

    @property
    def samples(self) -> dict[str, int]:
        """Role -> how many."""
        return {role: sum(len(batch[role]["index"]) for batch in batches) for role, batches in self.batches.items()}

    def measure(self, model: torch.nn.Module) -> dict[str, Any]:
        """The G-effects of `model`, which is left as it was, and what the paper draws beside them; plain numbers.

        total, groups, layers: metric -> G-effect of the whole objective, by group, by layer. terms: label ->
        coefficient and its own total and groups, before the coefficient. nll and norm: metric -> value, norm of its
        gradient. log10_inverse_confidence: of the mean of 1 / p over the forget samples' tokens. weights: label of a
        forget term -> mean of its `token_weights`. heat: a few forget samples' question, tokens, and by label the
        tokens' weights. pointwise (where asked for): see `_pointwise`.

        A gradient that is not finite gives {"not_finite": its parameter}. Raises what `g_effect` raises otherwise.
        """
        devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"}
        kind = next(iter(devices)).type if devices else "cuda"
        with as_found(model), torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind):
            try:
                return self._measure(model)
            except ArithmeticError as error:
                return {"not_finite": str(error)}
            finally:
                self.losses.release()

    def _measure(self, model: torch.nn.Module) -> dict[str, Any]:
        groups, seen = self.settings.groups, _Seen()
        gradients = {
            metric: gradient_of(model, partial(self._nll, role=role, seen=seen)) for metric, role in ROLES.items()
        }
        effects = {
            term.label: g_effect(model, partial(self._term, term=term), gradients, groups) for term in self.losses.terms
        }
        whole = weighted_sum([(term.coefficient, effects[term.label]) for term in self.losses.terms])
        weights = {term.label: w for term in self.losses.terms if (w := self._weights(term, seen)) is not None}
        row: dict[str, Any] = {
            "total": whole.total,
            "groups": whole.per_group,
            "layers": whole.per_layer,
            "norm": whole.metric_norm,
            "terms": {
                term.label: {
                    "coefficient": term.coefficient,
                    "total": effects[term.label].total,
                    "groups": effects[term.label].per_group,
                }
                for term in self.losses.terms
            },
            "nll": {metric: seen.nll[role] for metric, role in ROLES.items()},
            "log10_inverse_confidence": log10_mean_inverse(seen.logp),
            "weights": {label: mean for label, (mean, _, _) in weights.items()},
            "heat": [
                {**text, "weights": {label: of_tokens[i] for label, (_, _, of_tokens) in weights.items()}}
                for i, text in enumerate(self.texts)
            ],
            "samples": self.samples,
        }
        if self.settings.pointwise:
            of_samples = {label: by_sample for label, (_, by_sample, _) in weights.items()}
            row["pointwise"] = {**self._pointwise(model, gradients), "weights": of_samples}
        return row

    def _count(self, role: str, key: Count) -> int:
        return sum(count_items(batch, *key) for batch in self.batches[role])

    def _nll(self, model: torch.nn.Module, role: str, seen: _Seen) -> Iterator[Tensor]:
        """Micro-batches of the mean negative log-likelihood of a set's supervised tokens."""
        parts = []
        for batch in self.batches[role]:
            with self._autocast(model):
                stats, supervised = supervised_stats(model, on_device(batch[role], model))
                loss = -stats.logp.sum() / self.tokens[role]
            parts.append(loss.detach())
            if role == "forget":
                seen.logp.append(stats.logp.detach())
                seen.sequence_ids.append(supervised.sequence_ids)
            yield loss
        seen.nll[role] = math.fsum(torch.stack(parts).tolist())

    def _term(self, model: torch.nn.Module, term: Term) -> Iterator[Tensor]:
        """Micro-batches of one term over the samples of its role."""
        role = term.objective.role
        counts = {term.count: self._count(role, term.count)}
        for batch in self.batches[role]:
            inputs = {kind: on_device(batch[kind], model) for kind in term.kinds.values()}
            with self._autocast(model):
                (loss,) = self.losses.term_losses(model, inputs, counts, [term])
            yield loss

    def _autocast(self, model: torch.nn.Module) -> torch.autocast:
        return torch.autocast(CausalLM.of(model).device.type, torch.bfloat16, enabled=self.bf16)

    def _weights(self, term: Term, seen: _Seen) -> tuple[float, list[float], dict[int, list[float]]] | None:
        """(mean, each forget sample's mean, all of the samples in `texts`) of a term's `token_weights`.

        None where they are not defined.
        """
        objective = term.objective
        if objective.role != "forget" or objective.outputs != ("logp",) or objective.batches != ("answer",):
            return None
        if objective.temperature != 1:  # `seen` is not what it reads
            return None
        of_tokens, of_samples, order, heat = [], [], [], {}
        for batch, logp, ids in zip(self.batches["forget"], seen.logp, seen.sequence_ids, strict=True):
            index = batch["forget"]["index"]
            reference = None
            if objective.reference == "logp":
                reference = self.losses.references["forget"].scalars(on_device(batch["forget"], logp))["logp"]
            weights = token_weights(objective, logp, reference, ids, len(index))
            of_tokens.append(weights)
            of_samples.append(mean_by(ids, weights, len(index)))
            order.append(index)
            for place, sample in enumerate(index.tolist()):
                if sample < len(self.texts):
                    heat[sample] = weights[ids == place].tolist()
        samples = torch.cat(of_samples)
        mean = (torch.cat(of_tokens) if objective.unit == "tokens" else samples).mean().item()
        return mean, samples[torch.cat(order).argsort().to(samples.device)].tolist(), heat

    def _pointwise(self, model: torch.nn.Module, gradients: Mapping[str, dict[str, Tensor]]) -> dict[str, Any]:
        """Metric -> PG-effect of GA (equation 5) of each forget sample, <grad metric, grad log p(answer)>."""

        def log_likelihoods(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            decline("fused head", "pointwise G-effects see the head as a layer only, so each batch's logits are whole")
            with self._autocast(model):
                logits = model(**inputs, use_cache=False).logits
            return token_stats(logits[:, :-1], batch["labels"][:, 1:]).logp.sum(1)

        order = torch.cat([batch["forget"]["index"] for batch in self.batches["forget"]]).argsort()
        effects = {}
        for metric, gradient in gradients.items():
            parts = [
                pointwise_g_effect(model, on_device(batch["forget"], model), log_likelihoods, gradient).total.cpu()
                for batch in self.batches["forget"]
            ]
            effects[metric] = torch.cat(parts)[order].tolist()
        return effects


class _Seen:
    """What the forwards of the metrics give besides: forget tokens' logp by micro-batch, and the metrics."""

    def __init__(self) -> None:
        self.logp: list[Tensor] = []
        self.sequence_ids: list[Tensor] = []
        self.nll: dict[str, float] = {}


class GEffectCallback(TrainerCallback):
    """Writes a probe's row into the metrics file before the first step, every `every` steps, and after the last one.

    The row: {"stage", "step", "geffect": what `Probe.measure` gives, "probe_seconds", "step_seconds"}; the last is the
    training step just before it, None for the first row. The training goes on in the same bits as without. Every
    process measures the same samples (a sharded model needs all of them; DDP's others would wait), the first writes.

    Raises ValueError for DeepSpeed, and what `g_effect` raises, before the first step.
    """

    def __init__(self, probe: Probe, path: str | Path, stage: str, every: int):
        self.probe, self.path, self.stage, self.every = probe, Path(path), stage, every
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if args.deepspeed is not None:
            raise ValueError("geffect: DeepSpeed takes gradients over; probe by `pyunlearn geffect` after the run")
        if state.global_step == 0:
            self._write(state, model, None)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._due(state, state.global_step + 1):
            self.started = clock(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._due(state, state.global_step):
            self._write(state, model, clock(model) - self.started)

    def _due(self, state: TrainerState, step: int) -> bool:
        return step % self.every == 0 or step == state.max_steps

    def _write(self, state: TrainerState, model: Any, step_seconds: float | None) -> None:
        start = clock(model)
        effect = self.probe.measure(model)
        seconds = {"probe_seconds": clock(model) - start, "step_seconds": step_seconds}
        if state.is_world_process_zero and not self._written(state.global_step):
            append_metrics(self.path, {"stage": self.stage, "step": state.global_step, "geffect": effect, **seconds})

    def _written(self, step: int) -> bool:
        """The row of step 0 is there already where a run starts again before its first checkpoint."""
        rows = read_metrics(self.path) if self.path.exists() else []
        return any("geffect" in row and (row["stage"], row["step"]) == (self.stage, step) for row in rows)


def clock(model: torch.nn.Module) -> float:
    """Seconds, with nothing left to do on the model's device."""
    if CausalLM.of(model).device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


@contextmanager
def as_found(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, but for modules that checkpoint: those do so only in training mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, training in modes:
        module.training = training and getattr(module, "gradient_checkpointing", False) is True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def on_device(batch: Mapping[str, Tensor], like: torch.nn.Module | Tensor) -> dict[str, Tensor]:
    device = like.device if isinstance(like, Tensor) else CausalLM.of(like).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def text_of(rows: QADataset, index: int) -> dict[str, Any]:
    """The question, and the text of every supervised token."""
    labels = rows[index]["labels"][1:]
    tokens = token_texts(rows.prompt_format.tokenizer, labels[labels != IGNORE_INDEX].tolist())
    return {"question": rows.items[index].question, "tokens": tokens}


def weighted_sum(effects: Sequence[tuple[float, GEffect]]) -> GEffect:
    """The G-effect of the sum of objectives, each times its coefficient: it is linear in them."""
    first = effects[0][1]
    dots = {
        metric: {name: math.fsum(c * effect.per_parameter[metric][name] for c, effect in effects) for name in of_metric}
        for metric, of_metric in first.per_parameter.items()
    }
    return GEffect(dots, first.groups, None, first.metric_squares)


def token_weights(
    objective: Any, logp: Tensor, ref_logp: Tensor | None, sequence_ids: Tensor, num_sequences: int
) -> Tensor:
    """(N,) how much of GA's push each token gets: the objective's derivative by its logp, over that of `ga`.

    The weights w of the paper's equations 2, 4 and 6: of WGA, NPO and TNPO.
    """
    push = []
    for each in (objective, registry.get("ga", reduction=objective.reduction)):
        leaf = logp.double().requires_grad_()
        reference = None if ref_logp is None else ref_logp.double()
        inputs = TokenInputs({"logp": leaf}, reference, sequence_ids, num_sequences)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(each({"answer": inputs}, count=1), leaf)
        push.append(gradient)
    return push[0] / push[1]


def mean_by(sequence_ids: Tensor, values: Tensor, num_sequences: int) -> Tensor:
    """(num_sequences,) mean over each sequence's tokens."""
    sums, counts = (
        values.new_zeros(num_sequences).index_add_(0, sequence_ids, v) for v in (values, torch.ones_like(values))
    )
    return sums / counts


def log10_mean_inverse(logp: Sequence[Tensor]) -> float:
    """log10 of the mean of 1 / p: the inverse confidence itself would overflow."""
    every = torch.cat(list(logp)).double()
    return ((-every).logsumexp(0).item() - math.log(len(every))) / math.log(10)
