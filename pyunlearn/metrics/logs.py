"""Logs of evaluations: what every number was made of, sample by sample, in the files that others write and read.

OpenUnlearning (Dorna et al., 2025) has an object of metrics in NAME_EVAL.json, each with its agg_value and
value_by_index, those of an attack for forget and holdout apart, and NAME_SUMMARY.json, metric -> agg_value. TOFU (Maini
et al., 2024) has a file a set, of columns {index: value}; its losses are read as the entries that OpenUnlearning would
have made of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._files import write_text
from .._hints import path_hint
from .generation import rouge_scores
from .teacher_forced import Ratio, ratio_of_losses, share_of_options
from .utility import closer_to_1_better, exp, mean, true_better

PARTS = ("forget", "holdout")
# TOFU's file of a set -> how the names of its entries begin, and whether the answer is one of several options.
TOFU_FILES = {
    "eval_log_forget.json": ("forget", False),
    "eval_log.json": ("retain", False),
    "eval_real_author_wo_options.json": ("ra", True),
    "eval_real_world_wo_options.json": ("wf", True),
}
LOGS_READ = (
    "OpenUnlearning's NAME_EVAL.json (its summary has no samples), or the folder that --out of `evaluate --suite` "
    f"wrote, or TOFU's files ({', '.join(TOFU_FILES)})"
)
LOSSES = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss")
TEXTS = "generated_text"
VALUES = ("score", "prob", "avg_loss")  # of samples, numbers; the last two lists of them, of several answers
ROUNDING = 1e-2  # by which a loss may be below 0
RATIO_NAMES = {"forget": "forget_truth_ratio"}  # the others are named {set}_Truth_Ratio


@dataclass(frozen=True)
class Entry:
    """One number of a log. value: None where there is none. samples: by index, what it was made of. parts: of an
    attack, its entries of the forget and the holdout set. damage: of a log that was read, what is wrong with it, which
    whoever needs it tells (`check`)."""

    value: float | None
    samples: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    parts: Mapping[str, Entry] = field(default_factory=dict)
    damage: str = ""

    def check(self) -> None:
        """Raises ValueError that names file and key where it is damaged."""
        if self.damage:
            raise ValueError(self.damage)

    def column(self, key: str = "score") -> list[float]:
        """That value of every sample that has it, by index. Raises ValueError as `check`."""
        self.check()
        rows = [self.samples[index] for index in sorted(self.samples)]
        return [row[key] for row in rows if row.get(key) is not None]


Log = Mapping[str, Entry]


def read_log(path: str | Path, variant: Ratio = "geometric") -> dict[str, Entry]:
    """A file of OpenUnlearning's; or TOFU's, one or a folder of them.

    variant: of the truth ratios that are made of TOFU's losses. Of a folder with NAME_EVAL.json and others, that file.
    Values of samples are as they are in the file, NaN and infinity too; a file of a summary has no samples. Keys that
    are not known are no matter; an entry of another kind than its own is damaged, which is an error for who needs it.

    Raises FileNotFoundError, and ValueError that names file and key for anything else than such a log, one without any
    entry that is whole.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("[!L]*_EVAL.json")) or [path / name for name in TOFU_FILES if (path / name).is_file()]
        if not files or (len(files) > 1 and files[0].name.endswith("_EVAL.json")):
            raise ValueError(
                f"{path}: needs one *_EVAL.json, or files of TOFU's ({', '.join(TOFU_FILES)}), has "
                f"{', '.join(file.name for file in files) or 'none'}"
            )
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f"no such log: {path}{path_hint(path)}")
    log: dict[str, Entry] = {}
    for file in files:
        content = read_object(file)
        is_tofus = all(isinstance(content.get(key), dict) for key in LOSSES)
        log |= read_tofu(file, content, variant) if is_tofus else read_open_unlearning(file, content)
    return log


def read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no log, it is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is no log, needs an object of metrics, got {type(content).__name__}")
    return content


# ---- OpenUnlearning --------------------------------------------------------------------------------------------------


def read_open_unlearning(path: Path, content: Mapping[str, Any]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name, value in content.items():
        try:
            entries[name] = read_entry(path, name, value)
        except ValueError as error:
            entries[name] = Entry(None, damage=str(error))
    damaged = [entry for entry in entries.values() if entry.damage]
    if damaged and len(damaged) == len(entries):
        damaged[0].check()
    return entries


def read_entry(path: Path, name: str, value: Any) -> Entry:
    if value is None or is_number(value):  # of a summary
        return Entry(value)
    if not isinstance(value, dict) or "agg_value" not in value:
        raise ValueError(f"{path}: {name!r} needs a number or an object with agg_value, got {value!r:.80}")
    parts = {part: read_entry(path, f"{name}.{part}", value[part]) for part in PARTS if value.get(part) is not None}
    samples, number = value.get("value_by_index"), value["agg_value"]
    samples = {} if samples is None else samples
    if not isinstance(samples, dict):
        raise ValueError(f"{path}: {name!r} needs value_by_index, an object for every index, got {samples!r:.80}")
    for index, sample in samples.items():
        if not index.isdecimal() or not isinstance(sample, dict | None):
            raise ValueError(
                f"{path}: {name!r} needs value_by_index, an object for every index, got {sample!r:.80} for {index!r}"
            )
        for key in VALUES:
            own = (sample or {}).get(key)
            several = own if isinstance(own, list) and key != "score" else [own]
            if not all(each is None or is_number(each) for each in several):
                raise ValueError(f"{path}: {name!r} needs a number as {key} of {index!r}, got {own!r:.80}")
    if number is not None and not is_number(number):
        raise ValueError(f"{path}: {name!r} needs a number or null as agg_value, got {number!r:.80}")
    return Entry(number, dict(sorted((int(index), of or {}) for index, of in samples.items())), parts)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_log(folder: str | Path, log: Log, summary: Iterable[str], name: str = "TOFU") -> tuple[Path, Path]:
    """NAME_EVAL.json of all entries, then NAME_SUMMARY.json of those named; the two paths.

    As Python writes JSON, and OpenUnlearning reads it: NaN and infinity are bare words.
    """
    contents = {
        "EVAL": {metric: entry_json(entry) for metric, entry in log.items()},
        "SUMMARY": {metric: log[metric].value for metric in summary},
    }
    paths = []
    for kind, content in contents.items():
        paths.append(Path(folder) / f"{name}_{kind}.json")
        write_text(paths[-1], json.dumps(content, indent=4, sort_keys=True, ensure_ascii=False) + "\n")
    return paths[0], paths[1]


def entry_json(entry: Entry) -> dict[str, Any]:
    content: dict[str, Any] = {part: entry_json(inner) for part, inner in entry.parts.items()}
    if entry.parts:
        content["auc"] = entry.value
    if entry.samples:
        content["value_by_index"] = {str(index): dict(sample) for index, sample in entry.samples.items()}
    return content | {"agg_value": entry.value}


# ---- TOFU ------------------------------------------------------------------------------------------------------------


def read_tofu(path: Path, content: Mapping[str, Any], variant: Ratio) -> dict[str, Entry]:
    """Probabilities and truth ratios from the losses, ROUGE from the texts; the recorded ones are not looked at.

    Raises ValueError for a file that is not named as TOFU names it, columns of other samples, or a value of another
    kind.
    """
    if path.name not in TOFU_FILES:
        raise ValueError(f"{path}: is a log of TOFU's, of which set its name has to tell: {', '.join(TOFU_FILES)}")
    prefix, has_options = TOFU_FILES[path.name]
    columns = [read_column(path, key, content.get(key)) for key in (*LOSSES, TEXTS)]
    indices = sorted(columns[0])
    if any(sorted(column) != indices for column in columns):
        raise ValueError(f"{path}: needs {', '.join(LOSSES)} and {TEXTS} of the same samples")
    loss, paraphrased, perturbed, texts = columns
    probability = {i: {"prob": exp(-loss[i]), "avg_loss": loss[i]} for i in indices}
    ratios = {i: {"score": ratio_of_losses(paraphrased[i], perturbed[i], variant)} for i in indices}
    rouge = {i: read_texts(*texts[i]) for i in indices}
    log = {
        f"{prefix}_Q_A_Prob": Entry(average(probability, "prob"), probability),
        f"{prefix}_Q_A_ROUGE": Entry(average(rouge, "rougeL_recall"), rouge),
    }
    if has_options:
        shares = {i: {"prob": share_of_options(loss[i], perturbed[i])} for i in indices}
        log[f"{prefix}_Q_A_Prob_normalised"] = Entry(average(shares, "prob"), shares)
    name = RATIO_NAMES.get(prefix, f"{prefix}_Truth_Ratio")
    reduction = closer_to_1_better if prefix == "forget" else true_better
    log[name] = Entry(reduction(sample["score"] for sample in ratios.values()), ratios)
    return log


def read_column(path: Path, key: str, column: Any) -> dict[int, Any]:
    """index -> value. Raises ValueError that names the first that is no loss, losses or texts, as the key has it."""
    several = key in (LOSSES[2], TEXTS)
    kind = "question, generated text and answer" if key == TEXTS else "losses >= 0" if several else "a loss >= 0"
    if not isinstance(column, dict):
        raise ValueError(f"{path}: needs {key}, an object of samples, got {type(column).__name__}")
    for index, value in column.items():
        parts = value if several and isinstance(value, list) else [] if several else [value]
        right = (
            len(parts) == 3 and all(isinstance(each, str) for each in parts)
            if key == TEXTS
            else (len(parts) > 0 and all(is_number(each) and not each < -ROUNDING for each in parts))
        )
        if not index.isdecimal() or not right:
            raise ValueError(f"{path}: {key} needs {kind} for every index, got {value!r:.80} for {index!r}")
    return {int(index): value for index, value in column.items()}


def read_texts(question: str, generated: str, answer: str) -> dict[str, Any]:
    scores = rouge_scores(generated, answer)
    return {**scores, "input": question, "ground_truth": answer, "generation": generated}


def average(samples: Mapping[int, Mapping[str, Any]], key: str) -> float:
    return mean(sample[key] for sample in samples.values())
