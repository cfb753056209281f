"""Text that objectives are of and that no data set has: a model's own samples, and alternate answers.

What is drawn is kept by prompt, below texts/ in the training's folder, in a folder of the model that has written it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..data import ForgetRetainDataset, QADataset
from ..data.prompt_format import IGNORE_INDEX
from ..data.rows import brief
from ..metrics import Kept, sample_tokens
from ..model.causal_lm import CausalLM
from ..objectives import Samples
from ..store import Store
from .as_found import left_as_found, random_as_found
from .remembering import Remembering
from .stage import Stage

logger = logging.getLogger("pyunlearn")
Row = dict[str, Any]
ASK_ANOTHER = (
    "Question: {question}\nAnswer: {answer}\n\nWrite another answer to this question, in the form of this one: "
    "plausible, but with other facts. Write the answer alone."
)
TRIES = 10  # of an alternate answer that is empty


def samples_of(stage: Stage, model: Any, tokenizer: Any, rows: QADataset, wanted: Samples, store: Store) -> list[Row]:
    """N rows a question, those of question i from i * N on: its prompt, and a sample of `model` supervised.

    The very tokens, with the end token where the model came to one; cut where a row would be longer than rows may be.
    """
    prompts = [rows.prompt_format.prompt_ids(item.question) for item in rows.items]
    texts = drawn(stage, model, tokenizer, prompts, wanted, store, "sampling")
    made: list[Row] = []
    for prompt, own in zip(prompts, texts, strict=True):
        for tokens in own:
            room = len(tokens) if rows.max_length is None else rows.max_length - len(prompt)
            made.append(row_of(prompt, tokens[:room], len(made)))
    ends = {tokenizer.eos_token_id, *tokenizer.all_special_ids}
    empty = sum(all(token in ends for token in tokens) for own in texts for tokens in own)
    if empty:
        logger.warning("samples: %d of %d are empty, the model ends at once", empty, len(made))
    return made


def row_of(prompt: Sequence[int], tokens: Sequence[int], index: int) -> Row:
    labels = torch.tensor([IGNORE_INDEX] * len(prompt) + list(tokens))
    return {"input_ids": torch.tensor([*prompt, *tokens]), "labels": labels, "index": index}


def alternates_of(
    stage: Stage, model: Any, tokenizer: Any, rows: QADataset, wanted: Samples, store: Store
) -> QADataset:
    """N rows a question, those of question i from i * N on: the question, and another answer that `model` makes up.

    An empty one is drawn again. Raises ValueError for a question to which `model` still gives none, and for one that is
    too long to be asked so.
    """
    prompt_format = rows.prompt_format
    prompts = [
        prompt_format.prompt_ids(ASK_ANOTHER.format(question=item.question, answer=item.answer)) for item in rows.items
    ]
    context = CausalLM.of(model).context_length
    for item, prompt in zip(rows.items, prompts, strict=True):
        if context is not None and len(prompt) >= context:
            raise ValueError(
                f"altpo: to ask for another answer to {brief(item.question)} takes {len(prompt)} tokens, and the "
                f"model's context is {context}"
            )
    texts = [[""] * wanted.count for _ in prompts]
    for attempt in range(TRIES):
        left = [i for i, own in enumerate(texts) if not all(own)]
        if not left:
            break
        some = [prompts[i] for i in left]
        for i, own in zip(
            left, drawn(stage, model, tokenizer, some, wanted, store, "alternates", attempt), strict=True
        ):
            texts[i] = [known or fitted(rows, i, tokens) for known, tokens in zip(texts[i], own, strict=True)]
    else:
        empty = next((i for i, own in enumerate(texts) if not all(own)), None)
        if empty is not None:
            raise ValueError(
                f"altpo: the model gives no other answer to {brief(rows.items[empty].question)}, {TRIES} times an "
                "empty one; needs a model that writes text"
            )
    items = [item for item in rows.items for _ in range(wanted.count)]
    answers = [text for own in texts for text in own]
    return QADataset(items, tokenizer, rows.max_length, answers, prompt_format, rows.text_mask)


def fitted(rows: QADataset, i: int, tokens: Sequence[int]) -> str:
    """The text of an answer's tokens, of as many as a row has room for; "" where that is white space."""
    tokenizer, question = rows.prompt_format.tokenizer, rows.items[i].question
    for count in range(len(tokens), 0, -1):
        text = str(tokenizer.decode(tokens[:count], skip_special_tokens=True)).strip()
        if not text or rows.max_length is None:
            return text
        if len(rows.prompt_format.encode(question, text).input_ids) <= rows.max_length:
            return text
    return ""


def drawn(
    stage: Stage,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    wanted: Samples,
    store: Store,
    description: str,
    attempt: int = 0,
) -> list[list[list[int]]]:
    return sample_tokens(
        model,
        tokenizer,
        prompts,
        count=wanted.count,
        temperature=wanted.temperature,
        max_new_tokens=wanted.max_new_tokens,
        seed=f"{stage.seed}/{description}/{attempt}",
        batch_size=stage.reference_batch_size,
        store=store,
        description=description,
        progress=stage.progress,
    )


def texts_of(stage: Stage, model: Any) -> Store:
    """Where the texts of this very model are kept."""
    return Kept(stage.folder.texts, model).store


def name_of(store: Store) -> str:
    return "" if store.place is None else store.place.name


@dataclass
class Drawn:
    """epoch: of the last drawing. by: the model's name among those whose texts are kept."""

    epoch: int
    by: str


class Resample(Remembering):
    """Draws the samples of a training anew, by its model as it is then, whenever so many epochs have gone by.

    Which model's samples a checkpoint goes on with is in its trainer_state.json, the samples themselves are in the
    folder; what is drawn depends on model and seed alone, so that a resumed training has the same bits.

    Raises ValueError, when the training begins, for a model that is sharded, workers that outlive an epoch, or samples
    that are gone.
    """

    absent = "the checkpoint has no state of the samples: it is from a training that drew none anew"

    def __init__(self, stage: Stage, tokenizer: Any, pairs: ForgetRetainDataset, wanted: Samples, start: Store):
        self.stage, self.tokenizer, self.pairs, self.wanted = stage, tokenizer, pairs, wanted
        self.start, self.memory = start, Drawn(0, name_of(start))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if CausalLM.of(model).sharded:
            raise ValueError("bss: samples of a sharded model are drawn once, before training; set refresh_epochs=0")
        if args.dataloader_persistent_workers:
            raise ValueError("bss: dataloader_persistent_workers keeps the first epoch's samples; set refresh_epochs=0")
        if self.remembers(state) and self.memory.by != name_of(self.start):
            folder = self.stage.folder.texts / self.memory.by
            questions = {item.question for item in self.pairs.forget.items}
            if not folder.is_dir() or len(Store(folder).names()) < len(questions):
                raise ValueError(
                    f"{folder}: lacks samples that {self.stage.folder.last_checkpoint('unlearn')} goes on with; begin "
                    "the run anew (--overwrite)"
                )
            self.take(model, Store(folder))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        epoch = int(state.epoch or 0)
        if epoch == self.memory.epoch or epoch % self.wanted.refresh_epochs:
            return
        store, count = texts_of(self.stage, model), self.wanted.count * len(self.pairs.forget)
        self.stage.console.print(f"epoch {epoch}: the model as it is draws {count} samples anew")
        self.memory = Drawn(epoch, name_of(store))
        self.take(model, store)

    def take(self, model: Any, store: Store) -> None:
        """Samples from the store; those that it does not have yet are drawn, by the first process before the others."""
        quiet = replace(self.stage, console=Console(quiet=True))  # the training's bar is on the screen
        with left_as_found(model), random_as_found(), self.stage.processes.first_first():
            rows = samples_of(quiet, CausalLM(model).alone, self.tokenizer, self.pairs.forget, self.wanted, store)
        model.zero_grad()
        self.pairs.together["forget_sample"] = rows
