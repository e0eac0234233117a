"""What is said on stderr when a run ends early: one line, by one process."""

import sys

from rich.console import Console

from llmc_attnmask.cli.tables import plain

_err = Console(stderr=True)


def interrupted(interrupt: KeyboardInterrupt) -> None:
    """Say that the user has stopped the run, and what is kept."""
    if _reports():
        _err.print(plain("interrupted" + _notes(interrupt)), soft_wrap=True)


def failed(error: Exception) -> None:
    """Say what went wrong; of an unexpected error, also how to see where."""
    expected = isinstance(error, OSError | ValueError | ImportError)
    kind = "" if expected else f"{type(error).__name__}: "
    hint = "" if expected else " (LLMC_ATTNMASK_TRACEBACK=1 shows where)"
    message = plain(f"{kind}{error}{hint}{_notes(error)}")
    if _reports():
        _err.print(f"[red]error:[/red] {message}", soft_wrap=True, highlight=False)


def _reports() -> bool:
    """Whether this process says how the run ends: of several, the first that fails."""
    distributed = sys.modules.get("llmc_attnmask.distributed")
    return distributed is None or distributed.first_to_report()


def _notes(error: BaseException) -> str:
    return "".join(f"; {note}" for note in getattr(error, "__notes__", []))
