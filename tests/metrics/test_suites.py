"""Suites on a tiny model against a straight-line evaluation, sample by sample; and what is told where a line is not."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp

from pyunlearn.data import QA, PromptFormat, QADataset, make_prompt
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import (
    METRICS,
    SUITES,
    Aggregate,
    Classifier,
    Embedder,
    Entry,
    Measure,
    Suite,
    evaluate_suite,
    get_suite,
    metric,
    read_log,
    readings_by,
    write_log,
)
from pyunlearn.metrics.examine import Examinations, aggregate
from pyunlearn.metrics.suites import Outcome
from pyunlearn.metrics.suites.tofu import TOFU_SUITES

from .small_encoders import save_bert, save_classifier

WORDS = ("sea", "town", "hill", "play", "poet", "novel", "river")
SET_NAMES = ("forget", "retain", "real_authors", "world_facts")
PREFIX = dict(zip(SET_NAMES, ("forget", "retain", "ra", "wf"), strict=True))
WITH_TOOLS = {
    "clean",
    "cosine_similarity",
    "entailment_score",
    "mia_reference",
    "nearest_answer",
    "naturalness",
    "similarity",
}  # of models that are not given here


def items_of(name, count, paraphrased=True):
    return [
        QA(
            f"Where in {name} does number {i} live?",
            f"By the {WORDS[i % 7]}.",
            f"Near the {WORDS[i % 7]}, they say." if paraphrased else None,
            tuple(f"Near the {WORDS[(i + j) % 7]}, they say." for j in (1, 2, 3)),
            f"Number {i} of {name}: where is the home?",
        )
        for i in range(count)
    ]


SETS = {
    "forget": items_of("forget", 5),
    "retain": items_of("retain", 4),
    "real_authors": items_of("authors", 3, paraphrased=False),
    "world_facts": items_of("facts", 4, paraphrased=False),
    "holdout": items_of("holdout", 6),
}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [
        f"Question: {question}\nAnswer: {answer}"
        for items in SETS.values()
        for item in items
        for question in (item.question, item.paraphrased_question)
        for answer in (item.answer, item.paraphrased_answer or "", *item.perturbed_answers)
    ]
    return train_tokenizer(texts, vocab_size=400)


@pytest.fixture(scope="module")
def models(tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 96}
    made = [tiny_llama(tokenizer, seed=seed, **sizes).eval() for seed in (0, 1)]
    with torch.no_grad():
        for model in made:
            model.model.embed_tokens.weight.mul_(10)
    return made


@pytest.fixture(scope="module")
def results(models, tokenizer):
    """Of the second model, and of the first with the second's log as the retained one's."""
    retained = evaluate_suite(models[1], tokenizer, SETS, small("open_unlearning"), progress=False)
    reference = readings_by(models[1], tokenizer, progress=False)
    own = evaluate_suite(
        models[0], tokenizer, SETS, small("open_unlearning"), logs={"retain": retained.log},
        tools={"reference": reference}, batch_size=5, progress=False,
    )  # fmt: skip
    return own, retained


def small(name):
    return replace(get_suite(name), max_new_tokens=12)


class Plain:
    """The straight line: one text at a time through the model's own logits."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.format = model, tokenizer, PromptFormat(tokenizer)

    @torch.no_grad()
    def tokens(self, question, answer):
        """(log-probabilities, whether greedy) of the answer's tokens."""
        encoded = self.format.encode(question, answer)
        logp = self.model(torch.tensor([encoded.input_ids])).logits[0, :-1].double().log_softmax(-1)
        pairs = [(row, label) for row, label in zip(logp, encoded.labels[1:], strict=True) if label != -100]
        return [float(row[label]) for row, label in pairs], [int(row.argmax()) == label for row, label in pairs]

    def loss(self, question, answer):
        logp, _ = self.tokens(question, answer)
        return -sum(logp) / len(logp)

    @torch.no_grad()
    def continued(self, prompt, count):
        ids, start = list(prompt), len(prompt)
        while len(ids) < start + count and (len(ids) == start or ids[-1] != self.tokenizer.eos_token_id):
            ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[start:]

    def written(self, question):
        ids = self.continued(self.format.prompt_ids(question), 12)
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def ratio(self, item):
        """r as OpenUnlearning has it."""
        correct = math.exp(-self.loss(item.question, item.paraphrased_answer or item.answer))
        wrong = math.exp(-np.mean([self.loss(item.question, each) for each in item.perturbed_answers]))
        return wrong / (correct + 1e-10), correct / (correct + wrong + 1e-10)

    def share(self, item):
        right = math.exp(-self.loss(item.question, item.answer))
        wrong = sum(math.exp(-self.loss(item.question, each)) for each in item.perturbed_answers)
        return right / (right + wrong + 1e-10)

    def strength(self, item):
        _, hits = self.tokens(item.question, item.answer)
        hits = hits[:-1]
        return 1 - next(k for k in range(len(hits)) if all(hits[k:]) or k == len(hits) - 1) / len(hits)

    def min_k(self, item):
        logp = sorted(self.tokens(item.question, item.answer)[0][:-1])
        count = max(1, int(0.4 * len(logp)))
        return -sum(logp[:count]) / count


@pytest.fixture(scope="module")
def plain(models, tokenizer):
    return Plain(models[0], tokenizer)


def close(values):
    return pytest.approx(values, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("name", SET_NAMES)
def test_probabilities_and_ratios_are_the_straight_lines(results, plain, name):
    log, items = results[0].log, SETS[name]
    p, prefix = log[f"{PREFIX[name]}_Q_A_Prob"], PREFIX[name]
    losses = [plain.loss(item.question, item.answer) for item in items]
    assert p.column("avg_loss") == close(losses)
    assert p.column("prob") == close([math.exp(-loss) for loss in losses])
    assert p.value == close(np.mean([math.exp(-loss) for loss in losses]))
    ratios = [plain.ratio(item)[0] for item in items]
    ratio = log["forget_truth_ratio" if name == "forget" else f"{prefix}_Truth_Ratio"]
    assert ratio.column() == close(ratios)
    reduced = [min(r, 1 / r) if name == "forget" else max(0, 1 - r) for r in ratios]
    assert ratio.value == close(np.mean(reduced))
    if prefix in ("ra", "wf"):
        assert log[f"{prefix}_Q_A_Prob_normalised"].column("prob") == close([plain.share(item) for item in items])


@pytest.mark.parametrize("name", SET_NAMES)
def test_rouge_is_the_packages(results, plain, name):
    kinds = {"rouge1_recall": ("rouge1", "recall"), "rougeL_recall": ("rougeL", "recall"),
             "rougeL_f1": ("rougeL", "fmeasure")}  # fmt: skip
    entry, scorer = results[0].log[f"{PREFIX[name]}_Q_A_ROUGE"], RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for i, item in enumerate(SETS[name]):
        sample, written = entry.samples[i], plain.written(item.question)
        assert (sample["generation"], sample["ground_truth"]) == (written, item.answer)
        assert sample["input"] == plain.format.prompt(item.question)
        scores = scorer.score(item.answer, written)
        for key, (kind, part) in kinds.items():
            assert sample[key] == pytest.approx(getattr(scores[kind], part), abs=1e-12)
    assert entry.value == pytest.approx(np.mean(entry.column("rougeL_recall")))


def test_memorization_is_the_straight_lines(results, plain):
    log, items = results[0].log, SETS["forget"]
    assert log["extraction_strength"].column() == close([plain.strength(item) for item in items])
    hits = [plain.tokens(item.question, item.answer)[1][:-1] for item in items]
    assert log["exact_memorization"].column() == close([sum(each) / len(each) for each in hits])
    paraphrased = [math.exp(-plain.loss(item.question, item.paraphrased_answer)) for item in items]
    assert log["forget_Q_A_PARA_Prob"].column("prob") == close(paraphrased)
    wrong = [[plain.loss(item.question, each) for each in item.perturbed_answers] for item in items]
    perturbed = log["forget_Q_A_PERT_Prob"]
    assert np.array(perturbed.column("avg_loss")) == close(np.array(wrong))
    assert np.array(perturbed.column("prob")) == close(np.exp(-np.array(wrong)))
    assert perturbed.value == close(np.exp(-np.array(wrong)).mean())
    assert log["forget_truth_ratio_prob_mean"].column() == close([plain.ratio(item)[1] for item in items])
    names = ("extraction_strength", "exact_memorization", "forget_Q_A_PARA_Prob", "forget_truth_ratio_prob_mean")
    assert log["memorization"].value == pytest.approx(hmean([1 - log[name].value for name in names]))


def test_attacks_are_the_straight_lines(results, plain):
    entry = results[0].log["mia_min_k"]
    own, held = ([plain.min_k(item) for item in SETS[name]] for name in ("forget", "holdout"))
    assert entry.parts["forget"].column() == close(own)
    assert entry.parts["holdout"].column() == close(held)
    assert entry.value == pytest.approx(np.mean([[(b > a) + (a == b) / 2 for b in held] for a in own]))
    assert {f"mia_{name}" for name in ("loss", "zlib", "reference", "min_k", "min_k_plus_plus", "gradnorm")} <= {
        number.name for number in results[0].numbers if number.value is not None and number.samples == "5 / 6"
    }


def test_aggregates_are_their_definitions(results):
    own, retained = results
    log, numbers = own.log, {number.name: number for number in own.numbers}
    parts = [f"{p}_{name}" for p in ("retain", "ra", "wf") for name in ("Q_A_ROUGE", "Truth_Ratio")]
    parts += ["retain_Q_A_Prob", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised"]
    values = [log[name].value for name in parts]
    assert log["model_utility"].value == pytest.approx(hmean(values) if min(values) else 0)
    ratios = [entry["forget_truth_ratio"].column() for entry in (log, retained.log)]
    expected = ks_2samp(*ratios)
    quality = numbers["forget_quality"]
    assert quality.value == pytest.approx(expected.pvalue)
    assert quality.more == pytest.approx(
        {"ln p": math.log(expected.pvalue), "log10 p": math.log10(expected.pvalue), "D": expected.statistic}
    )
    assert quality.samples == "5 / 5"
    assert quality.note.count("fewer than 10") == 2
    u, r = (1 - entry["mia_min_k"].value for entry in (log, retained.log))
    assert log["privleak"].value == pytest.approx(100 * (u - r) / (r + 1e-10))
    assert numbers["privacy"].value is None
    assert numbers["privacy"].note == "no full log to scale by"
    alone = {number.name: number for number in retained.numbers}
    assert alone["forget_quality"].value is None
    assert alone["forget_quality"].note.startswith("no retain log")
    assert alone["privleak"].note == "against an AUC of 0.5, as no retain log has mia_min_k"
    assert alone["mia_reference"].note == "metric 'mia_reference': needs reference, which was not given"


def test_accuracy_is_that_of_the_nearest_answer(models, tokenizer, plain, tmp_path):
    """UA and the retain set's accuracy, of answers to the paraphrased questions, and what MRD's table makes of them."""
    embedder = Embedder(save_bert(tmp_path))
    suite = small("mrd_paper")
    result = evaluate_suite(models[0], tokenizer, SETS, suite, tools={"embedder": embedder}, progress=False)
    for name in ("forget", "retain"):
        right = []
        for item in SETS[name]:
            texts = [plain.written(item.paraphrased_question), item.paraphrased_answer, *item.perturbed_answers]
            vectors = embedder(texts)
            right.append(float((vectors[1:] @ vectors[0]).argmax() == 0))
        accuracy = result.log["forget_UA" if name == "forget" else "retain_Acc"]
        assert accuracy.column() == right
        assert accuracy.value == pytest.approx(np.mean(right) if name == "retain" else 1 - np.mean(right))
    values = result.summary
    assert values["UC"] == pytest.approx(np.mean([values[f"forget_{name}"] for name in ("UA", "MIA", "RR")]))
    kept = [values[f"{prefix}_{name}"] for prefix in ("retain", "ra", "wf") for name in ("Acc", "RR")]
    assert values["UT"] == pytest.approx(np.mean(kept))


def test_what_the_mrd_paper_stops_by(models, tokenizer):
    """EL and MA of a model that has learned some of the answers, against their definitions."""
    model = copy.deepcopy(models[0]).train()
    dataset = QADataset(SETS["forget"], tokenizer, None)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(30):
        row = dataset[step % 2]
        optimizer.zero_grad()
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        optimizer.step()
    only = [each for each in get_suite("mrd_paper").measures if each.name in ("forget_EL", "forget_MA")]
    result = evaluate_suite(model, tokenizer, SETS, Suite("own", "", tuple(only)), progress=False)
    plain, likelihoods, accuracies = Plain(model, tokenizer), [], []
    for item in SETS["forget"]:
        encoded = plain.format.encode(item.question, item.answer)
        ids, start = encoded.input_ids, encoded.labels.count(-100)
        n, shares = min(10, len(ids) - start - 1), []
        for end in range(start, len(ids) - n):
            written = plain.continued(ids[:end], len(ids) - end)
            shares.append(np.mean([gram in grams(ids[end:], n) for gram in grams(written, n)] or [0.0]))
        likelihoods.append(np.mean(shares))
        accuracies.append(np.mean(plain.tokens(item.question, item.answer)[1]))
    assert len(set(likelihoods)) > 1  # else nothing would tell a wrong one
    assert result.log["forget_EL"].column() == pytest.approx(likelihoods)
    assert result.log["forget_MA"].column() == pytest.approx(accuracies)


def grams(ids, n):
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def test_a_retain_log_serves_from_disk(results, models, tokenizer, tmp_path):
    own, retained = results
    write_log(tmp_path, retained.log, retained.summary)
    only = [each for each in get_suite("open_unlearning").measures if each.name in ("forget_truth_ratio", "mia_min_k")]
    ends = [each for each in get_suite("open_unlearning").aggregates if each.name in ("forget_quality", "privleak")]
    suite = Suite("some", "", tuple(only), tuple(ends))
    logs = {"retain": read_log(tmp_path)}
    again = evaluate_suite(models[0], tokenizer, SETS, suite, logs=logs, progress=False)
    for name in ("forget_quality", "privleak"):
        assert again.log[name].value == pytest.approx(own.log[name].value)
    itself = evaluate_suite(models[1], tokenizer, SETS, suite, logs=logs, progress=False)
    assert itself.log["forget_quality"].value == 1
    assert itself.log["privleak"].value == 0


@pytest.mark.parametrize("name", [suite.name for suite in TOFU_SUITES])
def test_every_suite_is_whole(name, models, tokenizer):
    """Every line has a value, but those of metrics that need other models; none is of an unknown metric or option."""
    suite = small(name)
    for measure in suite.measures:
        METRICS[measure.metric].check_options(measure.options)
    names = [each.name for each in (*suite.measures, *suite.aggregates)]
    assert len(set(names)) == len(names)
    result = evaluate_suite(models[0], tokenizer, SETS, replace(suite, rows=2), progress=False)
    assert [number.name for number in result.numbers] == names
    for measure, number in zip(suite.measures, result.numbers, strict=False):
        if number.value is None:
            assert measure.metric in WITH_TOOLS
        else:
            assert math.isfinite(number.value)
            assert number.samples.split(" / ")[0] == "2"
    json.dumps([number.to_json() for number in result.numbers], allow_nan=False)


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_what_is_called_open_unlearning_s_is(suite):
    """Of two variants theirs, and no number that they do not have."""
    for measure in suite.measures:
        if measure.source == "OpenUnlearning":
            has_variants = "suffix" in str(METRICS[measure.metric].options.get("variant"))
            assert measure.options.get("variant", "suffix") == "open_unlearning" or not has_variants
            assert measure.metric not in ("fluency", "text_perplexity")
    assert suite.name == "open_unlearning" or not any(
        "OpenUnlearning" in each.source for each in suite.aggregates if each.name != "privleak"
    )
    assert Measure("own", "probability").source == Aggregate("own", lambda log, logs: Outcome(0.0)).source == "ours"


@pytest.mark.parametrize("name", ["open_unlearning", "tutorial"])
def test_utility_is_by_the_classifier_where_there_is_one(name, models, tokenizer, plain, tmp_path):
    classifier = Classifier(save_classifier(tmp_path, "clean", "noise", "salad"))
    suite = small(name)
    with_it, without = (
        evaluate_suite(models[0], tokenizer, SETS, suite, tools=tools, progress=False)
        for tools in ({"classifier": classifier}, {})
    )
    written = [plain.written(item.question) for item in SETS["forget"]]
    assert with_it.log["forget_Q_A_gibberish"].column() == pytest.approx(classifier(written, 32)[:, 0].tolist())
    source = {"open_unlearning": "OpenUnlearning", "tutorial": "ours, by a classifier"}[name]
    for result, fluency, variant in (
        (with_it, "forget_Q_A_gibberish", source),
        (without, "forget_fluency", "ours, fluency by counting instead of a classifier"),
    ):
        log = {key: each.value for key, each in result.log.items()}
        # A random model's utility may be 0, and so is then what is made of it.
        log |= {"model_utility": 0.5, fluency: log[fluency] or 0.25}
        combined, _ = aggregate(suite.aggregates[-2:], {key: Entry(value) for key, value in log.items()})
        utility, agg = combined
        assert (utility.name, utility.variant, agg.name, agg.variant) == ("utility", variant, "agg", variant)
        assert utility.value == pytest.approx(hmean([0.5, log[fluency]]))
        assert agg.value == pytest.approx(hmean([log["memorization"], utility.value]))
    numbers = {number.name: number for number in without.numbers}
    assert numbers["forget_Q_A_gibberish"].note == "metric 'clean': needs classifier, which was not given"
    assert numbers["forget_fluency"].variant == "ours"


TEMPLATE = (
    "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (None, "chat"),
        ("open_unlearning", None),
        ({"name": "open_unlearning", "system": None, "date": None}, None),  # as for Gemma there
        ({"name": "open_unlearning", "system": "Be brief."}, "open_unlearning"),
        ("llama2", None),
        ({"user_start": "[INST] ", "user_end": " [/INST]"}, None),
        ({"user_start": "Q: "}, "tags"),
    ],
)
def test_another_prompt_than_its_source_s_is_told(prompt, told, models, tokenizer):
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = TEMPLATE
    form = PromptFormat(templated, make_prompt(prompt))
    suite = replace(get_suite("open_unlearning"), measures=get_suite("open_unlearning").measures[:1], aggregates=())
    result = evaluate_suite(models[0], templated, SETS, suite, prompt_format=form, progress=False)
    assert result.numbers[0].note == ("" if told is None else f"asked by prompt={told}, not its source's")
    other = replace(suite, prompts=())
    assert evaluate_suite(models[0], templated, SETS, other, prompt_format=form, progress=False).numbers[0].note == ""


def test_ones_own_lines(models, tokenizer):
    before = dict(METRICS)
    try:

        @metric()
        def words(item, scale):
            return scale * len(item.question.split()) if "1" not in item.question else None

        total = Aggregate("twice", lambda log, logs: Outcome(2 * log["words"].value), "mine")
        suite = Suite("own", "", (Measure("words", "words", "forget:paraphrased", source="mine"),), (total,))
        result = evaluate_suite(models[0], tokenizer, SETS, suite, tools={"scale": 1.0}, progress=False)
        assert result.summary == {"words": 8.0, "twice": 16.0}
        assert result.numbers[0].samples == "4"
        assert result.log["words"].samples == {i: {"score": 8.0} for i in (0, 2, 3, 4)}
    finally:
        METRICS.clear()
        METRICS.update(before)


def test_what_is_wrong_is_told(models, tokenizer):
    def run(sets, suite="tofu"):
        return evaluate_suite(models[0], tokenizer, sets, suite, progress=False)

    with pytest.raises(ValueError, match="suite='tufu': did you mean tofu"):
        run(SETS, "tufu")
    with pytest.raises(ValueError, match="suite 'tofu' needs world_facts, got forget, retain, real_authors"):
        run({name: SETS[name] for name in SET_NAMES[:3]})
    bare = [replace(item, perturbed_answers=()) for item in SETS["retain"]]
    with pytest.raises(ValueError, match=r"set retain: metric 'truth_ratio': items: 4 of 4 have no perturbed_answer"):
        run({**SETS, "retain": bare})
    bare = [replace(item, paraphrased_question=None) for item in SETS["forget"]]
    with pytest.raises(
        ValueError, match=r"set forget:paraphrased: 5 of 5 have no paraphrased_question \(first: item 0\)"
    ):
        run({**SETS, "forget": bare}, "tutorial")
    held_out = {name: SETS[name] for name in SET_NAMES}
    by_name = {number.name: number for number in run(held_out, small("tofu")).numbers}
    assert by_name["mia_min_k"].note == "no holdout set"
    assert by_name["privleak"].note == "needs mia_min_k, without a value here"
    assert Entry(None).column() == []


def test_a_prompt_is_that_of_sets_without_a_form(models, tokenizer):
    form = PromptFormat(tokenizer, make_prompt("llama2"))
    sets = {"forget": SETS["forget"], "pku": SETS["forget"], "forget_privleak": SETS["forget"]}
    for name, suite, own in (("forget", "tofu", True), ("pku", "safe", False), ("forget_privleak", "muse", False)):
        examinations = Examinations(models[0], tokenizer, sets, get_suite(suite), 4, None, None, False, form)
        assert (examinations[name].format is form) == own
