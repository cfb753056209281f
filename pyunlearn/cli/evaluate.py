"""`pyunlearn evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .._terminal import make_console, visible
from .shared import (
    BatchSize,
    Columns,
    Data,
    Debug,
    GgufFile,
    Limit,
    Model,
    Name,
    Prompt,
    Tokenizer,
    clean_errors,
    command_line,
)

EXAMPLES = """[bold]Examples[/bold]

  pyunlearn evaluate --model runs/demo/checkpoint --data forget.jsonl \\
      --out records.jsonl

  pyunlearn evaluate --model runs/demo/checkpoint --data forget.jsonl \\
      --metric rouge_l --metric fluency

  pyunlearn evaluate --suite tofu --model runs/x/checkpoint --data tofu \\
      --retain-log retain90/TOFU_EVAL.json --out eval

  pyunlearn evaluate --suite whp --model runs/x/checkpoint --data hp \\
      --text wikitext.txt --task boolq --task piqa
"""
Log = Annotated[str | None, typer.Option(help="Log of a reference model, from --out or OpenUnlearning or TOFU.")]


def evaluate(
    source: Annotated[
        str | None,
        typer.Argument(help="The file, or the folder of a model or a run.", show_default=False, metavar="SOURCE"),
    ] = None,
    model: Model[str | None] = None,
    data: Data[str | None] = None,
    name: Name = None,
    gguf_file: GgufFile = None,
    tokenizer: Tokenizer = None,
    limit: Limit = None,
    columns: Columns = None,
    prompt: Prompt = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric of `pyunlearn metrics` (repeatable); none: the usual ones.", show_default=False),
    ] = None,
    embedder: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a sentence embedding model, for cosine_similarity.")
    ] = None,
    entailer: Annotated[
        str | None, typer.Option(help="The same of a model of natural language inference, for entailment_score.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="The same of a text classifier, for clean or toxicity.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible server that judges, e.g. http://localhost:8000/v1.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name on that server.")] = None,
    rouge_samples: Annotated[
        int | None, typer.Option(min=0, help="Samples to generate for; 0 is none.", show_default="20")
    ] = None,
    batch_size: BatchSize = 16,
    variant: Annotated[
        str | None,
        typer.Option(help="suffix, or open_unlearning: leaves an answer's last token out.", show_default="suffix"),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="All numbers of tofu, open_unlearning, closer_look, mrd_paper, g_effect_paper or tutorial; --data is "
            "then a folder or Hub data set with TOFU's files (forget10_perturbed.jsonl, retain_perturbed.jsonl, ...). "
            "Or of muse (knowmem/forget_qa.json, ...), wmdp (wmdp-bio.jsonl, ...), whp (hp_test_qa_300.jsonl, ...) or "
            "safe (pku_train.jsonl, ...). lm_eval has --task's alone, without --data. `pyunlearn metrics` lists them."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of TOFU's forget set.", show_default="forget10")] = None,
    text: Annotated[str | None, typer.Option(help="A text file, for the perplexity of whp and safe.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A zero-shot task of lm-eval in the place of the suite's own: TASK, TASK/METRIC or "
            "TASK/METRIC,FILTER (repeatable).",
            show_default=False,
        ),
    ] = None,
    task_folder: Annotated[
        str | None, typer.Option(help="Folder with more tasks, lm-eval's YAML files. Python that they name is run.")
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(
            help="The model before unlearning, for lines that compare with what it wrote; of a run's model, where the "
            "run began unless named.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="A second model, for mia_reference: one that never saw the forget set.", show_default=False),
    ] = None,
    retain_log: Log = None,
    full_log: Log = None,
    out: Annotated[
        Path | None, typer.Option(help="Write one JSON line per sample here; of a suite the log, into this folder.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure how well a model knows a set of answers."""
    with clean_errors(debug):
        from ..data.prompts import make_prompt
        from ..runs.overrides import problems_told
        from ..runs.request import check_pair, columns_of, kind_of, of_source, prompt_of

        console, command = make_console(), command_line()
        if source is not None and kind_of(source) == "configuration":
            raise ValueError(f"{source}: is a configuration; needs a file, or the folder of a model or a run")
        if source is not None and kind_of(source) == "run" and model is None and data is None:
            model = str(Path(source) / "checkpoint")
        else:
            _, model, data = of_source(source, model, data)
        if suite is None or model is None:
            model, data = check_pair("evaluate", model, data)
        if prompt is None and (prompt := prompt_of(model)) is not None:
            called = visible(make_prompt(prompt).name)
            console.print(f"prompt: {called}, as in its run", markup=False, highlight=False, soft_wrap=True)
        if suite is None and columns is None and data is not None and (own := columns_of(model, data)) is not None:
            columns = ",".join(f"{field}={column}" for field, column in own.items())
            console.print(f"columns: {visible(columns)}, as in its run", markup=False, highlight=False, soft_wrap=True)
        model_options: dict[str, Any] = {
            "gguf_file": gguf_file,
            "tokenizer": tokenizer,
            "limit": limit,
            "batch_size": batch_size,
            "prompt": prompt,
        }
        of_suites: dict[str, Any] = {
            "split": split, "text": text, "task": task, "task-folder": task_folder, "retain-log": retain_log,
            "full-log": full_log, "before": before, "reference": reference,
        }  # fmt: skip
        of_sets: dict[str, Any] = {
            "name": name, "columns": columns, "rouge-samples": rouge_samples, "variant": variant, "metric": metric,
        }  # fmt: skip
        for option, value in (of_suites if suite is None else of_sets).items():
            if value is not None:
                raise ValueError(f"--{option}={value}: goes {'with' if suite is None else 'without'} --suite only")
        if (judge is None) != (judge_model is None):
            raise ValueError("--judge and --judge-model go together: the URL of a server, and a model's name there")
        tools: dict[str, Any] = {
            "embedder": embedder, "entailer": entailer, "classifier": classifier,
            "judge": None if judge is None else {"url": judge, "model": judge_model},
        }  # fmt: skip
        if suite is None:
            from ..runs.evaluate import evaluate_files
            from ..runs.files_config import FilesConfig

            _, told = check_pair("evaluate", model, data)
            with problems_told():
                files = FilesConfig.of(
                    model, told, name=name, columns=columns,
                    rouge_samples=20 if rouge_samples is None else rouge_samples,
                    variant=variant or "suffix", metrics=metric or (), **tools, **model_options,
                )  # fmt: skip
            evaluate_files(files, out=out, console=console, command=command)
        else:
            from ..runs.files_config import SuiteConfig
            from ..runs.suite import evaluate_suite_files

            logs = {key: log for key, log in (("retain", retain_log), ("full", full_log)) if log is not None}
            with problems_told():
                config = SuiteConfig.of_suite(
                    suite, model, data, split=split, text=text, tasks=task or (), task_folder=task_folder, logs=logs,
                    before=before, reference=reference, **tools, **model_options,
                )  # fmt: skip
            evaluate_suite_files(config, out=out, console=console, command=command)
