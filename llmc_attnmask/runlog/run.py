"""One ``oneshot`` as it goes: its modifiers, their layers, time left, warnings."""

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from llmcompressor.modifiers import Modifier
from loguru import logger


class Run:
    """Keeps the clock of a run and collects what it warns of.

    :param modifiers: of the recipe, in order
    """

    def __init__(self, modifiers: Sequence[Modifier]):
        self.modifiers = list(modifiers)
        self.warnings: list[str] = []
        self._ahead: dict[int, int] = {}  # by position: layers it will work on
        self._measured: dict[int, list[float]] = {}  # by position: seconds per layer
        self._mark = time.perf_counter()
        # no removal: llm-compressor's own set-up drops the sinks of earlier runs
        self._sink = logger.add(self._note, level="WARNING", filter=_is_warning)

    def _note(self, message: Any) -> None:
        text = message.record["message"]
        if text not in self.warnings:
            self.warnings.append(text)

    def close(self) -> None:
        """Stop listening to warnings."""
        try:
            logger.remove(self._sink)
        except ValueError:  # whoever set the logger up anew has removed it
            logger.debug("the log was set up anew during the run")

    def __contains__(self, modifier: Modifier) -> bool:
        return any(m is modifier for m in self.modifiers)

    def _position(self, modifier: Modifier) -> int:
        return next(i for i, m in enumerate(self.modifiers) if m is modifier)

    def expect(self, modifier: Modifier, layers: int) -> None:
        """Know how many layers a modifier will work on."""
        self._ahead[self._position(modifier)] = layers

    def start_clock(self) -> None:
        """Begin a pass: what went before is no layer's time."""
        self._mark = time.perf_counter()

    def layer_done(self, modifier: Modifier) -> str:
        """Count the time since the last layer; returns what is left, in words."""
        position = self._position(modifier)
        now = time.perf_counter()
        self._measured.setdefault(position, []).append(now - self._mark)
        self._mark = now
        self._ahead[position] = self._ahead.get(position, 1) - 1
        return self._left(position)

    def layer_restored(self, modifier: Modifier) -> None:
        """A layer that an earlier run has finished takes no time."""
        position = self._position(modifier)
        self._ahead[position] = self._ahead.get(position, 1) - 1
        self._mark = time.perf_counter()

    def _left(self, position: int) -> str:
        seconds, unknown = 0.0, []
        for i, modifier in enumerate(self.modifiers):
            if spent := self._measured.get(i):
                seconds += sum(spent) / len(spent) * max(0, self._ahead.get(i, 0))
            elif i > position:
                unknown.append(type(modifier).__name__)
        left = f"about {duration(seconds)} left" if seconds else ""
        if unknown:
            left += f"{', ' if left else ''}then {' and '.join(unknown)}"
        return left


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


_current: Run | None = None


def run_of(modifier: Modifier, recipe: Sequence[Modifier] = ()) -> Run:
    """The run that a modifier is part of, started if it is the first to ask.

    :param recipe: all modifiers of the run, if it may be new
    """
    global _current
    if _current is None or modifier not in _current:
        if _current is not None:
            _current.close()
        members = list(recipe) if any(m is modifier for m in recipe) else [modifier]
        _current = Run(members)
    return _current


def end_run() -> None:
    """Let go of the run, which holds modifiers and what they hold."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


def described(modifiers: Iterable[Modifier]) -> list[dict[str, Any]]:
    """Names and fields of modifiers, defaults included, as JSON values."""
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
