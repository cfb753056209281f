# Written by python -m pyunlearn.objectives.stub
from typing import Literal, overload

from torch import Tensor

from .definition import Layer, NonNegative, Positive, Seed
from .generated import MIXTURES, bss, weighted
from .objective import Samples
from .one_pass import one_pass
from .reduction import REDUCTIONS, TokenInputs
from .registry import Objective, Row, get, names, register, register_preset, table

__all__ = [
    "MIXTURES",
    "REDUCTIONS",
    "Layer",
    "NonNegative",
    "Objective",
    "Positive",
    "Row",
    "Samples",
    "Seed",
    "TokenInputs",
    "altpo",
    "ap",
    "bss",
    "dpo",
    "ga",
    "gd",
    "get",
    "idk",
    "kl",
    "me",
    "names",
    "npo",
    "one_pass",
    "register",
    "register_preset",
    "rmu",
    "rr",
    "satimp",
    "simnpo",
    "table",
    "tnpo",
    "weighted",
    "wga",
    "whp",
    "wtnpo",
]

def ga(
    logp: Tensor,
    mask: Tensor | None = None,
    *,
    preset: str = "paper",
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def wga(
    logp: Tensor,
    mask: Tensor | None = None,
    *,
    alpha: float = 1.0,
    preset: str = "paper",
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def npo(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    preset: str = "paper",
    reduction: str = "sequence_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def tnpo(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 4.0,
    epsilon: float = 0.0,
    preset: str = "paper",
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def wtnpo(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None = None,
    *,
    alpha: float = 1.5,
    beta: float = 5.0,
    epsilon: float = 0.0,
    preset: str = "paper",
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def simnpo(
    logp: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 4.5,
    margin: float = 0.0,
    preset: str = "paper",
    reduction: str = "sequence_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def satimp(
    logp: Tensor,
    mask: Tensor | None = None,
    *,
    beta1: float = 5.0,
    beta2: float = 0.1,
    preset: str = "paper",
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
@overload
def me(
    uniform_ce: Tensor,
    mask: Tensor | None = None,
    *,
    vocab_size: int,
    preset: Literal["closer_look_code"],
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
@overload
def me(
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    vocab_size: int,
    positions: str = "real",
    preset: str = "paper",
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def altpo(
    alternate_logp: Tensor,
    answer_logp: Tensor,
    alternate_ref_logp: Tensor,
    answer_ref_logp: Tensor,
    alternate_mask: Tensor | None = None,
    answer_mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    factor: float = 2.0,
    alternates: int = 5,
    temperature: float = 1.0,
    max_new_tokens: int = 200,
    preset: str = "paper",
    reduction: str = "sequence_mean",
    count: int | float | Tensor | None = None,
    alternate_sequence_ids: Tensor | None = None,
    answer_sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def whp(
    logp: Tensor,
    mask: Tensor | None = None,
    *,
    preset: str = "paper",
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def rmu(
    hidden: Tensor,
    mask: Tensor | None = None,
    *,
    c: float = 2.0,
    layer: int | str = "middle",
    seed: int = 0,
    preset: str = "paper",
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def idk(
    logp: Tensor,
    mask: Tensor | None = None,
    *,
    preset: str = "paper",
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def dpo(
    refusal_logp: Tensor,
    answer_logp: Tensor,
    refusal_ref_logp: Tensor,
    answer_ref_logp: Tensor,
    refusal_mask: Tensor | None = None,
    answer_mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    factor: float = 2.0,
    preset: str = "paper",
    reduction: str = "sequence_mean",
    count: int | float | Tensor | None = None,
    refusal_sequence_ids: Tensor | None = None,
    answer_sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def rr(
    hidden: Tensor,
    ref_hidden: Tensor,
    mask: Tensor | None = None,
    *,
    layer: int | str = "middle",
    preset: str = "paper",
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def gd(
    logp: Tensor,
    mask: Tensor | None = None,
    *,
    preset: str = "paper",
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
@overload
def kl(
    kl_qp: Tensor,
    mask: Tensor | None = None,
    *,
    preset: Literal["open_unlearning", "closer_look_code", "g_effect_code"],
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
@overload
def kl(
    kl_pq: Tensor,
    mask: Tensor | None = None,
    *,
    preset: str = "paper",
    reduction: str = "token_mean",
    count: int | float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
def ap(
    refusal_logp: Tensor,
    answer_logp: Tensor,
    refusal_mask: Tensor | None = None,
    answer_mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    preset: str = "paper",
    reduction: str = "sequence_mean",
    count: int | float | Tensor | None = None,
    refusal_sequence_ids: Tensor | None = None,
    answer_sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor: ...
