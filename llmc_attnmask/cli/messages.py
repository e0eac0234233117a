"""Say on stderr why a run ends early: one line, from one process."""

import sys

from rich.console import Console

from llmc_attnmask.cli.tables import plain

_err = Console(stderr=True)


def interrupted(interrupt: KeyboardInterrupt) -> None:
    """Say that the user has stopped the run, and what is kept."""
    if _reports():
        _err.print(plain("interrupted" + _notes(interrupt)), soft_wrap=True)


def failed(error: Exception) -> None:
    """Say what went wrong and, for an unexpected error, how to see where."""
    expected = isinstance(error, OSError | ValueError | ImportError)
    kind = "" if expected else f"{type(error).__name__}: "
    hint = "" if expected else " (LLMC_ATTNMASK_TRACEBACK=1 shows where)"
    message = plain(f"{kind}{error}{hint}{_notes(error)}")
    if _reports():
        _err.print(f"[red]error:[/red] {message}", soft_wrap=True, highlight=False)


def _reports() -> bool:
    """Return whether this process reports; of several, only the first to fail does."""
    distributed = sys.modules.get("llmc_attnmask.distributed")
    return distributed is None or distributed.first_to_report()


def _notes(error: BaseException) -> str:
    return "".join(f"; {note}" for note in getattr(error, "__notes__", []))
