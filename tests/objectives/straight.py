"""The objectives once more, straight from raw logits: probabilities instead of logs, loops over tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyunlearn import objectives

NAMES = objectives.names()
PRESETS = [(row.name, preset) for row in objectives.table() for preset in row.presets]
CASES = [(name, preset, reduction) for name, preset in PRESETS for reduction in objectives.get(name).variant.reductions]
BATCHES = ("answer", "refusal", "alternate", "generic")
STOPPED = ("wga", "tnpo", "wtnpo", "satimp")
CONSTANT = (*STOPPED, "ce_u", "bst")  # part of what they say has no gradient
K = 3  # of the beliefs that `Raw.statistics` has
PADDED = ("flat", "flat_code")
PAIRED = {
    "dpo": ("refusal", "answer"),
    "ap": ("refusal", "answer"),
    "altpo": ("alternate", "answer"),
    "flat": ("refusal", "answer"),
}
USED = {**PAIRED, "idk": ("refusal",), "whp": ("generic",)}  # batches; of the others the answers alone
BROADCAST = (("rmu", "open_unlearning"), ("rr", "open_unlearning"))


LENGTHS: dict[str, int] = {}  # of the rows of each batch, padded


@dataclass
class Raw:
    """Padded sequences as a model gives them: logits and reference logits (B, T, V), targets with -100."""

    logits: Tensor
    reference: Tensor
    targets: Tensor

    @property
    def mask(self) -> Tensor:
        return self.targets != -100

    def statistics(self, b: float = 10.0) -> dict[str, Tensor]:
        """(B, T) statistics by torch alone, differentiable in logits; NaN where ignored, as a trap."""
        log_p, log_q = self.logits.log_softmax(-1), self.reference.log_softmax(-1)
        at = self.targets.clamp_min(0)[..., None]
        lowered = (log_q - b * torch.zeros_like(log_q).scatter(-1, at, 1.0)).log_softmax(-1)
        values = {
            "logp": log_p.gather(-1, at)[..., 0],
            "ref_logp": log_q.gather(-1, at)[..., 0],
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "kl_pq": (log_p.exp() * (log_p - log_q)).sum(-1),
            "kl_qp": (log_q.exp() * (log_q - log_p)).sum(-1),
            "lowered_kl_qp": (lowered.exp() * (lowered - log_p)).sum(-1),
            "uniform_ce": -log_p.mean(-1),
            "log_nll": (-log_p.gather(-1, at)[..., 0]).log(),
            "topk": beliefs(log_p),
            "max_logp": log_p.max(-1).values,
            "ref_entropy": -(log_q.exp() * log_q).sum(-1),
            "hidden": log_p.exp()[..., :4],
            "ref_hidden": log_q.exp()[..., :4],
        }
        ignored = {2: ~self.mask, 3: ~self.mask[..., None]}
        return {name: value.masked_fill(ignored[value.dim()], float("nan")) for name, value in values.items()}

    def inputs(self, flat: bool, b: float = 10.0) -> objectives.TokenInputs:
        """As the objectives take them, (B, T) with a mask or flat with sequence ids."""
        values = self.statistics(b)
        layout = {"mask": self.mask}
        if flat:
            values = {name: value[self.mask] for name, value in values.items()}
            layout = {"sequence_ids": self.mask.nonzero()[:, 0]}
        reference = {name: values.pop(name) for name in ("ref_logp", "ref_hidden", "ref_entropy")}
        layout |= {"vocab_size": self.logits.size(-1), "num_sequences": len(self.targets)}
        layout |= {"num_positions": self.targets.size(-1), "labelled": torch.ones_like(self.mask)}
        layout["labelled"] = layout["labelled"][self.mask] if flat else layout["labelled"]
        return objectives.TokenInputs(values, **reference, **layout)

    def part(self, rows: slice) -> Raw:
        return Raw(self.logits[rows], self.reference[rows], self.targets[rows])


def beliefs(log_p: Tensor) -> Tensor:
    """(...) sum over the K likeliest of their own renormalised probability, which is constant, times log p."""
    top = log_p.topk(K).values
    return (top.detach().softmax(-1) * top).sum(-1)


def make(batch=5, length=7, vocabulary=11, seed=0, dtype=torch.float64, empty: int | None = None) -> Raw:
    """Ragged sequences; number `empty` has no supervised token at all."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, vocabulary, generator=g, dtype=torch.float64) * 2
    reference = logits + torch.randn(batch, length, vocabulary, generator=g, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (batch, length), generator=g)
    start = torch.randint(0, length // 2 + 1, (batch, 1), generator=g)
    stop = torch.randint(length // 2 + 1, length + 1, (batch, 1), generator=g)
    column = torch.arange(length)
    targets[(column < start) | (column >= stop)] = -100
    if empty is not None:
        targets[empty] = -100
    return Raw(logits.to(dtype).requires_grad_(), reference.to(dtype), targets)


def batches(seed: int = 0, **shape) -> dict[str, Raw]:
    """Five answers, refusals and so on, of other lengths; one of each is empty, not the same one as of the answers."""
    return {
        "answer": make(length=7, seed=seed, empty=1, **shape),
        "refusal": make(length=5, seed=seed + 1, empty=2, **shape),
        "alternate": make(length=6, seed=seed + 2, empty=2, **shape),
        "generic": make(length=7, seed=seed + 3, empty=0, **shape),
    }


def inputs(raw: dict[str, Raw], flat: bool = False, b: float = 10.0) -> dict[str, objectives.TokenInputs]:
    return {batch: each.inputs(flat, b) for batch, each in raw.items()}


def from_logp(objective, logp: Tensor, reference: Tensor, **layout) -> objectives.TokenInputs:
    """Every statistic that the objective needs made of one tensor, hidden states of two numbers a token."""

    def wide(tensor):
        return torch.stack([tensor, 2 * tensor], -1)

    values = dict.fromkeys(objective.outputs, logp) | {"hidden": wide(logp)}
    return objectives.TokenInputs(values, reference, ref_hidden=wide(reference), ref_entropy=-reference, **layout)


def equation(name: str, raw: dict[str, Raw]) -> Tensor:
    """As the paper writes it: the mean over sequences of the sum over their tokens, or of their tokens' mean."""
    rows = len(raw["answer"].targets)
    parts = [{batch: each.part(slice(row, row + 1)) for batch, each in raw.items()} for row in range(rows)]
    parts = [part for part in parts if all(part[batch].mask.any() for batch in USED.get(name, ("answer",)))]
    losses = [straight_loss(name, "paper", "sum", part) for part in parts]
    lengths = [int(part["answer"].mask.sum()) if name in ("me", "rmu", "rr") else 1 for part in parts]  # 1/|s| sum
    return sum(loss / n for loss, n in zip(losses, lengths, strict=True)) / len(losses)


def straight_loss(name: str, preset: str, reduction: str, raw: dict[str, Raw], **options: float) -> Tensor:
    """The loss of spec and papers by loops, with `options` in place of the defaults written here."""
    LENGTHS.update({batch: each.targets.size(-1) for batch, each in raw.items()})
    values: list[Tensor] = []  # per sequence: the sum over its tokens, or its own value
    lengths: list[int] = []
    for row in range(len(raw["answer"].targets)):
        tokens = {batch: list(tokens_of(each, row)) for batch, each in raw.items()}
        if (name, preset) == ("ce_u", "open_unlearning"):
            tokens["answer"] = tokens["answer"][options.get("skip", 1) :]
        used = USED.get(name, ("answer",))
        if all(tokens[batch] for batch in used):
            values.append(SEQUENCE[name](tokens, preset, options))
            lengths.append(len(tokens[used[0]]))
    if (name, preset) in BROADCAST:  # (B,) sums over (B, 1) lengths are (B, B)
        values = [value * sum(1 / n for n in lengths) / len(lengths) for value in values]
    if reduction == "sum":
        return sum(values)
    if reduction == "token_mean":
        return sum(values) / sum(lengths)
    if reduction == "sequence_mean":
        return sum(values) / len(values)
    return sum(value / n for value, n in zip(values, lengths, strict=True)) / len(values)


def tokens_of(raw: Raw, row: int):
    """(p, q, target) of each supervised token of a sequence: two distributions and an index."""
    for t, target in enumerate(raw.targets[row].tolist()):
        if target != -100:
            yield torch.softmax(raw.logits[row, t], -1), torch.softmax(raw.reference[row, t], -1), target


def nll(tokens) -> Tensor:
    return -sum(torch.log(p[y]) for p, _, y in tokens)


def ref_nll(tokens) -> Tensor:
    return -sum(torch.log(q[y]) for _, q, y in tokens)


def weighted(weight):
    """-sg(weight) * loss, summed over the answer's tokens."""

    def value(tokens, preset, options):
        total = 0.0
        for p, q, y in tokens["answer"]:
            with torch.no_grad():
                w = weight(p[y], q[y], preset, options)
            total = total - w * -torch.log(p[y])
        return total

    return value


def satimp_weight(p, q, preset, options):
    b2 = options.get("beta2", 1.0 if preset == "open_unlearning" else 0.1)
    return p ** options.get("beta1", 5.0) * (1 - p) ** b2


def tnpo_weight(p, q, preset, options, beta=4.0, alpha=0.0):
    beta, alpha = options.get("beta", beta), options.get("alpha", alpha)
    epsilon = options.get("epsilon", 1e-5 if preset == "g_effect_code" else 0.0)
    return 2 * p ** (beta + alpha) / (p**beta + q**beta + epsilon)


def npo(tokens, preset, options):
    beta = options.get("beta", 0.5 if preset == "g_effect_code" else 0.1)
    ratio = torch.exp(ref_nll(tokens["answer"]) - nll(tokens["answer"]))
    return 2 / beta * torch.log(1 + ratio**beta)


def simnpo(tokens, preset, options):
    beta, margin = options.get("beta", 4.5), options.get("margin", 0.0)
    mean = nll(tokens["answer"]) / len(tokens["answer"])
    inside = beta * mean - margin if preset == "paper" else beta * (mean - margin)
    return -2 / beta * torch.log(1 / (1 + torch.exp(-inside)))


def dpo(tokens, preset, options, winner="refusal"):
    beta, factor = options.get("beta", 0.1), options.get("factor", 1.0 if preset == "standard" else 2.0)
    won = ref_nll(tokens[winner]) - nll(tokens[winner])
    lost = ref_nll(tokens["answer"]) - nll(tokens["answer"])
    return -factor / beta * torch.log(1 / (1 + torch.exp(-beta * (won - lost))))


def ap(tokens, preset, options):
    beta = options.get("beta", 0.1)
    return -1 / beta * torch.log(1 / (1 + torch.exp(-beta * (nll(tokens["refusal"]) - nll(tokens["answer"])))))


def divergence(one, other) -> Tensor:
    return sum((a * torch.log(a / b)).sum() for a, b in zip(one, other, strict=True))


def me(tokens, preset, options):
    p = [p for p, _, _ in tokens["answer"]]
    uniform = [torch.full_like(each, 1 / len(each)) for each in p]
    return divergence(uniform, p) if preset == "closer_look_code" else divergence(p, uniform)


def rmu(tokens, preset, options):
    c, size = options.get("c", {"wmdp": 20.0, "wmdp_paper": 6.5}.get(preset, 2.0)), 4
    u = torch.rand(size, generator=torch.Generator().manual_seed(options.get("seed", 0))).double()
    u = c * (u / sum(x**2 for x in u) ** 0.5 if preset in ("wmdp", "wmdp_paper", "open_unlearning") else u)
    total = sum((p[j] - u[j]) ** 2 for p, _, _ in tokens["answer"] for j in range(size))
    return total if preset in ("paper", "wmdp_paper") else total / size


def rr(tokens, preset, options):
    total = sum((p[j] - q[j]) ** 2 for p, q, _ in tokens["answer"] for j in range(4))
    return total if preset in ("paper", "wmdp_paper") else total / 4


def kl(tokens, preset, options):
    p, q = [p for p, _, _ in tokens["answer"]], [q for _, q, _ in tokens["answer"]]
    return divergence(p, q) if preset == "paper" else divergence(q, p)


def bst(tokens, preset, options):
    lam, beta = options.get("lam", 0.2), options.get("beta", 0.1)
    total = 0.0
    for p, _, y in tokens["answer"]:
        with torch.no_grad():
            likeliest = p.argsort(descending=True)[:K]
            target = torch.zeros_like(p)
            target[likeliest] = lam * p[likeliest] / sum(p[likeliest])
            target[y] += 1 - lam
        total = total + (target * torch.log(p)).sum()
    weight = 1.0
    if preset == "bstw":
        with torch.no_grad():
            now, before = torch.exp(-nll(tokens["answer"])) ** beta, torch.exp(-ref_nll(tokens["answer"])) ** beta
            weight = 2 * now / (now + before)
    return weight * total


def cross_entropies(target):
    """Summed over the answer's tokens, to a target (p, q, y, options) without gradient."""

    def value(tokens, preset, options):
        total = 0.0
        for p, q, y in tokens["answer"]:
            with torch.no_grad():
                goal = target(p, q, y, options)
            total = total - (goal * torch.log(p)).sum()
        return total

    return value


def adjusted(p, q, y, options):
    raised = q.clone()
    raised[y] = q[y] * math.exp(-options.get("b", 10.0))
    return raised / raised.sum()


def without(p, q, y, options):
    others = p.clone()
    others[y] = 0
    return others / others.sum()


def pdu(tokens, preset, options):
    return sum((torch.log(p).max() - torch.log(p).mean()) ** 2 for p, _, _ in tokens["answer"])


def flat(tokens, preset, options):
    sums = [sum(p[y] for p, _, y in tokens[batch]) for batch in ("refusal", "answer")]
    sizes = [LENGTHS[batch] if preset == "flat_code" else len(tokens[batch]) for batch in ("refusal", "answer")]
    e, f = (total / size for total, size in zip(sums, sizes, strict=True))
    return {
        "tv": -torch.tanh(e) / 2 + torch.tanh(f) / 2,
        "kl": -e + torch.exp(f - 1),
        "pearson": -e + f**2 / 4 + f,
        "jeffrey": -e + f + f**2 / 4 + f**3 / 16,
        "js": torch.log(1 + torch.exp(-e)) - math.log(2) + f + torch.log(1 + torch.exp(-f)) - math.log(2),
        "reverse_kl": torch.exp(e) - 1 - f,
        "hellinger": -(1 - torch.exp(e)) + (1 - torch.exp(f)) / torch.exp(f),
        "neyman": -(1 - torch.exp(e)) + 2 - 2 * torch.sqrt(1 - f),
    }[options.get("divergence", "tv")]


SEQUENCE = {
    "bst": bst,
    "undial": cross_entropies(adjusted),
    "ce_u": cross_entropies(without),
    "pdu": pdu,
    "flat": flat,
    "ga": lambda tokens, preset, options: -nll(tokens["answer"]),
    "gd": lambda tokens, preset, options: nll(tokens["answer"]),
    "idk": lambda tokens, preset, options: nll(tokens["refusal"]),
    "wga": weighted(lambda p, q, preset, options: p ** options.get("alpha", 5.0 if preset == "g_effect_code" else 1.0)),
    "tnpo": weighted(tnpo_weight),
    "wtnpo": weighted(
        lambda p, q, preset, options: tnpo_weight(
            p, q, preset, options, beta=4.0 if preset == "g_effect_code" else 5.0, alpha=1.5
        )
    ),
    "satimp": weighted(satimp_weight),
    "npo": npo,
    "simnpo": simnpo,
    "dpo": dpo,
    "altpo": lambda tokens, preset, options: dpo(tokens, preset, options, "alternate"),
    "whp": lambda tokens, preset, options: nll(tokens["generic"]),
    "ap": ap,
    "me": me,
    "kl": kl,
    "rmu": rmu,
    "rr": rr,
}
