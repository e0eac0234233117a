"""Read the texts of a dataset: a file, a Hub dataset or Python's own documentation."""

import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmc_attnmask.checkpoint.io.json_files import parse
from llmc_attnmask.text import pydoc

BUILTIN = "builtin:pydoc"
_FILE_SUFFIXES = {".jsonl", ".json", ".txt", ".md", ".csv", ".parquet", ".gz"}


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
    if str(dataset) == BUILTIN:
        yield from pydoc.documents(split)
    elif Path(dataset).is_file():
        yield from _from_file(Path(dataset), text_column)
    elif _looks_like_path(str(dataset)):
        raise DatasetError(f"dataset {dataset} does not exist")
    else:
        yield from _from_hub(str(dataset), text_column, split)


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
                f"{path}:{number} is not JSON ({error}); expected one object per line"
            ) from None
        yield f"{path}:{number}", row


def _from_hub(name: str, text_column: str, split: pydoc.Split) -> Iterator[str]:
    import datasets

    hub_split = "train" if split == "calibration" else "test"
    try:
        rows = datasets.load_dataset(name, split=hub_split, streaming=True)
    except Exception as error:  # of any kind: the network or the format may fail
        raise DatasetError(
            f"dataset {name!r} is neither a file nor readable from the Hugging Face "
            f"Hub (split {hub_split}): {type(error).__name__}: {error}"
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
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can express
        raise DatasetError(f"{place} is not valid Unicode text: {error}") from None
    return text


def _looks_like_path(dataset: str) -> bool:
    # names on the Hub may contain a dot, too: teknium/OpenHermes-2.5
    return dataset.startswith((".", "/", "~")) or Path(dataset).suffix in _FILE_SUFFIXES
