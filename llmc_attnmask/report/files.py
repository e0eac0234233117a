"""Write report.json, report.html and README.md into a checkpoint's folder."""

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from loguru import logger
from transformers import PreTrainedModel

from llmc_attnmask.checkpoint.io.atomic import new_file
from llmc_attnmask.evaluation.perplexity import Evaluation
from llmc_attnmask.evaluation.tasks import TaskResult
from llmc_attnmask.report import card, page
from llmc_attnmask.report.mark import CARD, PAGE, REPORT, is_ours
from llmc_attnmask.report.numbers import VERSION, Report, of_folder, of_model, reduced

_KEPT = "README.previous"


class ReportError(ValueError):
    """A report.json cannot be read; the message says why."""


def save_hook(model: PreTrainedModel) -> Callable[[Path, Path], None]:
    """Collect a model's numbers; return a function that writes the report and the card.

    The function takes the folder to write into and the folder that it will replace.

    A checkpoint never fails to be saved because of its report: if the report cannot be
    made, a warning says so, and the checkpoint is saved without it.
    """
    try:
        numbers = of_model(model)
    except Exception as error:
        _warn(error)
        return lambda *_: None

    def write(folder: Path, destination: Path) -> None:
        try:
            report = numbers | of_folder(folder)
            keep_card(destination, folder)
            _write(report, folder)
        except Exception as error:
            for name in (REPORT, PAGE, CARD):
                (folder / name).unlink(missing_ok=True)
            _warn(error)

    return write


def _warn(error: Exception) -> None:
    logger.warning(
        f"the checkpoint is saved without a report and model card: {error!r}"
    )


def render(directory: str | Path) -> Report:
    """Write report.html again, from report.json and the checkpoint as it is now.

    The model card is written again, too, if this package wrote it. Without report.json,
    the report contains only what the checkpoint's files show.

    :return: content of report.json
    :raises FileNotFoundError, ValueError: if the folder is not a checkpoint, or its
        report.json cannot be read
    :raises OSError: if the folder cannot be written to
    """
    directory = Path(directory)
    report = read(directory) | of_folder(directory)
    if (directory / REPORT).is_file():
        _put_json(report, directory)
    _put(directory / PAGE, page.render(report))
    existing = directory / CARD
    if existing.is_file() and is_ours(existing.read_text(encoding="utf-8")):
        _put(existing, card.render(report, directory))
    return report


def add_evaluation(
    directory: str | Path,
    perplexity: Sequence[Evaluation] = (),
    tasks: Sequence[TaskResult] = (),
) -> None:
    """Add measurements to the report, its page and the model card.

    Kinds of measurements that are not given stay as they were.

    :param perplexity: the reference first, if there is one
    :param tasks: the reference's first, if there is one
    """
    directory = Path(directory)
    report = read(directory) | of_folder(directory)
    if perplexity:
        report["evaluation"] = [asdict(evaluation) for evaluation in perplexity]
    if tasks:
        report["tasks"] = [asdict(result) for result in tasks]
    keep_card(directory, directory)
    _write(report, directory)


def read(directory: Path) -> Report:
    """Read a checkpoint's report.json, or make a reduced report if there is none.

    :raises ReportError: if it is not JSON, or has another version
    """
    path = directory / REPORT
    if not path.is_file():
        return reduced()
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}; remove it") from None
    if not isinstance(report, dict) or report.get("version") != VERSION:
        raise ReportError(
            f"{path} is not a report of version {VERSION}: another version of "
            "llmc-attnmask may have written it; remove it to report from the "
            "checkpoint's files alone"
        )
    return report


def keep_card(destination: Path, folder: Path) -> None:
    """Copy a model card that others wrote or edited, so that it is not overwritten."""
    existing = destination / CARD
    if not existing.is_file() or is_ours(existing.read_text(encoding="utf-8")):
        return
    names = itertools.chain([_KEPT], (f"{_KEPT}-{i}" for i in itertools.count(2)))
    name = next(f"{n}.md" for n in names if not (destination / f"{n}.md").exists())
    shutil.copy(existing, folder / name)
    logger.info(f"the existing model card is kept as {name}")


def _write(report: Report, folder: Path) -> None:
    _put_json(report, folder)
    _put(folder / PAGE, page.render(report))
    _put(folder / CARD, card.render(report, folder))


def _put_json(report: Report, folder: Path) -> None:
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    _put(folder / REPORT, text + "\n")


def _put(path: Path, text: str) -> None:
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
