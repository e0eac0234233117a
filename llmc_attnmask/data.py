"""Text in, windows of tokens out: calibration and evaluation read the same way.

The texts are tokenized into one stream, ``[bos] + tokens`` per document (no bos where
the tokenizer has none), documents joined in order. Calibration takes windows at equal
spacing, evaluation every non-overlapping window.
"""

import reprlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmc_attnmask.builtin import pydoc
from llmc_attnmask.checkpoint.json_files import parse

BUILTIN = "builtin:pydoc"
# Calibration looks at no more text than this many times what it takes.
_STREAM_TO_SAMPLE = 64
_FILE_SUFFIXES = {".jsonl", ".json", ".txt", ".md", ".csv", ".parquet", ".gz"}


class DatasetError(ValueError):
    """A dataset holds no usable text; the message says what was looked for."""


def load_texts(
    dataset: str | Path, text_column: str = "text", split: pydoc.Split = "calibration"
) -> Iterator[str]:
    """The non-empty documents of a dataset, in order.

    :param dataset: ``builtin:pydoc``, a .jsonl/.json file of objects, a text file (one
        document), or a name on the Hugging Face hub, whose split ``train``
        (calibration) or ``test`` (evaluation) is read
    :param text_column: key of the text in objects and hub datasets
    :raises DatasetError: if nothing can be read, or a row has no such column
    """
    if str(dataset) == BUILTIN:
        yield from pydoc.documents(split)
    elif Path(dataset).is_file():
        yield from _from_file(Path(dataset), text_column)
    elif _looks_like_path(str(dataset)):
        raise DatasetError(f"dataset {dataset} does not exist")
    else:
        yield from _from_hub(str(dataset), text_column, split)


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


def _from_file(path: Path, text_column: str) -> Iterator[str]:
    try:
        if path.suffix in (".jsonl", ".json"):
            with path.open(encoding="utf-8") as lines:
                yield from _texts(_parsed(path, lines), text_column)
        elif (text := path.read_text(encoding="utf-8")).strip():
            yield text
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text: {error}") from None


def _parsed(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse(line)
        except ValueError as error:
            raise DatasetError(
                f"{path}:{number} is not JSON ({error}); expected one object a line"
            ) from None
        yield f"{path}:{number}", row


def _from_hub(name: str, text_column: str, split: pydoc.Split) -> Iterator[str]:
    import datasets

    hub_split = "train" if split == "calibration" else "test"
    try:
        rows = datasets.load_dataset(name, split=hub_split, streaming=True)
    except Exception as error:  # every kind of network and format failure ends here
        raise DatasetError(
            f"dataset {name!r} is neither a file nor readable from the Hugging Face "
            f"hub (split {hub_split}): {type(error).__name__}: {error}"
        ) from error
    yield from _texts(
        ((f"{name}[{n}]", row) for n, row in enumerate(rows)), text_column
    )


def _texts(rows: Iterable[tuple[str, object]], text_column: str) -> Iterator[str]:
    for place, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
            found = type(row).__name__
            if isinstance(row, dict):
                found = reprlib.repr(sorted(row))
            raise DatasetError(
                f"{place} has no text in column {text_column!r} (found: {found}); "
                "name the column with --text-column"
            )
        if row[text_column].strip():
            yield _encodable(place, row[text_column])


def _encodable(place: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
        raise DatasetError(f"{place} is no valid Unicode text: {error}") from None
    return text


def _looks_like_path(dataset: str) -> bool:
    # a name on the hub may have a dot too: teknium/OpenHermes-2.5
    return dataset.startswith((".", "/", "~")) or Path(dataset).suffix in _FILE_SUFFIXES
