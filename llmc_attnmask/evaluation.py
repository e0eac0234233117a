"""Perplexity and attention error, measured the same way for every checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from llmc_attnmask.attention.capture import AttentionReplica
from llmc_attnmask.attention.inputs import ModuleInputs
from llmc_attnmask.attention.matrix import attention_error, attention_norms
from llmc_attnmask.attention.projections import attention_modules
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.checkpoint.source import read_tokenizer
from llmc_attnmask.data import BUILTIN, evaluation_windows, load_texts

DEFAULT_LENGTH = 2048
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint's perplexity and the conditions it was measured under."""

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
    """Perplexity of checkpoints over non-overlapping windows of one text.

    The mean over windows of the mean negative log-likelihood per predicted token, then
    exp; arithmetic in float32. Every checkpoint reads the text with its own tokenizer.

    :param models: local folders or hub names
    :param text: what ``load_texts`` takes; its evaluation split is read
    :param max_length: window length in tokens; by default 2048 or, if less, what the
        model was trained for
    :raises ValueError: if the model's positions do not reach that far
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
    """A checkpoint in float32, with eager attention, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(name, dtype=torch.float32, attn_implementation="eager")
    return model.eval().to(torch.device(device))


def window_length(config: object, asked: int | None) -> int:
    """The window to use: what was asked for, within the model's positions."""
    most = getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
    if not isinstance(most, int) or most < 2:
        raise ValueError(
            f"config.json has max_position_embeddings {most!r}; expected at least 2"
        )
    if asked is None:
        return min(DEFAULT_LENGTH, most)
    if not 2 <= asked <= most:
        raise ValueError(
            f"max_length is {asked}; expected between 2 and {most}, the positions this "
            "model has"
        )
    return asked


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """exp of the mean over windows of the mean loss per predicted token.

    :param windows: int64 [windows, length]
    """
    device = next(model.parameters()).device
    batch_size = max(1, _TOKENS_AT_ONCE // windows.shape[1])
    total = 0.0
    for batch in tqdm(windows.split(batch_size), desc="perplexity", leave=False):
        ids = batch.to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        total += loss.item() * len(batch)
    mean = total / len(windows)
    if not math.isfinite(mean):
        raise ValueError(
            f"the mean loss is {mean}: weights or activations of "
            f"{model.config.name_or_path or 'the model'} overflow or are no numbers"
        )
    return math.exp(min(mean, 700.0))  # beyond is infinity in double precision


def unigram_perplexity(train: Tensor, held_out: Tensor, vocabulary: int) -> float:
    """Perplexity of token frequencies alone, add-one smoothed: what to be better than.

    :param train: int64 token ids that are counted, any shape
    :param held_out: int64 token ids that are predicted, any shape
    """
    counts = torch.bincount(train.flatten(), minlength=vocabulary).double() + 1
    log_probability = (counts / counts.sum()).log()
    return math.exp(-log_probability[held_out].mean())


@torch.no_grad()
def attention_errors(
    dense: PreTrainedModel, pruned: PreTrainedModel, windows: Tensor
) -> dict[str, float]:
    """||A - A~||_F^2 / ||A||_F^2 of every attention module, on equal inputs.

    Both see what reaches the module in the dense model, so a layer's error is its own
    and not its predecessors'.

    :param windows: int64 [windows, length]
    :return: module name -> relative error
    """
    inputs = attention_inputs(dense, windows)
    errors = {}
    for name, collected in inputs.items():
        if not len(collected):  # text does not reach a vision tower
            continue
        replicas = [AttentionReplica(m.get_submodule(name)) for m in (dense, pruned)]
        error = norm = 0.0
        for batch in collected.batches(range(len(collected)), 8):
            args, kwargs = collected.batch(batch, replicas[0].device, torch.float32)
            reference, changed = (replica(args, kwargs) for replica in replicas)
            error += attention_error(reference, changed.query, changed.key).item()
            norm += attention_norms(reference).matrix
        errors[name] = error / norm
    return errors


@torch.no_grad()
def attention_inputs(
    model: PreTrainedModel, windows: Tensor
) -> dict[str, ModuleInputs]:
    """What reaches every attention module of a model, collected on CPU."""
    inputs = {name: ModuleInputs() for name in attention_modules(model)}

    def collector(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs[name].append(args, kwargs)

        return hook

    handles = [
        module.register_forward_pre_hook(collector(name), with_kwargs=True)
        for name, module in attention_modules(model).items()
    ]
    device = next(model.parameters()).device
    try:
        for batch in windows.split(max(1, _TOKENS_AT_ONCE // windows.shape[1])):
            model(input_ids=batch.to(device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return inputs
