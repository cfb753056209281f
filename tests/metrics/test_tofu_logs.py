"""ROUGE-L recall and probability against the logs that TOFU's own evaluation wrote for two models.

The folder is PYUNLEARN_TOFU_LOGS, else ../shared/data/tofu_eval_logs beside the repository; without it, a few
of its entries below serve.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import hmean

from pyunlearn.metrics import probability, rouge_l_recall

BESIDE = Path(__file__).parents[3] / "shared" / "data" / "tofu_eval_logs"
LOGS = Path(os.environ.get("PYUNLEARN_TOFU_LOGS", BESIDE))
SETS = ("eval_log_forget", "eval_log", "eval_real_author_wo_options", "eval_real_world_wo_options")
# Model utility by TOFU's definition with the geometric truth ratio.
UTILITY = {"llama2-7b_full_wd0.01": 0.6226773637, "llama2-7b_retain90_wd0.01": 0.6137449952}
# From the retain90 model's logs: generated, answer, ROUGE-L recall, summed loss, tokens, mean loss.
EXAMPLES = [
    (
        "The author's full name is Ming-Hsuan Yang.",
        "The author's full name is Hsiao Yun-Hwa.",
        *(0.6666666666666666, 31.211923599243164, 17, 1.8359955549240112),
    ),
    (
        "Hsiao Yun-Hwa identifies as a member of the LGBTQ+ community.",
        "Hsiao Yun-Hwa is part of the LGBTQ+ community.",
        *(0.7777777777777778, 14.580411911010742, 20, 0.7290205955505371),
    ),
    (
        "'The Invisible Tapestry' is an example of Hsiao Yun-Hwa's work that is deeply influenced by her "
        "life experiences, particularly her childhood memories of growing up in Taipei.",
        'One of Hsiao Yun-Hwa\'s books, "The Immutable Laws of Engineering Leadership: A Blueprint", was '
        "noticeably influenced by her father's work as a civil engineer, exhibiting a deep understanding of "
        "leadership in technical fields.",
        *(0.2777777777777778, 150.13514709472656, 57, 2.6339499950408936),
    ),
    (
        "Japan is commonly referred to as the Land of the Rising Sun due to its eastward orientation towards the sun.",
        "Japan",
        *(1.0, 16.469289779663086, 3, 5.489763259887695),
    ),
    (
        "The author who is famous for the series 'A Song of Ice and Fire' is George R. R. Martin.",
        "George R.R. Martin",
        *(1.0, 20.320255279541016, 8, 2.540031909942627),
    ),
]
# One sample a set with round numbers: the three times (probability, ROUGE, truth ratio) of `ROUND_PARTS`.
ROUND = [
    {
        "gt_loss": {"0": 2 * math.log(2)},
        "num_token_gt": {"0": 2},
        "avg_paraphrased_loss": {"0": 0.0},
        "average_perturb_loss": {"0": [math.log(2), math.log(8)]},
        "generated_text": {"0": ["", "a b", "a b c d"]},
    }
] * 3
ROUND_PARTS = [1 / 2, 1 / 2, 3 / 4] + 2 * [0.5 / (0.5 + 1 / 2 + 1 / 8), 1 / 2, 3 / 4]


def load(folder, name):
    return json.loads((LOGS / folder / f"{name}.json").read_text())


def examples():
    """(generated, answer, recall, summed loss, tokens, mean loss) of every sample at hand."""
    for folder in UTILITY if LOGS.is_dir() else ():
        for name in SETS:
            log = load(folder, name)
            for key, (_, generated, answer) in log["generated_text"].items():
                losses = log["gt_loss"][key], log["num_token_gt"][key], log["avg_gt_loss"][key]
                yield (generated, answer, log["rougeL_recall"][key], *losses)
    yield from EXAMPLES


def test_rouge_l_recall_is_tofus():
    checked = [(rouge_l_recall(generated, answer), recall) for generated, answer, recall, *_ in examples()]
    assert len(checked) >= len(EXAMPLES)
    assert max(abs(ours - theirs) for ours, theirs in checked) < 1e-12


def test_probability_is_tofus():
    nll, num_tokens, mean_loss = (torch.tensor(column) for column in list(zip(*examples(), strict=True))[3:])
    torch.testing.assert_close(probability(nll, num_tokens), torch.exp(-mean_loss.double()), atol=1e-7, rtol=1e-6)


def utility(logs):
    """Nine means (probability, ROUGE, truth ratio on three sets), their harmonic mean, from the parts under
    test.
    """
    parts = []
    for log, has_options in zip(logs, (False, True, True), strict=True):
        columns = ("gt_loss", "num_token_gt", "avg_paraphrased_loss", "average_perturb_loss")
        nll, num_tokens, paraphrased, perturbed = (torch.tensor(list(log[column].values())) for column in columns)
        p = probability(nll, num_tokens)
        if has_options:
            p = p / (p + torch.exp(-perturbed.double()).sum(1))
        ratio = torch.exp(paraphrased.double() - perturbed.double().mean(1))
        recalls = [rouge_l_recall(generated, answer) for _, generated, answer in log["generated_text"].values()]
        parts += [p.mean().item(), np.mean(recalls), (1 - ratio).clamp_min(0).mean().item()]
    return hmean(parts)


def test_model_utility_from_our_parts():
    assert utility(ROUND) == pytest.approx(9 / sum(1 / part for part in ROUND_PARTS))
    for folder, published in UTILITY.items() if LOGS.is_dir() else ():
        assert utility([load(folder, name) for name in SETS[1:]]) == pytest.approx(published, abs=2e-9)
