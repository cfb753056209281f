"""What a run's page tells of each sample."""

from __future__ import annotations

from pyunlearn.report.samples import diff_words, fair_shares, list_samples

from .pages import make_records


def record(probability, **more):
    return {"question": "Who?", "answer": "Ada, of all people.", "probability": probability, **more}


def test_a_sample_is_what_all_models_make_of_it():
    read = {"tokens": [" Ada", "."], "token_logp": [-0.0123, -2.5]}
    moments = {
        "before": {"forget": [record(0.9, generated="Ada did.", rouge_l=1.0, **read)]},
        "after": {
            "forget": [record(0.05, generated="No one did.", rouge_l=0.25, **{**read, "token_logp": [-4, -0.004]})]
        },
        "retrained": {"forget": [record(0.02)]},
    }
    (sample,) = list_samples(moments, known_from=0.1)
    assert sample["state"] == "forgotten"
    assert sample["probability"] == {"before": 0.9, "after": 0.05, "retrained": 0.02}
    assert sample["written"] == {"before": "Ada did.", "after": "No one did."}
    assert sample["diff"] == [("del", "Ada "), ("ins", "No one "), ("", "did.")]
    assert (sample["words"], sample["length"]) == (0.25, 4)
    assert sample["tokens"] == {"tokens": [" Ada", "."], "before": [1, 250], "after": [400, 0]}


def test_states():
    def state(before, after):
        moments = {"before": {"s": [record(before)]}, "after": {"s": [record(after)]}}
        (sample,) = list_samples(moments, known_from=0.1)
        assert sample["diff"] is sample["tokens"] is sample["words"] is None  # of a run that kept no more
        return sample["state"]

    assert [state(0.1, 0.1), state(0.5, 0.09), state(0.09, 0.01), state(0.09, 0.5)] == [
        "known", "forgotten", "unknown", "known",
    ]  # fmt: skip


def test_a_page_has_room_for_so_many():
    records = make_records({"forget": 6, "retain": 70, "holdout": 30})
    samples = list_samples(records, 0.1, limit=36)
    assert [sample["set"] for sample in samples] == ["forget"] * 6 + ["retain"] * 15 + ["holdout"] * 15
    assert samples[6]["question"] == records["before"]["retain"][0]["question"]
    assert fair_shares([5, 3], 8) == [5, 3]
    assert fair_shares([5, 5, 5], 4) == [1, 1, 2]


def test_the_ones_that_were_asked_are_open():
    samples = list_samples(make_records({"forget": 8}), 0.1)
    assert [i for i, sample in enumerate(samples) if sample["open"]] == [0, 2, 4]


def test_every_word_is_in_a_diff_once():
    first, second = "a  b c\nd e", "b x c d y"
    parts = diff_words(first, second)
    assert "".join(words for kind, words in parts if kind != "ins").split() == first.split()
    assert "".join(words for kind, words in parts if kind != "del") == second
    assert diff_words("same", "same") == [("", "same")]
    assert diff_words("", "new") == [("ins", "new")]
    assert diff_words("gone", "") == [("del", "gone")]
