"""What bad input to an objective says."""

from __future__ import annotations

import math
import re

import pytest
import torch

from pyunlearn import objectives as o
from pyunlearn.objectives import TokenInputs
from pyunlearn.ops import token_stats
from pyunlearn.training.method import TermConfig

LOGP = -torch.rand(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)
FLAT = LOGP.flatten()
IDS = torch.tensor([0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: o.get("wgaa"),
            "objective='wgaa': did you mean wga or ga? needs one of ga, wga, npo",
        ),
        (lambda: o.get(["wga"]), "objective=['wga']: did you mean wga"),
        (lambda: o.names("both"), "role='both': needs one of forget, retain, None"),
        (lambda: o.get("wga", alhpa=1), "wga: option='alhpa': did you mean alpha?"),
        (
            lambda: o.get("wga", beta=1),
            "needs one of alpha, preset, reduction, temperature, keep, kept",
        ),
        (lambda: o.get("ga", kpet="largest"), "ga: option='kpet': did you mean kept"),
        (
            lambda: o.get("ga", coefficient=0.5),
            "ga: coefficient=0.5: is no option of an objective, but stands beside it",
        ),
        (
            lambda: TermConfig(name="ga", options={"coefficient": 0.5}),
            "ga: coefficient=0.5: is no option of an objective, but stands beside it",
        ),
        (
            lambda: o.get("wga", preset="g_effect"),
            "wga: preset='g_effect': did you mean g_effect_code",
        ),
        (lambda: o.get("wga", reduction="mean"), "wga: reduction='mean': did you mean token_mean"),
        (lambda: o.get("dpo", reduction="token_mean"), "needs one of sequence_mean, sum"),
        (
            lambda: o.get("npo", kept="largest"),
            "npo: kept='largest': says which tokens keep leaves; needs keep below 1",
        ),
        (lambda: o.get("npo", beta=0), "npo: beta=0: needs a finite number > 0"),
        (lambda: o.get("npo", beta=math.inf), "npo: beta=inf: needs a finite number > 0"),
        (lambda: o.get("npo", beta=math.nan), "npo: beta=nan: needs a finite number > 0"),
        (lambda: o.get("npo", beta="0.1"), "npo: beta='0.1': needs a finite number > 0"),
        (lambda: o.get("npo", beta=True), "npo: beta=True: needs a finite number > 0"),
        (lambda: o.get("wga", alpha=-1), "wga: alpha=-1: needs a finite number >= 0"),
        (lambda: o.get("simnpo", margin=math.nan), "simnpo: margin=nan: needs a finite number"),
        (lambda: o.get("rmu", layer=0), "rmu: layer=0: needs one of ('shallow', 'middle', 'deep'), or a whole number"),
        (lambda: o.get("rmu", layer=1.5), "rmu: layer=1.5: needs one of"),
        (lambda: o.get("rr", layer="midle"), "rr: layer='midle': needs one of"),
        (lambda: o.get("rmu", seed=-1), "rmu: seed=-1: needs a whole number from 0"),
        (lambda: o.get("rmu", c=-1), "rmu: c=-1: needs a finite number >= 0"),
        (lambda: o.rmu(FLAT), "hidden: needs shape (B, T, H) or flat (N, H), got (6,)"),
        (lambda: o.rmu(torch.ones(2, 3, 0)), "hidden: needs shape (B, T, H) or flat (N, H), got (2, 3, 0)"),
        (lambda: o.rmu(torch.ones(2, 3, 4), MASK[:, :2]), "mask: needs the shape of hidden, (2, 3), got (2, 2)"),
        (lambda: o.rr(torch.ones(2, 3, 4)), "rr (preset paper) needs ref_hidden, the frozen reference's hidden per"),
        (
            lambda: o.rr(torch.ones(2, 3, 4), torch.ones(2, 3, 5)),
            "ref_hidden: needs the shape of hidden, (2, 3, 4), got (2, 3, 5)",
        ),
        (lambda: o.wga(LOGP, MASK[:, :2]), "mask: needs the shape of logp, (2, 3), got (2, 2)"),
        (lambda: o.npo(LOGP, FLAT), "ref_logp: needs the shape of logp, (2, 3), got (6,)"),
        (
            lambda: o.npo(LOGP, mask=MASK),
            "npo (preset paper) needs ref_logp, the frozen reference's logp per token; got None; it is "
            "token_stats_of(frozen, batch).logp of the frozen model",
        ),
        (lambda: o.wga(), "wga (preset paper) needs logp, token_stats' 'logp'; got None"),
        (lambda: o.npo(FLAT, FLAT), "sequence_ids is needed with flat (N,) statistics"),
        (lambda: o.ga(FLAT, reduction="sequence_mean"), "sequence_ids is needed with flat (N,) statistics"),
        (lambda: o.ga(FLAT, sequence_ids=IDS[:2]), "sequence_ids: needs the shape of logp, (6,), got (2,)"),
        (
            lambda: o.ga(LOGP, sequence_ids=IDS),
            "sequence_ids goes with flat (N,) statistics, but logp has shape",
        ),
        (lambda: o.ga(LOGP, num_sequences=3), "num_sequences=3: logp has 2 rows"),
        (lambda: o.ga(FLAT, num_sequences=-1), "num_sequences=-1: needs a whole number >= 0"),
        (lambda: o.ga(LOGP[None]), "got (1, 2, 3); of logits, token_stats(logits, targets) makes it"),
        (lambda: o.ga(LOGP, LOGP > 0, LOGP), "only ('logp', 'mask') go by position, got 3 arguments"),
        (lambda: o.ga(LOGP, MASK, mask=MASK), "ga: mask is given twice"),
        (lambda: o.wga(LOGP, msak=MASK), "wga: argument='msak': did you mean mask?"),
        (lambda: o.wga(LOGP, vocab_size=5), "wga: argument='vocab_size': "),
        (lambda: o.me(LOGP), "me: vocab_size=None: needs V, a whole number >= 1"),
        (lambda: o.me(LOGP, vocab_size=0), "me: vocab_size=0: needs V"),
        (lambda: o.get("bst", k=0), "bst: k=0: needs a whole number from 1 to 256"),
        (lambda: o.get("bst", k=257), "bst: k=257: needs a whole number from 1 to 256"),
        (lambda: o.get("bst", lam=1.5), "bst: lam=1.5: needs a number from 0 to 1"),
        (lambda: o.get("undial", b=0), "undial: b=0: needs a finite number > 0"),
        (lambda: o.get("ce_u", skip=-1), "ce_u: skip=-1: needs a whole number >= 0"),
        (lambda: o.get("flat", divergence="neyman"), "flat: divergence='neyman': needs one of ('tv', 'kl', "),
        (lambda: o.get("ga", temperature=0), "ga: temperature=0: needs a finite number > 0"),
        (lambda: o.get("ga", keep=0), "ga: keep=0: needs a number above 0, up to 1"),
        (lambda: o.get("ga", keep=True), "ga: keep=True: needs a number above 0, up to 1"),
        (lambda: o.get("ga", kept="small"), "ga: kept='small': did you mean smallest"),
        (lambda: o.get("kl", preset="open_unlearning", keep=0.5), "which counts padding too"),
        (lambda: o.kl(LOGP, keep=0.5), "kl: keep=0.5 goes by the likelihood of each token: needs logp=, or"),
        (lambda: o.rmu(torch.ones(1, 2, 4), keep=0.5), "needs logp=, or logp among the values, got NoneType"),
        (lambda: o.undial(LOGP, LOGP), "undial (preset paper) needs ref_entropy, the frozen reference's entropy"),
        (
            lambda: o.flat(LOGP, LOGP, preset="flat_code", refusal_num_positions=2),
            "flat: answer_num_positions=None: needs T - 1 of rows padded to T, a whole number >= 1",
        ),
        (
            lambda: o.pdu(uniform_ce=LOGP),
            "needs max_logp, token_stats' 'max_logp'; got None; it is asked for by outputs=",
        ),
        (lambda: o.get("me", positions="all"), "me: positions='all': needs one of real, template_free, supervised"),
        (lambda: o.ga(LOGP, count=-1), "count=-1: needs a finite number >= 0"),
        (lambda: o.ga(LOGP, count=math.nan), "count=nan: needs a finite number >= 0"),
        (lambda: o.ga(LOGP, count=torch.ones(2)), "count: needs a number or a 0-d tensor, got shape (2,)"),
        (lambda: o.ap(LOGP, LOGP[:1]), "needs as many sequences in each batch"),
        (lambda: o.ap(FLAT, LOGP), "refusal_sequence_ids is needed with flat (N,) statistics"),
        (
            lambda: o.dpo(LOGP, LOGP, LOGP, LOGP, answer_mask=MASK[:1]),
            "answer_mask: needs the shape of answer_logp",
        ),
        (
            lambda: o.dpo(LOGP, LOGP, LOGP, LOGP[:1]),
            "answer_ref_logp: needs the shape of answer_logp, (2, 3), got",
        ),
        (
            lambda: o.get("dpo")({"answer": TokenInputs({})}),
            "stats needs ['refusal', 'answer'], 'refusal' is missing",
        ),
        (
            lambda: o.get("kl")({"answer": TokenInputs({"logp": LOGP})}),
            "kl (preset paper) needs kl_pq, token_stats' 'kl_pq'; got None; it is asked for by outputs=('kl_pq',), "
            "with reference=",
        ),
        (lambda: o.ga(LOGP, MASK.to("meta")), "mask: needs the device of logp, cpu, got meta"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: o.ga([1.0]), "logp: needs a tensor, got list"),
        (lambda: o.ga(IDS), "logp: needs a floating dtype, got torch.int64"),
        (lambda: o.ga(LOGP, [True]), "mask: needs a tensor, got list"),
        (
            lambda: o.npo(LOGP, MASK),
            "npo: ref_logp: needs a floating dtype, got torch.bool, which is a mask: give it as mask=; ref_logp is "
            "token_stats_of(frozen, batch).logp",
        ),
        (
            lambda: o.dpo(LOGP, LOGP, LOGP, MASK),
            "dpo: answer_ref_logp: needs a floating dtype, got torch.bool, which is a mask: give it as answer_mask=",
        ),
        (lambda: o.ga(token_stats(LOGP, IDS[:2])), "logp: needs a tensor, got TokenStats, give its .logp"),
        (lambda: o.get("ga")({"answer": LOGP}), "ga: stats['answer']: needs TokenInputs, got Tensor"),
        (lambda: o.ga(LOGP, MASK.int()), "mask: needs torch.bool, got torch.int32"),
        (
            lambda: o.npo(FLAT, FLAT, sequence_ids=IDS.float()),
            "sequence_ids: needs torch.int64 or torch.int32",
        ),
    ],
)
def test_bad_types(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("ids", [IDS + 1, IDS - 1])
def test_sequence_ids_out_of_range(ids):
    with pytest.raises(IndexError, match="sequence_ids: needs 0 <= id < num_sequences=2"):
        o.npo(FLAT, FLAT, sequence_ids=ids, num_sequences=2)
