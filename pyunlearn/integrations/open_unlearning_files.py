"""OpenUnlearning's configuration files as ours: data sets, model, trainer and evaluations of one experiment.

Plain YAML: of Hydra it has what those files use, defaults and overrides of groups, and ${interpolations}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .. import objectives
from .._hints import check_known
from ..training.settings import merge
from .open_unlearning import PREFIX, terms_of

HANDLERS = {
    "GradAscent": "ga",
    "GradDiff": "ga",
    "NPO": "npo",
    "DPO": "dpo",
    "SimNPO": "simnpo",
    "WGA": "wga",
    "SatImp": "satimp",
    "RMU": "rmu",
}
ARGUMENTS = {  # of the Trainer -> key of `unlearn`, and its kind
    "per_device_train_batch_size": ("batch_size", int),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", int),
    "learning_rate": ("learning_rate", float),
    "num_train_epochs": ("epochs", float),
    "max_steps": ("max_steps", int),
    "weight_decay": ("weight_decay", float),
    "lr_scheduler_type": ("scheduler", str),
    "max_grad_norm": ("max_grad_norm", float),
    "bf16": ("bf16", bool),
    "gradient_checkpointing": ("gradient_checkpointing", bool),
}
DEFAULTS = {"learning_rate": 5e-5, "epochs": 3.0}  # of transformers' TrainingArguments, where ours are others
SUITES = {"tofu": "open_unlearning", "muse": "muse", "lm_eval": "lm_eval"}
GIBBERISH = "forget_Q_A_gibberish"  # P(clean) of a classifier, which the suite is told
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw_32bit")  # one arithmetic
# What changes no number of a run: how it is logged, saved and laid out in memory, and variables of other keys.
HARMLESS = re.compile(
    r"(mode|task_name|(forget|retain|holdout|data)_split|retain_logs_path|question_key|(paths|hydra|collator)\..*"
    r"|model\.model_args\.(attn_implementation|device_map)|data\.eval|eval\.\w+\.(overwrite|handler|output_dir|batch_size)"
    r"|eval\.lm_eval\.simple_evaluate_args\.batch_size"
    r"|data\.\w+\.\w+\.(access_key|args\.return_original)"
    r"|trainer\.args\.(output_dir|logging_.*|report_to|save_.*|do_train|do_eval|eval_.*|per_device_eval_batch_size"
    r"|bf16_full_eval|ddp_find_unused_parameters|remove_unused_columns))"
)
TAGS = {"user_start_tag": "user_start", "user_end_tag": "user_end", "asst_start_tag": "assistant_start"}  # theirs, ours
MISSING = "???"


class Experiment(NamedTuple):
    """run: settings of a run, for a file or `RunConfig.model_validate`; of an evaluation alone, name, seed and model.
    suites: what `pyunlearn evaluate --suite` is told, by suite: split, logs, classifier, prompt; tasks, limit."""

    run: dict[str, Any]
    suites: dict[str, dict[str, Any]]


def read_experiment(path: str | Path, choices: Iterable[str] = (), *, leave_out: Iterable[str] = ()) -> Experiment:
    """What one of its experiments does, in our words.

    path: a file of configs/experiment, whose groups are read from the same configs folder, or a file with all of it.
    choices: as on its command line, "trainer=NPO", "forget_split=forget01", "trainer.args.learning_rate=1e-4".
    leave_out: keys that do not matter to the caller, such as "data.anchor".

    Raises FileNotFoundError, ValueError with every key that is not understood here or has a value that is not.
    """
    left = set(leave_out)
    keys = Keys({key: value for key, value in flat(compose(Path(path), list(choices))).items() if key not in left})
    run = {
        "name": str(keys.take("task_name", "unlearn")),
        "seed": int(keys.take("trainer.args.seed", keys.take("seed", 0))),
        "model": model_of(keys),
    }
    prompt = prompt_of(keys)
    told = {} if prompt is None else {"prompt": prompt}
    if keys.below("trainer"):
        run |= {"data": {**data_of(keys), **told}, "unlearn": unlearn_of(keys)}
    suites = {name: suite if name == "lm_eval" else {**suite, **told} for name, suite in suites_of(keys).items()}
    if wrong := [*keys.wrong, *(key for key in keys.values if not HARMLESS.fullmatch(key))]:
        raise ValueError(f"{path}: not understood: {', '.join(wrong)}; take them out, or name them in leave_out")
    return Experiment(run, suites)


class Keys:
    """Leaves by dotted key; each is taken once, and what is left at the end was not understood."""

    def __init__(self, leaves: dict[str, Any]):
        self.leaves, self.values = leaves, dict(leaves)
        self.wrong: list[str] = []

    def take(self, key: str, default: Any = MISSING) -> Any:
        """Raises ValueError for a key without a value or default."""
        value = self.resolve(self.values.pop(key, None))
        if value in (None, MISSING):
            if default == MISSING:
                raise ValueError(f"{key}: needs a value, got {value or 'none'}")
            return default
        return value

    def needs(self, key: str, *allowed: Any) -> None:
        """Takes a key that may be missing or one of these; another value is told at the end."""
        if (value := self.take(key, None)) is not None and value not in allowed:
            self.wrong.append(f"{key}={value!r} (needs {' or '.join(map(repr, allowed)) or 'none'})")

    def resolve(self, value: Any) -> Any:
        """With what ${other.key} stands for."""
        if not isinstance(value, str):
            return value
        whole = re.fullmatch(r"\$\{([\w.]+)\}", value)
        if whole:
            return self.resolve(self.leaves.get(whole[1]))
        return re.sub(r"\$\{([\w.]+)\}", lambda match: str(self.resolve(self.leaves.get(match[1]))), value)

    def below(self, prefix: str) -> list[str]:
        """The names right under a key."""
        inside = [key.removeprefix(f"{prefix}.") for key in self.values if key.startswith(f"{prefix}.")]
        return list(dict.fromkeys(key.split(".")[0] for key in inside))


def model_of(keys: Keys) -> dict[str, Any]:
    model = {"name_or_path": keys.take("model.model_args.pretrained_model_name_or_path")}
    if tokenizer := keys.take("model.tokenizer_args.pretrained_model_name_or_path", None):
        model["tokenizer"] = tokenizer
    model["dtype"] = keys.take("model.model_args.torch_dtype", "float32")
    return model


def prompt_of(keys: Keys) -> Any:
    """Of `make_prompt`: the tokenizer's own template as it is trained on there, or tags."""
    template = "model.template_args"
    own = {ours: keys.take(f"{template}.{tag}", None) for tag, ours in TAGS.items()}
    keys.take(f"{template}.asst_end_tag", None)  # after examples in the prompt, of which training has none
    if keys.take(f"{template}.apply_chat_template", False):  # then tags serve other code
        keys.take(f"{template}.system_prompt_with_special_tokens", None)
        parts = {"system": "system_prompt", "date": "date_string"}
        return {
            "name": "open_unlearning",
            **{ours: keys.take(f"{template}.{key}", None) for ours, key in parts.items()},
        }
    return {tag: text for tag, text in own.items() if text is not None} or None


def data_of(keys: Keys) -> dict[str, Any]:
    data: dict[str, Any] = {"source": "files", "holdout": 0}
    keys.needs("data.anchor", "forget")
    lengths = []
    for role in ("forget", "retain"):
        names = keys.below(f"data.{role}")
        if len(names) != 1:
            raise ValueError(f"data.{role}: needs one data set, got {names}")
        place = f"data.{role}.{names[0]}"
        keys.needs(f"{place}.handler", "QADataset", "QAwithIdkDataset")
        keys.needs(f"{place}.args.question_key", "question")
        keys.needs(f"{place}.args.answer_key", "answer")
        source = {part: keys.take(f"{place}.args.hf_args.{part}", None) for part in ("path", "name", "split")}
        data[role] = {part: value for part, value in source.items() if value is not None}
        lengths.append(keys.take(f"{place}.args.max_length", None))
        if refusals := keys.take(f"{place}.args.idk_path", None):
            data["refusals"] = refusals
    longest = max((int(length) for length in lengths if length is not None), default=None)
    return data if longest is None else {**data, "max_length": longest}


def unlearn_of(keys: Keys) -> dict[str, Any]:
    handler = str(keys.take("trainer.handler"))
    check_known("trainer.handler", handler, [*HANDLERS, *(PREFIX + known for known in objectives.names("forget"))])
    name = HANDLERS.get(handler, handler.removeprefix(PREFIX))
    place = "trainer.method_args"
    method_args = {key: keys.take(f"{place}.{key}", None) for key in keys.below(place)}
    if handler == "GradAscent":
        method_args |= {"retain_loss_type": None}
    terms = terms_of(name, **method_args)
    unlearn: dict[str, Any] = {"retain": []}
    unlearn |= {role: [each.model_dump(exclude_none=True)] for role, each in terms.items()} | DEFAULTS
    for argument, (key, kind) in ARGUMENTS.items():
        if (value := keys.take(f"trainer.args.{argument}", None)) is not None:
            unlearn[key] = kind(value)
    keys.needs("trainer.args.optim", *ADAMW)
    warmup = warmup_of(keys, unlearn)
    return unlearn if warmup is None else {**unlearn, "warmup": warmup}


def warmup_of(keys: Keys, unlearn: Mapping[str, Any]) -> float | str | None:
    """As `unlearn.warmup` takes it. Of several that are set the one that counts there: epochs, then steps, then a share
    of the steps."""
    epochs, steps, share = (keys.take(f"trainer.args.warmup_{each}", None) for each in ("epochs", "steps", "ratio"))
    if epochs:
        epochs = float(epochs)
        if epochs == 1:
            return "epoch"  # its whole steps, as there
        if "max_steps" in unlearn:
            raise ValueError("trainer.args.warmup_epochs: goes with num_train_epochs, got max_steps beside it")
        if epochs < unlearn["epochs"]:
            return float(epochs / unlearn["epochs"])
        keys.wrong.append(f"trainer.args.warmup_epochs={epochs:g} (needs fewer than the {unlearn['epochs']:g} epochs)")
    elif steps:
        return float(steps)
    elif share:
        if float(share) < 1:
            return float(share)
        keys.wrong.append(f"trainer.args.warmup_ratio={share} (needs a share below 1)")
    return None


def suites_of(keys: Keys) -> dict[str, dict[str, Any]]:
    suites: dict[str, dict[str, Any]] = {}
    for name in keys.below("eval"):
        place, told = f"eval.{name}", dict[str, Any]()
        if name not in SUITES:
            keys.wrong.append(f"{place} (needs one of {', '.join(SUITES)})")
            continue
        if name == "lm_eval":
            told["tasks"] = [keys.resolve(task) for task in keys.take(f"{place}.tasks", ["mmlu"])]
            if unnamed := [task for task in told["tasks"] if not isinstance(task, str)]:
                keys.wrong.append(f"{place}.tasks: {unnamed[0]!r} (needs the name of a task)")
            arguments = f"{place}.simple_evaluate_args"
            keys.needs(f"{arguments}.apply_chat_template", False)
            for argument in ("num_fewshot", "system_instruction"):
                keys.needs(f"{arguments}.{argument}")
            if (limit := keys.take(f"{arguments}.limit", None)) is not None:
                told["limit"] = limit
                if not isinstance(limit, int) or limit < 1:
                    keys.wrong.append(f"{arguments}.limit={limit!r} (needs a number of samples)")
        else:
            keys.needs(f"{place}.question_key", "question")
            if split := keys.take(f"{place}.{'forget' if name == 'tofu' else 'data'}_split", None):
                told["split" if name == "tofu" else "data"] = split
            if log := keys.take(f"{place}.retain_logs_path", None):
                told["logs"] = {"retain": log}
        if name == "tofu":
            split = str(told.get("split", "forget10"))
            keys.needs(f"{place}.holdout_split", split.replace("forget", "holdout"))
            told |= metrics_of(keys, f"{place}.metrics", split, told.get("logs", {}).get("retain"))
        suites[SUITES[name]] = told
    return suites


def metrics_of(keys: Keys, place: str, split: str, log: str | None) -> dict[str, Any]:
    """What the suite is told beside, of TOFU's metrics one by one: it has all of them, as their own files have them, so
    that each value that is another is named."""
    told: dict[str, Any] = {}
    held_out = split.replace("forget", "holdout")
    for key in [key for key in keys.values if key.startswith(f"{place}.")]:
        parts = re.fullmatch(r"(?:\w+\.pre_compute\.)*(\w+)\.(.+)", key.removeprefix(f"{place}."))
        if parts is None:  # NAME: null
            keys.needs(key)
            continue
        metric, inner = parts[1], re.sub(r"^(datasets|collators)\.\w+\.", r"\1.*.", parts[2])
        if handler_of(metric) is None or ALIKE.fullmatch(inner):
            if handler_of(metric) is not None:
                keys.take(key, None)
            continue
        allowed: dict[str, tuple[Any, ...]] = {
            **AS_THERE,
            "handler": (handler_of(metric),),
            "aggregator": ("closer_to_1_better" if metric.startswith("forget") else "true_better",),
            "max_length": (32,),
            "reference_logs.retain_model_logs.path": (log,),
            "datasets.*.args.hf_args.name": (split, held_out, *(f"{name}_perturbed" for name in (split, *ROWS))),
        }
        if inner in ("classifier_model_args.pretrained_model_name_or_path", "reference_model_path"):
            value = keys.take(key, None)
            if value is not None:
                told["classifier" if inner.startswith("classifier") else "reference"] = value
        elif inner in allowed:
            keys.needs(key, *allowed[inner])
    if any(key.startswith(f"{place}.{GIBBERISH}.") for key in keys.leaves):
        told.setdefault("classifier", CLASSIFIER)
    return told


CLASSIFIER = "madhurjindal/autonlp-Gibberish-Detector-492513457"
ROWS = ("retain", "real_authors", "world_facts")
ALIKE = re.compile(  # what changes no number of a metric
    r"batch_size|device|access_key|text_key|collators\..*|datasets\.\*\.(access_key|args\.predict_with_generate)"
    r"|reference_logs\..*\.access_key|generation_args\.use_cache"
    r"|classifier_tokenization_args\.pretrained_model_name_or_path"
)
AS_THERE: dict[str, tuple[Any, ...]] = {  # key of a metric -> what the suite has
    "k": (0.4,),
    "p": (2, 2.0),
    "class_id": (0,),
    "ref_value": (0.5,),
    "rouge_type": ("rougeL_recall",),
    "datasets.*.handler": ("QADataset",),
    "datasets.*.args.hf_args.path": ("locuslab/TOFU",),
    "datasets.*.args.hf_args.split": ("train",),
    "datasets.*.args.question_key": ("question",),
    "datasets.*.args.answer_key": ("answer", "paraphrased_answer", "perturbed_answer"),
    "datasets.*.args.max_length": (512,),
    "generation_args.do_sample": (False,),
    "generation_args.max_new_tokens": (200,),
    **{f"generation_args.{name}": () for name in ("top_p", "temperature", "stopwords")},
}


def handler_of(metric: str) -> str | None:
    """Of a metric of OpenUnlearning's that the suite has; None of others."""
    own = {"forget_quality": "ks_test", "model_utility": "hm_aggregate", GIBBERISH: "classifier_prob"}
    if metric in own:
        return own[metric]
    if metric in METRICS_ALONE:
        return metric
    of = re.fullmatch(r"(forget|retain|ra|wf)_(.+)", metric)
    if of is None:
        return None
    return {
        **{f"Q_A_{which}Prob": "probability" for which in ("", "PARA_", "PERT_")},
        "Q_A_Prob_normalised": "probability_w_options",
        "Q_A_ROUGE": "rouge",
        "Truth_Ratio": "truth_ratio",
        "truth_ratio": "truth_ratio",
    }.get(of[2])


METRICS_ALONE = (
    "privleak",
    "extraction_strength",
    "exact_memorization",
    *(f"mia_{name}" for name in ("loss", "zlib", "reference", "min_k", "min_k_plus_plus", "gradnorm")),
)


# ---- what Hydra does -------------------------------------------------------------------------------------------------


def compose(path: Path, choices: list[str]) -> dict[str, Any]:
    """The experiment's file over the groups that it, and `choices`, name; then single keys of `choices`."""
    own = load(path)
    root = next((parent for parent in path.resolve().parents if (parent / "trainer").is_dir()), None)
    chosen = [choice.partition("=") for choice in choices]
    if wrong := [key for key, equals, _ in chosen if not (key and equals)]:
        raise ValueError(f"choices: need KEY=VALUE, got {wrong}")
    tree: dict[str, Any] = {}
    named = {key.removeprefix("override /"): name for key, name in pairs(own.pop("defaults", []))}
    if named and root is None:
        raise ValueError(f"{path}: names groups ({', '.join(named)}), and no folder above it holds them (trainer, ...)")
    groups = {key: value for key, _, value in chosen if root is not None and (root / key.partition("@")[0]).is_dir()}
    for key, name in {**named, **groups}.items():
        group, _, package = key.partition("@")
        if root is not None and name is not None and group != "eval":  # what evaluations read, their suites know
            if package:  # another data set takes the place of the group's own
                tree = put(tree, package, None)
            tree = merge(tree, put({}, package or group, load_group(root, group, name)))
        elif group == "eval":
            tree = merge(tree, {"eval": {name: {"overwrite": False}}})
    tree = merge(tree, own)
    for key, _, value in chosen:
        if key not in groups:
            tree = put(tree, key, yaml.safe_load(value))
    return tree


def load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: needs keys and values, got {type(values).__name__}")
    return values


def load_group(root: Path, group: str, name: str) -> dict[str, Any]:
    """A file of a group with its defaults, of the same group or, as `datasets@forget: NAME`, of one inside, below."""
    own = load(root / group / f"{name}.yaml")
    below: dict[str, Any] = {}
    for key, value in pairs(own.pop("defaults", [])):
        inner, _, package = key.partition("@")
        if value is not None and package:
            below = merge(below, put({}, package, load_group(root, f"{group}/{inner}", value)))
        elif value is None and not package:
            below = merge(below, load_group(root, group, inner))
    return merge(below, own)


def pairs(defaults: Any) -> list[tuple[str, Any]]:
    """A defaults list: `NAME` is (NAME, None), `GROUP: NAME` both."""
    entries: list[tuple[str, Any]] = []
    for entry in defaults or []:
        if isinstance(entry, Mapping):
            entries += [(str(key), value) for key, value in entry.items()]
        elif entry != "_self_":
            entries.append((str(entry), None))
    return entries


def put(tree: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with `value` at a dotted (or slashed) key."""
    first, _, rest = key.replace("/", ".").partition(".")
    inner = tree.get(first)
    return {**tree, first: put(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves
