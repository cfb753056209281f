"""Every number of TOFU's evaluation again, from the losses and texts that its own evaluation wrote for two models.

The folder is PYUNLEARN_TOFU_LOGS, else tofu_eval_logs beside PYUNLEARN_TOFU, else ../shared/data/tofu_eval_logs beside
the repository; without it, a few of its entries below serve.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pyunlearn.metrics import aggregate, forget_quality, get_suite, probability, read_log, rouge_l_recall, rouge_scores
from pyunlearn.metrics.teacher_forced import ratio_of_losses, share_of_options

BESIDE = Path(__file__).parents[3] / "shared" / "data" / "tofu"
TOFU = Path(os.environ.get("PYUNLEARN_TOFU", BESIDE))
LOGS = Path(os.environ.get("PYUNLEARN_TOFU_LOGS", TOFU.parent / "tofu_eval_logs"))
SETS = ("eval_log_forget", "eval_log", "eval_real_author_wo_options", "eval_real_world_wo_options")
FULL, RETAIN = "llama2-7b_full_wd0.01", "llama2-7b_retain90_wd0.01"
# Model utility with the geometric and with the arithmetic truth ratio.
UTILITY = {FULL: (0.6226773637, 0.5858860351), RETAIN: (0.6137449952, 0.5752399175)}
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
# From the full model's log of the forget set: losses per token of the paraphrase and the wrong answers, their ratio.
RATIO = (
    2.2287230491638184,
    [3.355818271636963, 3.690197229385376, 3.719407558441162, 4.432241916656494, 2.973668098449707],
    0.2452337145805359,
)
# One sample a set with round numbers, and its nine (probability, ROUGE, truth ratio).
ROUND = {
    "avg_gt_loss": {"7": math.log(2)},
    "avg_paraphrased_loss": {"7": 0.0},
    "average_perturb_loss": {"7": [math.log(2), math.log(8)]},
    "generated_text": {"7": ["What?", "a b", "a b c d"]},
}
SHARE = 0.5 / (0.5 + 1 / 2 + 1 / 8)
ROUND_PARTS = {"geometric": [1 / 2, 1 / 2, 3 / 4] + 2 * [SHARE, 1 / 2, 3 / 4],
               "arithmetic": [1 / 2, 1 / 2, 11 / 16] + 2 * [SHARE, 1 / 2, 11 / 16]}  # fmt: skip


def load(folder, name):
    return json.loads((LOGS / folder / f"{name}.json").read_text())


def recorded():
    """(model, set, log) of all that are at hand."""
    return [(folder, name, load(folder, name)) for folder in UTILITY for name in SETS] if LOGS.is_dir() else []


def examples():
    """(generated, answer, recall, summed loss, tokens, mean loss) of every sample at hand."""
    for _, _, log in recorded():
        for key, (_, generated, answer) in log["generated_text"].items():
            losses = log["gt_loss"][key], log["num_token_gt"][key], log["avg_gt_loss"][key]
            yield (generated, answer, log["rougeL_recall"][key], *losses)
    yield from EXAMPLES


def numbers_of(folder, variant="geometric", retain=None):
    """The suite's aggregates, from a log alone."""
    numbers, _ = aggregate(
        get_suite("tofu").aggregates, read_log(folder, variant), {"retain": retain} if retain else {}
    )
    return {number.name: number for number in numbers}


def test_rouge_l_recall_is_tofus():
    checked = [(rouge_l_recall(generated, answer), recall) for generated, answer, recall, *_ in examples()]
    assert len(checked) >= len(EXAMPLES)
    assert max(abs(ours - theirs) for ours, theirs in checked) < 1e-12


def test_rouge_1_recall_is_tofus():
    assert rouge_scores("b a b c", "b b b d")["rouge1_recall"] == 0.5
    for _, _, log in recorded():
        for key, (_, generated, answer) in log["generated_text"].items():
            assert rouge_scores(generated, answer)["rouge1_recall"] == pytest.approx(
                log["rouge1_recall"][key], abs=1e-12
            )


def test_probability_is_tofus():
    nll, num_tokens, mean_loss = (torch.tensor(column) for column in list(zip(*examples(), strict=True))[3:])
    torch.testing.assert_close(probability(nll, num_tokens), torch.exp(-mean_loss.double()), atol=1e-7, rtol=1e-6)


def test_truth_ratio_is_tofus():
    """Recorded in float32."""
    samples = [RATIO]
    for _, _, log in recorded():
        keys = log["truth_ratio"]
        samples += [(log["avg_paraphrased_loss"][k], log["average_perturb_loss"][k], keys[k]) for k in keys]
    assert len(samples) in (1, 1 + 2 * (300 + 300 + 100 + 117))
    found = [ratio_of_losses(paraphrased, perturbed) for paraphrased, perturbed, _ in samples]
    np.testing.assert_allclose(found, [ratio for *_, ratio in samples], rtol=3e-6)


def test_the_share_among_options_is_tofus():
    assert share_of_options(math.log(2), [math.log(2), math.log(8)]) == pytest.approx(SHARE)
    for _, _, log in recorded():
        for key, loss in log.get("normalized_gt_loss", {}).items():
            found = share_of_options(log["avg_gt_loss"][key], log["average_perturb_loss"][key])
            assert found == pytest.approx(math.exp(-loss), rel=1e-9)


@pytest.mark.parametrize("variant", ["geometric", "arithmetic"])
def test_model_utility_is_tofus(variant, tmp_path):
    for name in SETS:
        (tmp_path / f"{name}.json").write_text(json.dumps(ROUND))
    expected = 9 / sum(1 / part for part in ROUND_PARTS[variant])
    assert numbers_of(tmp_path, variant)["model_utility"].value == pytest.approx(expected, rel=1e-12)
    for folder, values in UTILITY.items() if LOGS.is_dir() else ():
        found = numbers_of(LOGS / folder, variant)["model_utility"].value
        assert found == pytest.approx(values[variant == "arithmetic"], abs=1e-9)


def test_forget_quality_is_tofus():
    if not LOGS.is_dir():
        assert forget_quality([1.0] * 12, [1.0] * 12).p_value == 1
        return
    retain = read_log(LOGS / RETAIN)
    number = numbers_of(LOGS / FULL, retain=retain)["forget_quality"]
    assert number.value == pytest.approx(1.834066410994743e-21, rel=1e-12)
    assert number.more["D"] == pytest.approx(0.3966667, abs=1e-7)
    assert number.more["ln p"] == pytest.approx(math.log(1.834066410994743e-21), rel=1e-12)
    assert (number.samples, number.note) == ("300 / 300", "")
    assert numbers_of(LOGS / RETAIN, retain=retain)["forget_quality"].value == 1
