"""Read by mypy (`make lint`), never run: a call it must reject has a `type: ignore`, which mypy tells if not needed.

The signatures are those of `pyunlearn/objectives/__init__.pyi`.
"""

import torch
from torch import Tensor

import pyunlearn as pu
from pyunlearn.objectives import get, register

logp, mask, ids = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(6, dtype=torch.int64)

loss: Tensor = pu.objectives.wga(logp, mask, alpha=1.0)
pu.objectives.wga(logp, alpah=1.0)  # type: ignore[call-arg]
pu.objectives.wga(logp, alpha="1")  # type: ignore[arg-type]
pu.objectives.wga([0.0], mask)  # type: ignore[arg-type]
pu.objectives.wga()  # type: ignore[call-arg]
text: str = pu.objectives.wga(logp)  # type: ignore[assignment]

pu.objectives.tnpo(logp, ref_logp=logp, mask=None, beta=4, preset="g_effect_code", reduction="sum", count=mask.sum())
pu.objectives.npo(logp.flatten(), logp.flatten(), sequence_ids=ids, num_sequences=2)
pu.objectives.npo(logp, mask=mask)  # type: ignore[call-arg]
pu.objectives.dpo(logp, logp, logp, logp, answer_mask=mask)
pu.objectives.dpo(logp, logp, logp, logp, mask=mask)  # type: ignore[call-arg]
pu.objectives.rmu(logp[..., None], layer="deep")
pu.objectives.rmu(logp[..., None], layer=1.5)  # type: ignore[arg-type]

pu.objectives.me(logp, mask, vocab_size=50)
pu.objectives.me(uniform_ce=logp, vocab_size=50, preset="closer_look_code")
pu.objectives.me(logp)  # type: ignore[call-overload]
pu.objectives.kl(kl_qp=logp, preset="g_effect_code")
pu.objectives.kl(kl_qp=logp)  # type: ignore[call-overload]


@register("doubled", slope=2.0)
def doubled(logp: Tensor, *, gamma: float = 2.0) -> Tensor:
    return 2 * logp


loss = doubled(logp, mask, gamma=1.0)
outputs: tuple[str, ...] = get("doubled", gamma=1.0).outputs
