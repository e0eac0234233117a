"""Run tasks of lm-evaluation-harness on checkpoints and compare with a dense reference.

The extra ``eval`` installs the harness. Tasks are named as on its own command line.
With HF_HUB_OFFLINE set, their data must be available locally.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from llmc_attnmask.checkpoint.source import read_tokenizer
from llmc_attnmask.evaluation.perplexity import load_model
from llmc_attnmask.text.windows import window_length

_BATCH_SIZE = 8


@dataclass(frozen=True)
class TaskResult:
    """One checkpoint's value of one metric of one task."""

    model: str
    task: str
    metric: str  # followed by the harness's filter, if any: "exact_match,strict"
    value: float
    stderr: float | None  # standard error of the value
    samples: int | None  # None for groups of tasks
    higher_is_better: bool
    recovery: float | None  # percent of the reference's quality; None without one


def evaluate_tasks(
    models: Sequence[str | Path],
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    reference: str | Path | None = None,
) -> list[TaskResult]:
    """Run tasks on checkpoints, in float32.

    Recovery is the value divided by the reference's value, in percent, or the inverse
    for metrics of which lower is better.

    :param models: local folders or Hub names; packed ones are unpacked as they load
    :param tasks: names of tasks, groups or tags; ``*`` and ``?`` match many
    :param include_path: folder of further tasks, in YAML. Functions that they name are
        run, so trust them as you would trust code
    :param reference: the dense model, which runs first
    :raises ImportError: without lm-evaluation-harness
    :raises ValueError: for tasks that do not exist or whose data cannot be read
    """
    manager, names = _ready(tasks, include_path)
    found: list[TaskResult] = []
    for model in dict.fromkeys([*([reference] if reference else []), *models]):
        found += _results(str(model), _run(model, names, manager), found, reference)
    return found


def _ready(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """Return the harness's task manager and the names of the tasks, loaded once."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"tasks are run by lm-evaluation-harness, which is missing ({error}); "
            'pip install "llmc-attnmask[eval]"'
        ) from None
    if include_path is None:
        manager = TaskManager()
        return manager, _matched(manager, tasks)
    if not Path(include_path).is_dir():
        raise ValueError(f"{include_path} is not a folder of tasks")
    # unless told not to, the harness first reads its own 14,000 files
    manager = TaskManager(include_path=str(include_path), include_defaults=False)
    try:
        return manager, _matched(manager, tasks)
    except ValueError:
        manager = TaskManager(include_path=str(include_path))
        return manager, _matched(manager, tasks)


def _matched(manager: Any, tasks: Sequence[str]) -> list[str]:
    names: list[str] = []
    for task in tasks:
        matched = manager.match_tasks([task])
        if not matched:
            raise ValueError(
                f"there is no task {task!r}: lm-evaluation-harness has "
                f"{len(manager.all_tasks)}, listed by `lm_eval ls tasks`; give the "
                "folder of your own tasks with --include-path"
            )
        names += [name for name in matched if name not in names]
    for name in names:
        try:
            with _quiet():
                manager.load([name])
        except Exception as error:  # of any kind, because tasks are other people's code
            raise ValueError(
                f"task {name} cannot be loaded: {type(error).__name__}: {error}; "
                "offline, its data must be in a local file or in the cache of datasets"
            ) from error
    return names


def _run(model: str | Path, tasks: list[str], manager: Any) -> dict[str, Any]:
    """Return the harness's own results."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    loaded = load_model(model)
    with _quiet():
        return lm_eval.simple_evaluate(
            HFLM(
                pretrained=loaded,
                tokenizer=read_tokenizer(model),
                max_length=window_length(loaded.config, None),
                batch_size=_BATCH_SIZE,
            ),
            tasks=tasks,
            task_manager=manager,
            log_samples=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's warnings about intended things: default metrics of tasks,
    and models passed to it as objects."""
    harness = logging.getLogger("lm_eval")
    level = harness.level
    harness.setLevel(logging.ERROR)
    try:
        yield
    finally:
        harness.setLevel(level)


def _results(
    model: str,
    output: dict[str, Any],
    earlier: list[TaskResult],
    reference: str | Path | None,
) -> list[TaskResult]:
    dense = {(r.task, r.metric): r.value for r in earlier if r.model == str(reference)}
    found = []
    for task, metrics in output["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, float | int) or not kind or "_stderr" in metric:
                continue
            if not math.isfinite(value):  # JSON cannot express it
                logger.warning(f"{model}: {key} of {task} is {value} and is left out")
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            higher = output["higher_is_better"].get(task, {}).get(metric) is not False
            shown = metric if kind == "none" else key
            found.append(
                TaskResult(
                    model=model,
                    task=task,
                    metric=shown,
                    value=float(value),
                    stderr=stderr
                    if isinstance(stderr, float) and math.isfinite(stderr)
                    else None,
                    samples=output["n-samples"].get(task, {}).get("effective"),
                    higher_is_better=higher,
                    recovery=_recovery(float(value), dense.get((task, shown)), higher),
                )
            )
    return found


def _recovery(value: float, dense: float | None, higher: bool) -> float | None:
    if dense is None:
        return None
    part, whole = (value, dense) if higher else (dense, value)
    return 100 * part / whole if whole else None
