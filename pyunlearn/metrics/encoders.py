"""Small models that read what was written, as tools of metrics: sentence embeddings, and classifiers of texts.

They are loaded as every model here, safetensors and no code of their own, and read in evaluation mode, in float32, in
batches of similar length: a text's numbers are its own whatever it is batched with, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._files import read_json
from .._hints import check_known
from .._hub import here_or_asked
from ..model.forward import length_batches
from ..model.load import load_encoder

Text = str | tuple[str, str]  # a pair, where a model compares two
UNTOLD = 10**9  # a tokenizer's length limit beyond this is none
MODE = "pooling_mode_"  # how their keys begin that say how tokens are pooled
POOLED = ("Transformer", "Pooling", "Normalize")  # modules of a sentence-transformers model that are done here


class Encoder:
    """A model of sentences with its tokenizer; see `Embedder` and `Classifier`."""

    def __init__(
        self,
        kind: Any,
        name: str,
        what: str,
        max_length: int | None,
        batch_size: int,
        device: str | torch.device,
        spared: str | None = None,
    ):
        self.name, self.batch_size = name, batch_size
        self.model, self.tokenizer = load_encoder(kind, name, what, spared)
        self.model.to(device)
        limits = [max_length, self.tokenizer.model_max_length, positions_of(self.model)]
        self.max_length = min((limit for limit in limits if limit and limit < UNTOLD), default=None)

    def outputs(self, texts: Sequence[Text], max_length: int | None) -> list[tuple[list[int], Any, Tensor]]:
        """By batch: which texts, what the model says of them, and the mask of real tokens, (batch, longest)."""
        limit = min((each for each in (max_length, self.max_length) if each), default=None)

        def encode(chosen: Sequence[Text], **options: Any) -> Any:
            sides = zip(*(text if isinstance(text, tuple) else (text,) for text in chosen), strict=True)
            parts = [list(side) for side in sides]
            return self.tokenizer(*parts, truncation=limit is not None, max_length=limit, verbose=False, **options)

        told = []
        lengths = [len(ids) for ids in encode(texts)["input_ids"]] if texts else []
        for batch in length_batches(lengths, self.batch_size):
            inputs = encode([texts[i] for i in batch], padding=True, return_tensors="pt").to(self.model.device)
            with torch.no_grad():
                told.append((batch, self.model(**inputs), inputs["attention_mask"]))
        return told


class Embedder(Encoder):
    """Sentence embeddings: the mean of an encoder's last hidden states over a text's tokens, scaled to length one.

    Reimers and Gurevych (2019), SBERT. name: a folder or a Hub id, e.g. sentence-transformers/paraphrase-MiniLM-L6-v2.
    max_length: tokens of a text, the rest is cut off; None: what the model was trained with. Called with N texts it
    returns (N, H) float32 on the CPU.

    Raises as `load_model`, and ValueError for a sentence-transformers model that does anything else than this.
    """

    def __init__(
        self, name: str, *, max_length: int | None = None, batch_size: int = 32, device: str | torch.device = "cpu"
    ):
        from transformers import AutoModel

        super().__init__(AutoModel, name, "embedder", max_length, batch_size, device, spared="pooler")
        for module in beside(name, "modules.json") or []:
            kind = str(module.get("type")).rpartition(".")[2]
            pooling = beside(name, f"{module.get('path')}/config.json") if kind == "Pooling" else None
            check_mean(name, kind, pooling or {})
        trained = (beside(name, "sentence_bert_config.json") or {}).get("max_seq_length")
        if max_length is None and trained is not None:
            self.max_length = min(trained, self.max_length or trained)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        embedded = torch.zeros(len(texts), self.model.config.hidden_size)
        for batch, output, mask in self.outputs(texts, None):
            weights = mask.unsqueeze(-1).float()
            mean = (output.last_hidden_state * weights).sum(1) / weights.sum(1).clamp_min(1)
            embedded[batch] = F.normalize(mean, dim=-1).cpu()
        return embedded


class Classifier(Encoder):
    """Probabilities of a text's, or a pair's, labels.

    name: a folder or a Hub id of a sequence classification model. what: the argument that errors name. labels: its
    labels in lower case. Called with N texts, or N pairs, it returns (N, labels) float32 on the CPU: sigmoids where the
    model was trained on several labels at once, or has one alone, else a softmax, as transformers' pipeline does.

    Raises as `load_model`.
    """

    def __init__(
        self,
        name: str,
        *,
        what: str = "classifier",
        max_length: int | None = None,
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ):
        from transformers import AutoModelForSequenceClassification

        super().__init__(AutoModelForSequenceClassification, name, what, max_length, batch_size, device)
        self.what = what
        config = self.model.config
        self.labels = [str(config.id2label[i]).lower() for i in range(config.num_labels)]
        self.independent = config.problem_type == "multi_label_classification" or config.num_labels == 1

    def __call__(self, texts: Sequence[Text], max_length: int | None = None) -> Tensor:
        probabilities = torch.zeros(len(texts), len(self.labels))
        for batch, output, _ in self.outputs(texts, max_length):
            logits = output.logits.float()
            probabilities[batch] = (logits.sigmoid() if self.independent else logits.softmax(-1)).cpu()
        return probabilities

    def column(self, label: str) -> int:
        """Which label this is. Raises ValueError that names those there are."""
        check_known(f"{self.what} {self.name!r}: label", label, self.labels)
        return self.labels.index(label)


def positions_of(model: Any) -> int | None:
    """The longest text, in tokens, that its positions reach. Those of RoBERTa's kind begin behind the padding's."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return None
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = getattr(next(tables, None), "padding_idx", None)
    return positions if padding is None else positions - padding - 1


def beside(name: str, file: str) -> Any:
    """A file of JSON beside a model's, or None."""
    from transformers.utils import cached_file

    folder = here_or_asked(name, file)
    path = cached_file(
        folder, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if path is None else read_json(path, "get the model's files again")


def check_mean(name: str, kind: str, pooling: dict[str, Any]) -> None:
    """Raises ValueError unless a module of a sentence-transformers model is what `Embedder` does."""
    modes = [key.removeprefix(MODE) for key, on in pooling.items() if key.startswith(MODE) and on]
    if kind not in POOLED or modes not in ([], ["mean_tokens"]):
        found = f"pooling by {', '.join(modes)}" if kind == "Pooling" else f"a module {kind}"
        raise ValueError(f"embedder={name!r}: has {found}; needs a model that takes the mean of its last hidden states")
