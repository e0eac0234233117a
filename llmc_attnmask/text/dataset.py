"""Read a dataset: a file, a Hub dataset or Python's own documentation.

A document is a text, or a dialog: a list of messages.
"""

import reprlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from llmc_attnmask.checkpoint.io.json_files import parse
from llmc_attnmask.text import pydoc

BUILTIN = "builtin:pydoc"
SELF = "builtin:self"
"""The model's own answers, which ``oneshot/calibration_data.py`` samples."""
_MESSAGES = "messages"  # key of the dialog in a row
_FILE_SUFFIXES = {".jsonl", ".json", ".txt", ".md", ".csv", ".parquet", ".gz"}
Messages = list[dict[str, str]]


class DatasetError(ValueError):
    """A dataset has no usable text; the message says what was expected."""


def load_texts(
    dataset: str | Path, text_column: str = "text", split: pydoc.Split = "calibration"
) -> Iterator[str]:
    """Yield the non-empty documents of a dataset, in order.

    :param dataset: ``builtin:pydoc``, a .jsonl/.json file of objects, a text file (one
        document), or a name on the Hugging Face Hub, whose split ``train``
        (calibration) or ``test`` (evaluation) is read
    :param text_column: key of the text in objects and Hub datasets
    :raises DatasetError: if nothing can be read, or a row has no such column
    """
    for place, row in _rows(dataset, text_column, split):
        if text := _text(place, row, text_column):
            yield text


def load_documents(
    dataset: str | Path, text_column: str = "text"
) -> tuple[Iterator[str] | Iterator[Messages], bool]:
    """Return the documents of a dataset for calibration: all texts, or all dialogs.

    They are dialogs if the first row has ``messages`` instead of a text.

    :param dataset: as for ``load_texts``
    :return: the documents, and whether they are dialogs
    :raises DatasetError: as ``load_texts``, or if a row has no well-formed messages
    """
    rows = _rows(dataset, text_column, "calibration")
    first = next(rows, None)
    if first is None:
        return iter(()), False
    rows = chain([first], rows)
    row = first[1]
    if isinstance(row, dict) and _MESSAGES in row and text_column not in row:
        return (_messages(place, row) for place, row in rows), True
    texts = (_text(place, row, text_column) for place, row in rows)
    return filter(None, texts), False


def _rows(
    dataset: str | Path, text_column: str, split: pydoc.Split
) -> Iterator[tuple[str, object]]:
    """Yield each row with its place; whole texts become rows of one column."""
    if str(dataset) == SELF:
        raise DatasetError(
            f"{SELF} is sampled from the model that is pruned, so it is calibration "
            "data of `llmc-attnmask prune` and nothing else; name a text"
        )
    if str(dataset) == BUILTIN:
        for text in pydoc.documents(split):
            yield BUILTIN, {text_column: text}
    elif Path(dataset).is_file():
        yield from _from_file(Path(dataset), text_column)
    elif _looks_like_path(str(dataset)):
        raise DatasetError(f"dataset {dataset} does not exist")
    else:
        yield from _from_hub(str(dataset), split)


def _from_file(path: Path, text_column: str) -> Iterator[tuple[str, object]]:
    try:
        if path.suffix in (".jsonl", ".json"):
            with path.open(encoding="utf-8") as lines:
                yield from _parsed(path, lines)
        else:
            yield str(path), {text_column: path.read_text(encoding="utf-8")}
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
                f"{path}:{number} is not JSON ({error}); expected one object per line"
            ) from None
        yield f"{path}:{number}", row


def _from_hub(name: str, split: pydoc.Split) -> Iterator[tuple[str, object]]:
    import datasets

    hub_split = "train" if split == "calibration" else "test"
    try:
        rows = datasets.load_dataset(name, split=hub_split, streaming=True)
    except Exception as error:  # of any kind: the network or the format may fail
        raise DatasetError(
            f"dataset {name!r} is neither a file nor readable from the Hugging Face "
            f"Hub (split {hub_split}): {type(error).__name__}: {error}"
        ) from error
    yield from ((f"{name}[{n}]", row) for n, row in enumerate(rows))


def _text(place: str, row: object, text_column: str) -> str:
    """Return a row's text, or an empty one if there are only spaces in it."""
    if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
        found = type(row).__name__
        if isinstance(row, dict):
            found = reprlib.repr(sorted(row))
        raise DatasetError(
            f"{place} has no text in column {text_column!r} (found: {found}); "
            "name the column with --text-column"
        )
    text = row[text_column]
    return _encodable(place, text) if text.strip() else ""


def _messages(place: str, row: object) -> Messages:
    found: Any = row.get(_MESSAGES) if isinstance(row, dict) else None
    wellformed = isinstance(found, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in found
    )
    if not found or not wellformed:
        raise DatasetError(
            f"{place} has no {_MESSAGES} that are a list of objects with a role and a "
            f"content, both text (found: {reprlib.repr(found)}); a dataset has either "
            "only dialogs or only texts"
        )
    return [
        {key: _encodable(place, message[key]) for key in ("role", "content")}
        for message in found
    ]


def _encodable(place: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can express
        raise DatasetError(f"{place} is not valid Unicode text: {error}") from None
    return text


def _looks_like_path(dataset: str) -> bool:
    # names on the Hub may contain a dot, too: teknium/OpenHermes-2.5
    return dataset.startswith((".", "/", "~")) or Path(dataset).suffix in _FILE_SUFFIXES
