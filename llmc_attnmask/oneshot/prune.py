"""Run a recipe with ``oneshot``, after checking everything, and save the result."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmc_attnmask.calibration.samples import Offload
from llmc_attnmask.checkpoint.config import Storage
from llmc_attnmask.checkpoint.io.atomic import PROGRESS, check_new, new_folder
from llmc_attnmask.checkpoint.source import read_config, read_tokenizer
from llmc_attnmask.distributed import (
    barrier,
    is_source,
    process_group,
    world_size,
)
from llmc_attnmask.modifiers.base import recipe_storage
from llmc_attnmask.oneshot.calibration_data import CalibrationData, Dataset
from llmc_attnmask.oneshot.compress import compress, set_defaults
from llmc_attnmask.oneshot.fingerprint import fingerprint
from llmc_attnmask.oneshot.loading import loaded
from llmc_attnmask.oneshot.plan import PLAN_SAMPLES, budget_of, check_one_process, plan
from llmc_attnmask.oneshot.planned_recipe import check_plan, plan_of
from llmc_attnmask.oneshot.recipe import find_recipe, load_recipe
from llmc_attnmask.oneshot.trade_off import Budget
from llmc_attnmask.runlog.context import described
from llmc_attnmask.runlog.journal import run_metadata
from llmc_attnmask.runlog.progress import Progress, ProgressError, is_begun
from llmc_attnmask.text.windows import window_length
from llmc_attnmask.upstream.pipeline import resumable
from llmc_attnmask.upstream.save import save_as


@process_group()
def prune(
    model: str | Path,
    recipe: str | Path,
    output: str | Path,
    dataset: Dataset | None = None,
    *,
    text_column: str = "text",
    num_samples: int = 128,
    max_length: int | None = None,
    dense_share: float | None = None,
    sparsity: float | None = None,
    size: float | None = None,
    loss: float | None = None,
    seed: int = 0,
    storage: Storage | None = None,
    offload_activations: Offload | None = None,
    offload_model: Offload = "cpu",
    resume: bool = False,
) -> Path:
    """Apply a recipe to a model and write the checkpoint.

    Processes started by torchrun share the calibration windows; each returns when the
    checkpoint is complete.

    Finished layers are kept in the output folder until the checkpoint is complete.
    ``config.json`` is written last: a folder without it is not a complete checkpoint.

    :param model: local folder or Hub name
    :param recipe: YAML file, or the name of a recipe that the package ships; any
        llm-compressor recipe, with or without this package's modifiers
    :param output: folder to create; must not exist or must be empty
    :param dataset: calibration data, one or several that share the windows evenly:
        ``builtin:self`` (the model's own answers to prompts that the package ships,
        sampled with the seed), ``builtin:pydoc``, a .jsonl/.json file of objects with
        a text or with ``messages``, a text file, or a name on the Hub. By default
        ``builtin:self`` and ``builtin:pydoc``, or the latter alone if the model has no
        chat template
    :param text_column: key of the text in the rows of the datasets
    :param num_samples: calibration windows, at equal spacing over each dataset
    :param max_length: tokens per window; by default 2048 or, if less, the model's
        number of positions
    :param dense_share: with this or another budget, the recipe is first planned, as by
        ``plan``, on at most 32 windows
    :param sparsity: budget, as for ``plan``
    :param size: budget, as for ``plan``
    :param loss: budget, as for ``plan``
    :param seed: of torch's generator, and of every modifier whose recipe sets none
    :param storage: of the 2:4 layers; by default what the recipe's modifiers ask for,
        or dense
    :param offload_activations: of every modifier that has this field and whose recipe
        does not set it
    :param offload_model: where weights are kept until used: in memory, or in the
        checkpoint's files and, once they have changed, in TMPDIR or /var/tmp
    :param resume: continue an interrupted run with the same arguments, if the output
        folder holds one; the result is the same to the byte
    :return: the output folder
    :raises FileExistsError: if the output folder exists and is not empty
    :raises ProgressError: if it holds the progress of another run
    :raises ValueError: for bad input, before anything is written; ``RecipeError`` and
        ``DatasetError`` are such errors
    """
    output = Path(output)
    check_new(output, resume)
    _check_arguments(num_samples, seed, offload_model)
    budget = budget_of(dense_share=dense_share, sparsity=sparsity, size=size, loss=loss)
    if budget is not None:
        check_one_process()
        if offload_model != "cpu":
            raise ValueError(
                f"offload_model is {offload_model!r}, but a plan keeps the model in "
                'memory; leave it at "cpu", or prune with a plan from a larger machine'
            )
    recipe = template = find_recipe(recipe)
    storage = storage or recipe_storage(load_recipe(template).modifiers)
    tokenizer = read_tokenizer(model)
    config = read_config(model)
    length = window_length(config, max_length)
    data = CalibrationData(dataset, tokenizer, text_column, num_samples, length, seed)

    folder = output / PROGRESS
    known_by = fingerprint(model, config, template, data.identity, seed)
    planned = _plan_in(folder, known_by, budget)
    if planned is not None:
        recipe = planned
        if not planned.exists():
            with _emptied(folder):
                plan(
                    model,
                    template,
                    planned,
                    dataset,
                    dense_share=dense_share,
                    sparsity=sparsity,
                    size=size,
                    loss=loss,
                    text_column=text_column,
                    num_samples=min(num_samples, PLAN_SAMPLES),
                    max_length=max_length,
                    seed=seed,
                    offload_activations=offload_activations or "cpu",
                    resume=resume,
                )
        known_by = fingerprint(model, config, planned, data.identity, seed)
    modifiers = load_recipe(recipe).modifiers
    set_defaults(modifiers, seed, offload_activations)
    progress = Progress(folder, known_by, modifiers)

    with (
        _kept(progress, planned, resume),
        loaded(model, config, offload_model) as in_work,
    ):
        check_plan(recipe, in_work)
        windows = data.windows(in_work, progress)
        torch.manual_seed(seed)
        run_metadata(in_work).update(
            modifiers=described(modifiers),
            plan=plan_of(recipe),
            options={
                "dataset": ", ".join(data.datasets),
                "text_column": text_column,
                "num_samples": len(windows),
                "max_length": length,
                "seed": seed,
                "storage": storage,
            },
        )
        with resumable(progress):
            compress(in_work, tokenizer, modifiers, windows)
        return save(in_work, tokenizer, output, storage)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    storage: Storage = "dense",
) -> Path:
    """Write a checkpoint next to its destination, then rename it into place.

    One rank writes; all return when the checkpoint is complete.
    """
    save_as(model, storage)
    if is_source():
        with new_folder(output) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    else:
        model.save_pretrained(output)  # takes part in gathering but writes nothing
    barrier()
    return output


def _check_arguments(num_samples: int, seed: int, offload_model: Offload) -> None:
    if offload_model != "cpu" and world_size() > 1:
        raise ValueError(
            f"offload_model is {offload_model!r} in {world_size()} processes, which "
            'keep the model once, in memory that they share; leave it at "cpu"'
        )
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected at least 1")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed is {seed}; expected at least 0 and less than 2^63")


def _plan_in(
    folder: Path, known_by: dict[str, str], budget: Budget | None
) -> Path | None:
    """Return where the plan of a run is kept within its progress.

    :return: None without a budget
    :raises ProgressError: if there is one of another run or for another budget, or if
        the run in progress has none
    """
    digest = hashlib.sha256(repr(sorted(known_by.items())).encode()).hexdigest()[:8]
    planned = folder / f"plan-{digest}.yaml"
    for found in folder.glob("plan-*.yaml"):
        what = (plan_of(found) or {}).get("budget")
        if budget is None or found != planned or what != str(budget):
            raise ProgressError(
                f"{folder} holds a plan of another run, for {what}; repeat that run's "
                "command to resume it, or remove the folder to start over"
            )
    if budget is None:
        return None
    if not planned.exists() and is_begun(folder):
        raise ProgressError(
            f"{folder} holds the progress of another run, which has no plan for "
            f"{budget}; repeat that run's command to resume it, or remove the folder "
            "to start over"
        )
    return planned


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """Create a folder and its parent; after an error, remove what is new and empty."""
    new = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in new:
            if not any(path.iterdir()):
                path.rmdir()
        raise


@contextmanager
def _kept(progress: Progress, planned: Path | None, resume: bool) -> Iterator[None]:
    """Add a note to an error if finished work is kept; close the progress.

    After bad input, what this run has kept is removed, unless a layer is finished.

    :param planned: the plan that is executed, if the run has made one
    """
    try:
        yield
    except BaseException as error:
        if not progress.layers and isinstance(error, ValueError):
            progress.discard()
            if planned is not None and not resume:
                shutil.rmtree(progress.folder, ignore_errors=True)
        elif progress.layers or progress.has_data or planned is not None:
            kept = "the sampled dialogs" if progress.has_data else "the plan"
            error.add_note(
                f"{f'{progress.layers} finished layers' if progress.layers else kept} "
                f"are kept in {progress.folder}: the same command with --resume "
                "continues from there"
            )
        raise
    finally:
        progress.close()
