"""The running run of a recipe: its modifiers, time left, warnings and progress.

There is at most one at a time. ``recorded_run`` starts a run that is recorded on disk;
any other run starts when the first of its modifiers asks for it.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llmcompressor.modifiers import Modifier
from loguru import logger

from llmc_attnmask.runlog.progress import Progress
from llmc_attnmask.runlog.wording import duration


class RunContext:
    """Keeps the clock of a run and collects its warnings.

    :param modifiers: the recipe's, in order
    :param progress: the run's progress on disk; None if the run is not recorded
    """

    def __init__(self, modifiers: Sequence[Modifier], progress: Progress | None = None):
        self.modifiers = list(modifiers)
        self.progress = progress
        self.warnings: list[str] = []
        self._remaining: dict[int, int] = {}  # by position: layers to work on
        self._measured: dict[int, list[float]] = {}  # by position: seconds per layer
        self._mark = time.perf_counter()
        self._sink: int | None = None

    def listen(self) -> None:
        """Collect warnings from now on; further calls have no effect.

        Call it after llm-compressor has set up its log, which removes earlier sinks.
        """
        if self._sink is None:
            self._sink = logger.add(self._collect, level="WARNING", filter=_is_warning)

    def _collect(self, message: Any) -> None:
        text = message.record["message"]
        if text not in self.warnings:
            self.warnings.append(text)

    def close(self) -> None:
        """Stop collecting warnings."""
        if self._sink is None:
            return
        try:
            logger.remove(self._sink)
        except ValueError:  # the logger has been configured again
            logger.debug("the log was configured again during the run")
        self._sink = None

    def __contains__(self, modifier: Modifier) -> bool:
        return any(m is modifier for m in self.modifiers)

    def _position(self, modifier: Modifier) -> int:
        return next(i for i, m in enumerate(self.modifiers) if m is modifier)

    def expect(self, modifier: Modifier, layers: int) -> None:
        """Set the number of layers that a modifier will work on."""
        self._remaining[self._position(modifier)] = layers

    def start_clock(self) -> None:
        """Begin a pass: the time before it belongs to no layer."""
        self._mark = time.perf_counter()

    def layer_done(self, modifier: Modifier) -> str:
        """Count the time since the last layer.

        :return: the time left, in words
        """
        position = self._position(modifier)
        now = time.perf_counter()
        self._measured.setdefault(position, []).append(now - self._mark)
        self._mark = now
        self._remaining[position] = self._remaining.get(position, 1) - 1
        return self._left(position)

    def layer_restored(self, modifier: Modifier) -> None:
        """Count a layer that an earlier run finished; it takes no time."""
        position = self._position(modifier)
        self._remaining[position] = self._remaining.get(position, 1) - 1
        self._mark = time.perf_counter()

    def _left(self, position: int) -> str:
        seconds, unknown = 0.0, []
        for i, modifier in enumerate(self.modifiers):
            if spent := self._measured.get(i):
                seconds += sum(spent) / len(spent) * max(0, self._remaining.get(i, 0))
            elif i > position:
                unknown.append(type(modifier).__name__)
        left = f"about {duration(seconds)} left" if seconds else ""
        if unknown:
            left += f"{', ' if left else ''}then {' and '.join(unknown)}"
        return left


_current: ContextVar[RunContext | None] = ContextVar("run", default=None)


def run_of(modifier: Modifier, recipe: Sequence[Modifier] = ()) -> RunContext:
    """Return the run that a modifier is part of; if there is none, it begins here.

    :param recipe: all modifiers of the run, in case it begins here
    """
    run = _current.get()
    if run is None or modifier not in run:
        end_run()
        members = list(recipe) if any(m is modifier for m in recipe) else [modifier]
        run = RunContext(members)
        _current.set(run)
    run.listen()
    return run


def progress_of(modifier: Modifier) -> Progress | None:
    """Return the progress of a modifier's run; None if it is not recorded."""
    run = _current.get()
    return run.progress if run is not None and modifier in run else None


@contextmanager
def recorded_run(progress: Progress) -> Iterator[RunContext]:
    """Start a run whose finished layers are written to disk and read from there."""
    end_run()
    run = RunContext(progress.modifiers, progress)
    _current.set(run)
    try:
        yield run
    finally:
        end_run()


def end_run() -> None:
    """Release the run, and with it the modifiers and what they hold."""
    run = _current.get()
    if run is not None:
        run.close()
        _current.set(None)


def described(modifiers: Iterable[Modifier]) -> list[dict[str, Any]]:
    """Return the names and fields of modifiers, defaults included, as JSON values."""
    found = []
    for modifier in modifiers:
        own = type(modifier).model_fields.keys() - Modifier.model_fields.keys()
        fields = {
            name: value
            for name in sorted(own)
            if not name.endswith("_") and (value := getattr(modifier, name)) is not None
        }
        found.append(
            {
                "name": type(modifier).__name__,
                "fields": json.loads(json.dumps(fields, default=str)),
            }
        )
    return found


def _is_warning(record: Any) -> bool:
    return record["level"].name in ("WARNING", "ERROR")
