"""Cut texts into windows of tokens, for calibration and evaluation alike.

The texts are tokenized into one stream: ``[bos] + tokens`` per document (without bos if
the tokenizer has none), joined in order. Calibration takes equally spaced windows,
evaluation every non-overlapping window. Where the tokenizer itself begins every text
with bos, the first token of every window gives way to it, because a model that has
always had it there does not read well without it (Gemma 3 270M has a perplexity of 37
instead of 26).
"""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmc_attnmask.text.dataset import DatasetError

DEFAULT_LENGTH = 2048  # tokens
# Calibration reads at most this many times as many tokens as it takes.
STREAM_TO_SAMPLE = 64


def calibration_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, count: int, length: int
) -> Tensor:
    """Return ``count`` equally spaced windows of the token stream.

    :return: int64 [count, length]
    :raises DatasetError: if the texts are empty, shorter than one window, or too short
        for that many different windows
    """
    stream = token_stream(texts, tokenizer, most=count * length * STREAM_TO_SAMPLE)
    _check_length(stream, length)
    if count > len(stream) - length + 1:
        raise DatasetError(
            f"{len(stream)} tokens of text are too few for {count} different windows "
            f"of {length}; give more text or ask for fewer"
        )
    if len(stream) < count * length:
        warnings.warn(
            f"{len(stream)} tokens of text for {count} windows of {length}: they "
            "overlap; give more text or ask for fewer",
            stacklevel=2,
        )
    starts = torch.linspace(0, len(stream) - length, count).long()
    windows = [stream[start : start + length] for start in starts.tolist()]
    return _begun(torch.stack(windows), tokenizer)


def evaluation_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> Tensor:
    """Return all non-overlapping windows of the token stream.

    Tokens that do not fill a window are dropped.

    :return: int64 [windows, length]
    :raises DatasetError: if the texts are empty or shorter than one window
    """
    stream = token_stream(texts, tokenizer)
    _check_length(stream, length)
    windows = stream[: len(stream) // length * length].view(-1, length)
    return _begun(windows, tokenizer)


def token_stream(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, most: int | None = None
) -> Tensor:
    """Join ``[bos] + tokens`` of each text, and stop at the text that reaches ``most``.

    :return: int64 [tokens]
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids: list[int] = []
    for text in texts:
        ids.extend(bos)
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if most is not None and len(ids) >= most:
            break
    return torch.tensor(ids, dtype=torch.long)


def _begun(windows: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Let windows begin as the tokenizer begins a text, int64 [windows, length]."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a").input_ids[:1] == [bos]:
        windows[:, 0] = bos
    return windows


def _check_length(stream: Tensor, length: int) -> None:
    if len(stream) < length:
        raise DatasetError(
            f"the dataset has {len(stream)} tokens, fewer than one window of {length}; "
            "give more text or a smaller --max-length"
        )


def window_length(config: object, asked: int | None) -> int:
    """Return the window length in tokens: the requested one, if the model has room.

    :param config: of the model; its ``max_position_embeddings`` is the limit
    :param asked: requested length; by default 2048 or, if less, the limit
    :raises ValueError: if the request is out of range, or the limit is not usable
    """
    most = getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
    if not isinstance(most, int) or most < 2:
        raise ValueError(
            f"config.json has max_position_embeddings {most!r}; expected at least 2"
        )
    if asked is None:
        return min(DEFAULT_LENGTH, most)
    if not 2 <= asked <= most:
        raise ValueError(
            f"max_length is {asked}; expected between 2 and {most}, the model's number "
            "of positions"
        )
    return asked
