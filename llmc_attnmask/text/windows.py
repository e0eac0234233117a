"""Text in, windows of tokens out: calibration and evaluation read the same way.

The texts are tokenized into one stream, ``[bos] + tokens`` per document (no bos where
the tokenizer has none), documents joined in order. Calibration takes windows at equal
spacing, evaluation every non-overlapping window.
"""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmc_attnmask.text.dataset import DatasetError

DEFAULT_LENGTH = 2048  # tokens
# Calibration looks at no more text than this many times what it takes.
_STREAM_TO_SAMPLE = 64


def calibration_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, count: int, length: int
) -> Tensor:
    """``count`` windows at equal spacing over the token stream.

    :return: int64 [count, length]
    :raises DatasetError: if the texts are empty, shorter than one window, or have not
        so many different ones
    """
    stream = token_stream(texts, tokenizer, most=count * length * _STREAM_TO_SAMPLE)
    _check_length(stream, length)
    if count > len(stream) - length + 1:
        raise DatasetError(
            f"{len(stream)} tokens of text have no {count} different windows of "
            f"{length}; give more text or ask for fewer"
        )
    if len(stream) < count * length:
        warnings.warn(
            f"{len(stream)} tokens of text for {count} windows of {length}: they "
            "overlap; give more text or ask for fewer",
            stacklevel=2,
        )
    starts = torch.linspace(0, len(stream) - length, count).long()
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


def evaluation_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> Tensor:
    """All non-overlapping windows of the token stream; a shorter rest is left out.

    :return: int64 [windows, length]
    :raises DatasetError: if the texts are empty or shorter than one window
    """
    stream = token_stream(texts, tokenizer)
    _check_length(stream, length)
    return stream[: len(stream) // length * length].view(-1, length)


def token_stream(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, most: int | None = None
) -> Tensor:
    """int64 [tokens]: ``[bos] + tokens`` of each text, joined, up to ``most`` or so."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids: list[int] = []
    for text in texts:
        ids.extend(bos)
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if most is not None and len(ids) >= most:
            break
    return torch.tensor(ids, dtype=torch.long)


def _check_length(stream: Tensor, length: int) -> None:
    if len(stream) < length:
        raise DatasetError(
            f"the dataset has {len(stream)} tokens, fewer than one window of {length}; "
            "give more text or a shorter --max-length"
        )


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
