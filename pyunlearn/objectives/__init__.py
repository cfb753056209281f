"""Unlearning objectives: pure algebra on per-token statistics, one small function each, and a registry.

    from pyunlearn import objectives, token_stats

    stats = token_stats(logits, targets)
    loss = objectives.wga(stats.logp, stats.mask, alpha=5.0)  # (B, T), or flat (N,) with sequence_ids=
    loss = objectives.npo(stats.logp, ref_logp, stats.mask, beta=0.1)  # ref_logp: the frozen reference's logp
    loss = objectives.rmu(hidden, stats.mask, c=2.0)  # hidden states of one layer, (B, T, H) or (N, H)
    npo = objectives.get("npo", beta=0.1)  # by name: npo.outputs, npo.reference, ... say what it needs

Losses are minimised. `count=` puts the number of tokens or sequences of the whole optimiser step in place
of the batch's own, so that micro-batches and ranks add up (`reduction.py`): in a trainer that accumulates gradients it
has to be given; in transformers' `compute_loss_func`, `loss_func` of `pyunlearn.integrations.transformers` does.
`preset=` chooses between a paper and the code bases that differ from it; `table()` lists formula, defaults, presets and
source of each objective. Token means are the default, as in the code bases (theirs of each micro-batch, here of the
whole step). Most papers sum a sequence's tokens, as `npo` does, so that against a token mean it weighs about n times
more than in its paper: `reduction="paper"` has each as in its equation. Of any objective,
`get(..., temperature=2.0)` works on logits / 2, and `keep=0.8` on the likeliest tokens of each sequence alone.

One of your own takes three lines. Positional parameters are named after the statistics it needs, keywords are
its options, and it returns the loss of each token:

    >>> @register("focal_ga", source="mine")
    ... def focal_ga(logp, *, gamma=2.0):
    ...     return (1 - logp.exp()).detach() ** gamma * logp

It then has masks, reductions, checks and a name, like the built-in ones:

    >>> focal_ga(torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, False]]), gamma=0.0)
    tensor(-1.)
    >>> get("focal_ga", gamma=1.0).outputs
    ('logp',)

Where d(loss of a token)/d(statistic) is a constant, or a constant times a `pyunlearn.ops.TokenRule`, say so, and
`pyunlearn.value_and_grad` takes it in one pass over the logits. Of `focal_ga` it is (1 - p)^gamma:

    >>> @register("focal_ga", source="mine", slope=1.0, rule=lambda options: TokenRule(gamma=options["gamma"]))
    ... def focal_ga(logp, *, gamma=2.0):
    ...     return (1 - logp.exp()).detach() ** gamma * logp
    >>> one_pass(get("focal_ga"), torch.tensor([[True, False]]))["rule"]
    TokenRule(alpha=0.0, gamma=2.0, beta=0.0)
"""

from .bootstrapping import bst
from .definition import Layer, NonNegative, Positive, Seed
from .distribution import ce_u, pdu, undial
from .forget import ga, me, npo, satimp, simnpo, tnpo, wga, wtnpo
from .generated import MIXTURES, altpo, bss, weighted, whp
from .objective import Samples
from .one_pass import one_pass
from .reduction import REDUCTIONS, TokenInputs
from .registry import Objective, Row, get, names, register, register_preset, table
from .representation import rmu, rr
from .retain import ap, gd, kl
from .targeted import dpo, flat, idk

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
    "bst",
    "ce_u",
    "dpo",
    "flat",
    "ga",
    "gd",
    "get",
    "idk",
    "kl",
    "me",
    "names",
    "npo",
    "one_pass",
    "pdu",
    "register",
    "register_preset",
    "rmu",
    "rr",
    "satimp",
    "simnpo",
    "table",
    "tnpo",
    "undial",
    "weighted",
    "wga",
    "whp",
    "wtnpo",
]
