"""UnlearnTrainer on a model under peft whose head is adapted too."""

import peft
import pytest
import torch

from pyunlearn import objectives
from pyunlearn.model.cache import ReferenceCache
from pyunlearn.model.reference import AdapterOff
from pyunlearn.training.trainer import UnlearnTrainer


def adapted(tiny, **options):
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(**{"r": 4, "target_modules": ["lm_head"], **options}))
    with torch.no_grad():  # away from the start, where an adapter does nothing
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize(
    "options", [dict(), dict(target_modules=["q_proj"], modules_to_save=["lm_head"])], ids=["lora", "copy"]
)
def test_a_step_is_the_gradient_on_pefts_own_logits(tiny, arguments, tmp_path, options):
    """WGA + KL by hand against the trainer, with the reference cached from a model that has adapters as well."""
    reference = adapted(tiny, r=2)
    caches = {"retain": ReferenceCache.build(reference, tiny.retain, tmp_path / "retain", kl=True, progress=False)}
    model = adapted(tiny, **options)
    UnlearnTrainer(
        model=model,
        args=arguments(),
        train_dataset=tiny.pairs(),
        objectives=[objectives.get("wga", alpha=2.0), "kl"],
        reference=caches,
    ).train()

    plain, pairs = adapted(tiny, **options), tiny.pairs()
    batch = pairs.collate([pairs[i] for i in range(8)])

    def log_probabilities(module, kind):
        labels = batch[kind]["labels"][:, 1:]
        logits = module(batch[kind]["input_ids"], attention_mask=batch[kind]["attention_mask"]).logits[:, :-1]
        return logits[labels != -100].log_softmax(-1), labels[labels != -100]

    logp, labels = log_probabilities(plain, "forget")
    target = logp.gather(-1, labels[:, None])
    p, (q, _) = log_probabilities(plain, "retain")[0], log_probabilities(reference, "retain")
    loss = (target.detach().exp() ** 2 * target).mean() + (p.exp() * (p - q.detach())).sum(-1).mean()
    loss.backward()
    moved = 0
    for (name, after), before in zip(model.named_parameters(), plain.parameters(), strict=True):
        if after.requires_grad:
            torch.testing.assert_close(
                after, before - 0.02 * before.grad, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
            moved += "lm_head" in name
        else:
            assert torch.equal(after, before), name
    assert moved > 0


def test_its_own_base_is_the_reference(tiny, arguments):
    """Two steps by the adapters switched off are those by a second model, to the bit."""
    after = []
    for own in (True, False):
        model = adapted(tiny)
        UnlearnTrainer(
            model=model,
            args=arguments(max_steps=2),
            train_dataset=tiny.pairs(),
            objectives=["npo", "kl"],
            reference=AdapterOff(model) if own else tiny.model(),
        ).train()
        after.append([parameter.detach() for parameter in model.parameters()])
    assert all(map(torch.equal, *after))
    assert not all(map(torch.equal, after[0], adapted(tiny).parameters()))
