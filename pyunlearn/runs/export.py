"""A run's model to be given away, with a card that says what it forgot, what that cost, and how it was made."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from .._files import SEAL, check_writable, read_json, write_text
from .._terminal import visible
from ..data import make_format
from ..model.load import load_model
from ..training.folder import write_model
from .config import RunConfig, as_meant
from .folder import RunFolder, versions
from .job import check_as_written, quiet_libraries
from .provenance import describe, read_attempts
from .reinforce import told
from .run import RunResult, load_result, steps_taken
from .table import table_markdown

CARD = "README.md"
HUB_NAME = r"[\w.-]+/[\w.-]+"
MADE_BY = "Made to forget chosen samples by pyunlearn"


def export(run: str | Path, out: str | Path, *, push: str | None = None, console: Console | None = None) -> Path:
    """Writes the unlearned model of a finished run into the new folder `out`, merged where it is an adapter; with
    `push` also to that repository of the Hub, which is made private if there is none.

    Raises FileNotFoundError for no finished run, FileExistsError for a folder that holds anything, ValueError for a
    name that is none of the Hub's and for a model that is not what the run wrote, and OSError for what the Hub refuses.
    """
    folder, out = RunFolder(run), Path(out)
    result = load_result(folder.path)
    if push is not None and re.fullmatch(HUB_NAME, push) is None:
        raise ValueError(f"--push={push}: needs OWNER/NAME, a repository on the Hub")
    done = (out / CARD).is_file() and (out / SEAL).is_file() and MADE_BY in (out / CARD).read_text(encoding="utf-8")
    if out.exists() and not (done and push) and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out}: is there already; choose a new folder")
    console = console or Console(quiet=True)
    quiet_libraries()
    if push is not None:  # before the work
        url = ask_hub(push, lambda hub: hub.create_repo(push, private=True, exist_ok=True))
    if not done:
        check_as_written(folder.checkpoint)  # the card's numbers are of that model
        check_writable(out / CARD, f"--out {out}")
        config = RunConfig.model_validate(as_meant(folder.read_config()))
        model, tokenizer = load_model(str(folder.checkpoint), dtype=config.model.dtype)
        if out.is_dir():
            out.rmdir()
        write_model(out, model, tokenizer)
        asked = make_format(tokenizer, config.prompt).prompt("QUESTION")
        write_text(out / CARD, model_card(folder, config, result, push or out.name, asked))
    console.print(f"model   {visible(out)}", markup=False, highlight=False, soft_wrap=True)
    if push is not None:
        message = "An unlearned model, its card and its numbers"
        ask_hub(push, lambda hub: hub.upload_folder(repo_id=push, folder_path=out, commit_message=message))
        console.print(f"pushed  {visible(url)}", markup=False, highlight=False, soft_wrap=True)
    return out


def ask_hub(name: str, ask: Callable[[Any], Any]) -> Any:
    """Raises what the Hub's client raises, and ConnectionError where there is no way to the Hub."""
    from huggingface_hub import HfApi

    try:
        return ask(HfApi())
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the library underneath, which is another in other releases
        raise ConnectionError(f"--push={name}: the Hub cannot be reached ({type(error).__name__}: {error})") from None


def model_card(folder: RunFolder, config: RunConfig, result: RunResult, name: str, asked: str) -> str:
    """Markdown, with the Hub's keys before it. asked: a question in the run's prompt."""
    model, verdict = config.model, result.verdict
    keys: dict[str, object] = {"library_name": "transformers", "tags": ["unlearning", "pyunlearn"]}
    if not model.embedded and re.fullmatch(HUB_NAME, model.name_or_path) and not Path(model.name_or_path).exists():
        keys["base_model"] = model.name_or_path
    unlearning = read_json(folder.unlearning, "--resume of the run makes it again")
    calibrated = folder.read_config().get("calibration") or {}
    later = {"calibration": ", ".join(f"{key} = {value}" for key, value in calibrated.items())} if calibrated else {}
    made = describe(config, read_attempts(folder), steps_taken(config, unlearning) | later)
    combined = config.unlearn.reinforce is not None and config.unlearn.reinforce.into == "logits"
    loading = [
        "It is two models, base/ and reinforced/, whose logits are combined whenever it is asked:",
        "`pyunlearn.model.load.load_model(FOLDER)` has it as one; base/ alone knows what was to be forgotten.",
        "",
    ]
    goals = [f"- {'met' if goal['met'] else 'missed'}: {goal['text']}" for goal in result.goals]
    reached = [] if verdict is None else [f"**{verdict['name'].capitalize()}**: {verdict['reason']}.", ""]
    lines = [
        "---", yaml.safe_dump(keys, sort_keys=False).strip(), "---", "",
        f"# {name}", "",
        f"{MADE_BY} {versions()['pyunlearn']}, with `{told(config.unlearn)}`.", "",
        *(loading if combined else []),
        "## Verdict", "", *reached, *goals, "",
        "## Before and after", "", table_markdown(result.table).strip(), "",
        "In brackets: 95 % intervals over such samples (bootstrap). What a model no longer says it may still know: "
        "probing, paraphrases or further training can bring it back.", "",
        "## How to ask it", "", "As in the unlearning, a question goes in as", "", "```text", asked, "```", "",
        "## How it was made", "", *(f"- {key}: {value}" for key, value in made.items()), "",
    ]  # fmt: skip
    return "\n".join(lines)
