"""Measure perplexity and answers the same way for every checkpoint."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmc_attnmask.calibration.memory import reuse_freed_memory
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.checkpoint.source import read_tokenizer
from llmc_attnmask.evaluation.answers import (
    Agreement,
    agreement,
    reference_answers,
)
from llmc_attnmask.evaluation.batches import batches
from llmc_attnmask.text.dataset import BUILTIN, load_texts
from llmc_attnmask.text.dialogs import has_template
from llmc_attnmask.text.windows import evaluation_windows, window_length


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint's perplexity, and the conditions of the measurement."""

    model: str
    perplexity: float
    windows: int
    window_length: int  # tokens
    tokens: int  # predicted tokens: all but the first of each window
    bos: str  # what precedes each document in the token stream
    text: str
    dtype: str = "float32"
    answers: Agreement | None = None  # with the reference, on its own answers


def evaluate(
    models: Sequence[str | Path],
    text: str = BUILTIN,
    max_length: int | None = None,
    text_column: str = "text",
    reference: str | Path | None = None,
    answers: bool = True,
) -> list[Evaluation]:
    """Measure checkpoints on one text and on the reference's own answers.

    Perplexity is measured over non-overlapping windows of the text.

    It is exp of the mean over windows of the mean negative log-likelihood per predicted
    token, computed in float32. Every checkpoint reads the text with its own tokenizer.

    With a reference that has a chat template, its most likely answers to 32 prompts are
    compared with what each checkpoint would have answered, token by token
    (``agreement``). A checkpoint of another vocabulary is left out of that.

    :param models: local folders or Hub names
    :param text: as for ``load_texts``; its evaluation split is read
    :param max_length: window length in tokens; by default 2048 or, if less, the model's
        number of positions
    :param reference: the dense model, which is measured first
    :param answers: whether to compare answers
    :return: one for each model, the reference's first
    :raises ValueError: if the model has fewer positions than ``max_length``
    """
    texts = list(load_texts(text, text_column, split="evaluation"))
    results = []
    dense: _Reference | None = None
    for name in [*([reference] if reference else []), *models]:
        model = load_model(name)
        length = window_length(model.config, max_length)
        tokenizer = read_tokenizer(name)
        windows = evaluation_windows(texts, tokenizer, length)
        results.append(
            Evaluation(
                model=str(name),
                perplexity=perplexity(model, windows),
                windows=len(windows),
                window_length=length,
                tokens=len(windows) * (length - 1),
                bos=repr(tokenizer.bos_token) if tokenizer.bos_token else "none",
                text=str(text),
                answers=dense.compared(model, tokenizer) if dense else None,
            )
        )
        first = len(results) == 1
        if first and reference and answers and has_template(tokenizer):
            dense = _Reference(model, tokenizer)
        del model  # not in memory beside the next one, unless it is the reference
    return results


class _Reference:
    """The reference with its answers, for checkpoints to be compared with."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self._model, self._tokenizer = model, tokenizer
        self._answers = reference_answers(model, tokenizer)

    def compared(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Agreement | None:
        sizes = {
            m.get_output_embeddings().weight.shape[0] for m in (model, self._model)
        }
        if tokenizer.get_vocab() != self._tokenizer.get_vocab() or len(sizes) > 1:
            warnings.warn(
                f"{model.config.name_or_path} has another vocabulary than the "
                "reference, so it is not compared on the reference's answers",
                stacklevel=3,
            )
            return None
        return agreement(self._model, model, self._answers)


def load_model(name: str | Path) -> PreTrainedModel:
    """Load a checkpoint in float32 with eager attention, on the GPU if there is one."""
    reuse_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(name, dtype=torch.float32, attn_implementation="eager")
    return model.eval().to(torch.device(device))


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """Return exp of the mean over windows of the mean loss per predicted token.

    :param windows: int64 [windows, length]
    :raises ValueError: if the mean loss is not finite
    """
    device = next(model.parameters()).device
    total = 0.0
    for batch in tqdm(batches(windows), desc="perplexity", leave=False):
        ids = batch.to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        total += loss.item() * len(batch)
    mean = total / len(windows)
    if not math.isfinite(mean):
        raise ValueError(
            f"the mean loss is {mean}: weights or activations of "
            f"{model.config.name_or_path or 'the model'} overflow or are NaN"
        )
    return math.exp(min(mean, 700.0))  # beyond this, float64 gives infinity
