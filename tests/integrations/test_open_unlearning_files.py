"""OpenUnlearning's configuration, a small folder of its kind, as ours."""

import re
from types import SimpleNamespace

import pytest
import yaml

from pyunlearn.integrations.open_unlearning_files import read_experiment
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.files_config import SuiteConfig
from pyunlearn.training.stage import warmup_steps

TAGS = {"user_start": "Question: ", "user_end": "\n", "assistant_start": "Answer: "}
GROUPS = {
    "model/small.yaml": """
        model_args: {pretrained_model_name_or_path: some/model, torch_dtype: bfloat16, attn_implementation: eager}
        tokenizer_args: {pretrained_model_name_or_path: some/tokenizer}
        template_args: {apply_chat_template: false, user_start_tag: "Question: ", user_end_tag: "\\n",
                        asst_start_tag: "Answer: ", asst_end_tag: "\\n\\n"}
        """,
    "model/chat.yaml": """
        model_args: {pretrained_model_name_or_path: some/chat}
        template_args: {apply_chat_template: true, system_prompt: Be brief., user_start_tag: "<u>"}
        """,
    "trainer/base.yaml": """
        handler: FinetuneTrainer
        args: {per_device_train_batch_size: 8, gradient_accumulation_steps: 4, learning_rate: 1e-5, bf16: true,
               optim: paged_adamw_32bit, num_train_epochs: 10, output_dir: "${paths.output_dir}", logging_steps: 5}
        """,
    "trainer/Diff.yaml": """
        defaults: [base]
        handler: GradDiff
        method_args: {gamma: 1.0, alpha: 1.0, retain_loss_type: NLL}
        """,
    "trainer/Ratio.yaml": """
        defaults: [Diff]
        handler: NPO
        method_args: {beta: 0.1}
        """,
    "data/pair.yaml": """
        defaults:
          - datasets@forget: rows
          - datasets@retain: rows
          - datasets@eval: null
        anchor: forget
        """,
    "data/datasets/rows.yaml": """
        rows:
          handler: QADataset
          args: {hf_args: {path: some/rows, name: forget10, split: train}, question_key: question, max_length: 512}
        """,
    "data/datasets/refused.yaml": """
        refused:
          handler: QAwithIdkDataset
          args: {hf_args: {path: some/rows, name: forget10}, idk_path: refusals.txt, return_original: true}
        """,
    "experiment/mine.yaml": """
        defaults:
          - override /model: small
          - override /trainer: Ratio
          - override /data: pair
          - override /data/datasets@data.forget: rows
          - override /eval: tofu
        forget_split: forget05
        retain_split: retain95
        retain_logs_path: null
        data:
          forget: {rows: {args: {hf_args: {name: "${forget_split}"}}}}
          retain: {rows: {args: {hf_args: {name: "${retain_split}"}}}}
        eval: {tofu: {forget_split: "${forget_split}", retain_logs_path: "${retain_logs_path}", overwrite: true}}
        trainer: {args: {warmup_epochs: 1.0, weight_decay: 0.01}}
        task_name: ???
        """,
}

METRICS, EASY, NO_WARMUP = "eval.tofu.metrics", "eval.lm_eval.simple_evaluate_args", "trainer.args.warmup_epochs=null"
IDK = ["data.forget.rows.handler=QAwithIdkDataset", "data.forget.rows.args.idk_path=refusals.txt"]


@pytest.fixture
def experiment(tmp_path):
    for name, text in GROUPS.items():
        file = tmp_path / "configs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "configs" / "experiment" / "mine.yaml"


def test_an_experiment_is_a_runs_configuration(experiment):
    run, suites = read_experiment(experiment)
    assert run == {
        "name": "unlearn",
        "seed": 0,
        "model": {"name_or_path": "some/model", "tokenizer": "some/tokenizer", "dtype": "bfloat16"},
        "data": {
            "source": "files",
            "holdout": 0,
            "forget": {"path": "some/rows", "name": "forget05", "split": "train"},
            "retain": {"path": "some/rows", "name": "retain95", "split": "train"},
            "max_length": 512,
            "prompt": TAGS,
        },
        "unlearn": {
            "forget": [{"name": "npo", "coefficient": 1.0, "preset": "open_unlearning", "options": {"beta": 0.1}}],
            "retain": [{"name": "gd", "coefficient": 1.0, "preset": "open_unlearning", "options": {}}],
            "batch_size": 8,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-5,
            "epochs": 10.0,
            "weight_decay": 0.01,
            "bf16": True,
            "warmup": "epoch",
        },
    }
    assert suites == {"open_unlearning": {"split": "forget05", "prompt": TAGS}}
    assert RunConfig.model_validate(run).prompt.before == "Question: "
    assert RunConfig.model_validate(run).unlearn.learning_rate == 1e-5


def test_choices_are_those_of_its_command_line(experiment):
    choices = ["trainer=Diff", "forget_split=forget01", "trainer.args.learning_rate=2e-5", "retain_logs_path=log.json"]
    run, suites = read_experiment(experiment, [*choices, *IDK, "task_name=mine"])
    assert run["name"] == "mine"
    assert run["unlearn"]["forget"][0]["name"] == "ga"
    assert run["unlearn"]["learning_rate"] == 2e-5
    assert run["data"]["refusals"] == "refusals.txt"
    assert suites == {"open_unlearning": {"split": "forget01", "logs": {"retain": "log.json"}, "prompt": TAGS}}


@pytest.mark.parametrize(
    ("arguments", "warmup"),
    [
        ({"warmup_epochs": 1.0, "num_train_epochs": 1}, "epoch"),
        ({"warmup_epochs": 1.0, "max_steps": 5}, "epoch"),
        ({"warmup_epochs": 2.0, "warmup_steps": 3}, 0.2),  # of ten epochs
        ({"warmup_epochs": None, "warmup_steps": 3, "warmup_ratio": 0.5}, 3.0),
        ({"warmup_epochs": 0, "warmup_ratio": 0.5}, 0.5),
        ({"warmup_epochs": None}, None),
    ],
)
def test_a_warm_up_is_as_long_as_there(experiment, arguments, warmup):
    choices = [f"trainer.args.{name}={yaml.safe_dump(value).split()[0]}" for name, value in arguments.items()]
    run = RunConfig.model_validate(read_experiment(experiment, choices).run)
    assert run.unlearn.warmup == (0 if warmup is None else warmup)
    settings = run.unlearn.model_copy(update={"scheduler": "constant"})  # which may end in it
    stage = SimpleNamespace(processes=SimpleNamespace(count=1))
    rows, epochs = 320, arguments.get("warmup_epochs")
    if epochs:
        assert warmup_steps(stage, "unlearn", settings, rows) == int(epochs * rows // (8 * 4))


def test_tasks_of_lm_eval_are_evaluated_without_data(experiment):
    choices = ["eval=lm_eval", "eval.lm_eval.tasks=[mmlu]", f"{EASY}.limit=3", f"{EASY}.batch_size=4",
               f"{EASY}.apply_chat_template=false", f"{EASY}.num_fewshot=null"]  # fmt: skip
    _, suites = read_experiment(experiment, choices)
    assert suites == {"lm_eval": {"tasks": ["mmlu"], "limit": 3}}
    config = SuiteConfig.of_suite("lm_eval", "some/model", **suites["lm_eval"])
    assert (config.lines.tasks, config.limit, config.data) == (("mmlu",), 3, None)


def test_metrics_of_tofu_one_by_one(experiment):
    """As OpenUnlearning writes a whole configuration down; its classifier and second model are told."""
    rouge = {
        "handler": "rouge",
        "rouge_type": "rougeL_recall",
        "batch_size": 32,
        "datasets": {
            "TOFU_QA_forget": {
                "handler": "QADataset",
                "args": {
                    "hf_args": {"name": "${eval.tofu.forget_split}_perturbed", "split": "train"},
                    "question_key": "question",
                    "max_length": 512,
                    "predict_with_generate": True,
                },
            }
        },
        "collators": {"DataCollatorForSupervisedDataset": {"args": {"padding_side": "left"}}},
        "generation_args": {"do_sample": False, "top_p": None, "temperature": None, "max_new_tokens": 200},
    }
    metrics = {
        "model_utility": {"handler": "hm_aggregate", "pre_compute": {"ra_Truth_Ratio": {"aggregator": "true_better"}}},
        "forget_quality": {
            "handler": "ks_test",
            "reference_logs": {"retain_model_logs": {"path": "${eval.tofu.retain_logs_path}"}},
        },
        "forget_Q_A_ROUGE": rouge,
        "mia_reference": {"handler": "mia_reference", "reference_model_path": "some/retained"},
        "mia_min_k": {"k": 0.4, "datasets": {"h": {"args": {"hf_args": {"name": "holdout05"}}}}},
        "forget_Q_A_gibberish": {"pre_compute": {"forget_Q_A_ROUGE": {"access_key": "text", **rouge}}, "max_length": 32,
                                 "handler": "classifier_prob", "class_id": 0},
    }  # fmt: skip
    own = yaml.safe_load(experiment.read_text())
    own["eval"]["tofu"] |= {"metrics": metrics, "holdout_split": "holdout05"}
    experiment.write_text(yaml.safe_dump(own))
    _, suites = read_experiment(experiment, ["retain_logs_path=log.json"])
    told = suites["open_unlearning"]
    assert told["reference"] == "some/retained"
    assert told["classifier"] == "madhurjindal/autonlp-Gibberish-Detector-492513457"
    assert told["logs"] == {"retain": "log.json"}


def test_a_composed_file_needs_no_folder(experiment, tmp_path):
    whole = {
        "model": {"model_args": {"pretrained_model_name_or_path": "m"}},
        "data": {role: {"x": {"handler": "QADataset", "args": {"hf_args": {"path": f"{role}.jsonl"}}}}
                 for role in ("forget", "retain")},
        "trainer": {"handler": "pyunlearn_satimp", "method_args": {"beta1": 4.0, "gamma": 0.5},
                    "args": {"max_steps": 9}},
        "eval": {"muse": {"data_split": "News", "metrics": {}}, "lm_eval": {"tasks": ["wmdp_bio", "mmlu"]}},
    }  # fmt: skip
    path = tmp_path / "whole.yaml"
    path.write_text(yaml.safe_dump(whole))
    run, suites = read_experiment(path)
    (term,) = run["unlearn"]["forget"]
    assert (term["name"], term["coefficient"], term["options"]) == ("satimp", 0.5, {"beta1": 4.0})
    assert run["unlearn"]["max_steps"] == 9
    assert suites == {"muse": {"data": "News"}, "lm_eval": {"tasks": ["wmdp_bio", "mmlu"]}}
    assert (run["unlearn"]["learning_rate"], run["unlearn"]["epochs"]) == (5e-5, 3.0)  # as transformers has them


def test_an_evaluation_has_its_model_and_suites(experiment):
    path = experiment.with_name("evaluation.yaml")
    path.write_text(
        """
        defaults: [{override /model: small}, {override /eval: tofu}]
        forget_split: forget10
        seed: 3
        eval: {tofu: {forget_split: "${forget_split}", retain_logs_path: "logs/${forget_split}.json"}}
        """
    )
    run, suites = read_experiment(path)
    assert run.keys() == {"name", "seed", "model"}
    assert run["seed"] == 3
    assert suites == {
        "open_unlearning": {"split": "forget10", "logs": {"retain": "logs/forget10.json"}, "prompt": TAGS}
    }


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["trainer.handler=PDU"], "trainer.handler='PDU': needs one of GradAscent"),
        (["trainer.method_args.betaa=1"], "npo: option='betaa': did you mean beta"),
        (["trainer.args.optim=lion"], "not understood: trainer.args.optim='lion' (needs 'adamw_torch'"),
        (["trainer.args.neftune_noise_alpha=5"], "not understood: trainer.args.neftune_noise_alpha; take them out"),
        (["data.anchor=retain"], "data.anchor='retain' (needs 'forget')"),
        (["eval.other.x=1"], "eval.other (needs one of tofu, muse, lm_eval)"),
        (
            ["trainer.args.max_steps=5", "trainer.args.warmup_epochs=2"],
            "trainer.args.warmup_epochs: goes with num_train_epochs",
        ),
        (["trainer.args.warmup_epochs=10"], "trainer.args.warmup_epochs=10 (needs fewer than the 10 epochs)"),
        ([NO_WARMUP, "trainer.args.warmup_ratio=1.0"], "trainer.args.warmup_ratio=1.0 (needs a share below 1)"),
        ([f"{EASY}.apply_chat_template=true"], f"{EASY}.apply_chat_template=True (needs False)"),
        ([f"{EASY}.num_fewshot=5"], f"{EASY}.num_fewshot=5 (needs none)"),
        ([f"{EASY}.system_instruction=Be brief."], f"{EASY}.system_instruction='Be brief.' (needs none)"),
        ([f"{EASY}.limit=0.5"], f"{EASY}.limit=0.5 (needs a number of samples)"),
        ([f"{EASY}.gen_kwargs=x"], f"not understood: {EASY}.gen_kwargs; take them out"),
        (["eval.lm_eval.tasks=[{task: gsm8k}]"], "eval.lm_eval.tasks: {'task': 'gsm8k'} (needs the name of a task)"),
        (["eval.tofu.holdout_split=holdout01"], "eval.tofu.holdout_split='holdout01' (needs 'holdout05')"),
        (["eval.muse.holdout_split=x"], "not understood: eval.muse.holdout_split; take them out"),
        (["eval.muse.metrics.forget_knowmem_ROUGE.rouge_type=x"], "ROUGE.rouge_type; take them out"),
        ([f"{METRICS}.mine.handler=mine"], f"not understood: {METRICS}.mine.handler; take them out"),
        ([f"{METRICS}.mia_min_k.k=0.2"], f"{METRICS}.mia_min_k.k=0.2 (needs 0.4)"),
        (
            [f"{METRICS}.forget_quality.pre_compute.forget_truth_ratio.aggregator=true_better"],
            "forget_truth_ratio.aggregator='true_better' (needs 'closer_to_1_better')",
        ),
        (
            [f"{METRICS}.forget_Q_A_Prob.datasets.TOFU_QA_forget.args.question_key=paraphrased_question"],
            "args.question_key='paraphrased_question' (needs 'question')",
        ),
        ([f"{METRICS}.forget_Q_A_ROUGE.generation_args.max_new_tokens=64"], "max_new_tokens=64 (needs 200)"),
        ([f"{METRICS}.forget_Q_A_ROUGE.generation_args.temperature=1.0"], "temperature=1.0 (needs none)"),
        (["model.model_args.pretrained_model_name_or_path=???"], "pretrained_model_name_or_path: needs a value"),
        (["data/datasets@data.forget=refused"], "data.forget: needs one data set, got ['refused', 'rows']"),
        (["data/datasets@data.forget=none"], "none.yaml: no such file"),
        (["trainer"], "choices: need KEY=VALUE, got ['trainer']"),
    ],
)
def test_what_is_not_understood_is_named(experiment, choices, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        read_experiment(experiment, choices)


def test_a_models_own_template_has_its_system_prompt(experiment):
    run = RunConfig.model_validate(read_experiment(experiment, ["model=chat"]).run)
    prompt = run.prompt
    assert (prompt.name, prompt.system, prompt.date, prompt.whole) == ("open_unlearning", "Be brief.", None, True)


def test_what_does_not_matter_can_be_left_out(experiment):
    choices = ["data.anchor=retain"]
    assert read_experiment(experiment, choices, leave_out=["data.anchor"]).run["data"]["source"] == "files"


def test_files_that_are_none(tmp_path):
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "broken.yaml").write_text("{a: [")
    (tmp_path / "groups.yaml").write_text("defaults: [{override /model: small}]")
    for name, message in (("no.yaml", "no such file"), ("list.yaml", "needs keys and values, got list"),
                          ("broken.yaml", "broken.yaml: is no YAML: "),
                          ("groups.yaml", "names groups (model), and no folder above it holds them")):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            read_experiment(tmp_path / name)
