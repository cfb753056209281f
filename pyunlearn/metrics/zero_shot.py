"""What a model can still do in general: tasks of lm-eval, the evaluation harness, on a model that is loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .._hints import near
from ..model.causal_lm import CausalLM, eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def zero_shot(
    model: nn.Module | CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    chat: bool = False,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, with `_stderr` ones beside, of tasks of lm-eval by their names there.

    Of a group, such as mmlu, the group's own values. A metric's filter stands after a comma where it has one
    ("exact_match,flexible-extract"). tasks: e.g. boolq, rte, hellaswag, winogrande, arc_challenge, arc_easy,
    openbookqa, piqa, the eight of SOUL and the MRD paper. folder: more tasks, lm-eval's YAML files, whose data may be
    local files; Python that they name is run, so take it from no one you do not trust. num_fewshot: None is each
    task's own; limit: samples of each task; chat: prompts by the tokenizer's chat template.

    Data sets that are not local come from the Hub. The model is in eval() meanwhile and as before afterwards.

    Raises ImportError without lm-eval, ValueError for no tasks, an unknown one, or a folder that is none.
    """
    if not tasks or isinstance(tasks, str):
        raise ValueError(f"tasks={tasks!r}: needs one or more names of lm-eval's tasks")
    manager = task_manager(tasks, folder)
    return run_tasks(
        CausalLM.of(model), tokenizer, tasks, manager, batch_size,
        num_fewshot=num_fewshot, limit=limit, chat=chat, seed=seed,
    )  # fmt: skip


def run_tasks(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: Any,
    batch_size: int,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """`zero_shot` of a `task_manager`, which takes seconds to make."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with eval_mode(lm.alone):
        ours = HFLM(pretrained=lm.alone, tokenizer=tokenizer, batch_size=batch_size, max_length=lm.context_length)
        results: Any = simple_evaluate(
            model=ours, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit,
            apply_chat_template=chat, log_samples=False, bootstrap_iters=0, random_seed=seed, numpy_random_seed=seed,
            torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    return {name: numbers(results["results"][name]) for name in tasks}


def task_manager(tasks: Sequence[str], folder: str | Path | None = None) -> Any:
    """lm-eval's, which knows all of these tasks. Raises ImportError and ValueError as `zero_shot`."""
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"folder={str(folder)!r}: needs a folder of lm-eval's YAML files")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"zero_shot needs lm-eval ({error}): pip install 'pyunlearn[eval]'") from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in tasks:
        if name not in manager.all_tasks:
            close = near(name, manager.all_tasks)
            meant = f"did you mean {' or '.join(close)}? " if close else ""
            raise ValueError(f"task={name!r}: {meant}needs one of lm-eval's tasks, or one in folder={folder}")
    return manager


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Of one task's results, what is a number."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in key
    }
