"""Measure perplexity the same way for every checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.checkpoint.source import read_tokenizer
from llmc_attnmask.evaluation.batches import batches
from llmc_attnmask.text.dataset import BUILTIN, load_texts
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


def evaluate(
    models: Sequence[str | Path],
    text: str = BUILTIN,
    max_length: int | None = None,
    text_column: str = "text",
) -> list[Evaluation]:
    """Measure the perplexity of checkpoints over non-overlapping windows of one text.

    It is exp of the mean over windows of the mean negative log-likelihood per predicted
    token, computed in float32. Every checkpoint reads the text with its own tokenizer.

    :param models: local folders or Hub names
    :param text: as for ``load_texts``; its evaluation split is read
    :param max_length: window length in tokens; by default 2048 or, if less, the model's
        number of positions
    :raises ValueError: if the model has fewer positions than ``max_length``
    """
    texts = list(load_texts(text, text_column, split="evaluation"))
    results = []
    for name in models:
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
            )
        )
    return results


def load_model(name: str | Path) -> PreTrainedModel:
    """Load a checkpoint in float32 with eager attention, on the GPU if there is one."""
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
