"""pyunlearn's losses in trainers of others; each file needs its library only where it is used.

    transformers           loss_func("npo", reference=frozen) for Trainer(compute_loss_func=...)
    trl                    with accelerate_trl(): DPO, KTO, GRPO and others by TRL, the head's numbers by us
    open_unlearning        every forget objective as one of its trainers
    open_unlearning_files  its experiments as our configuration

A loop of one's own, accelerate and Lightning need none of them: `pyunlearn.token_stats_of` and an objective
(docs/integrations.md).
"""
