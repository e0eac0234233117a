"""The entry point, which also decides how the command ends."""

import os
import signal
import sys
import warnings
from typing import Any, NoReturn

from llmc_attnmask.cli import messages
from llmc_attnmask.cli.commands import app


def main() -> None:
    """Run the command.

    The exit code is 0, 1 after an error (with one line on stderr), 2 for wrong usage,
    or 130 after an interrupt.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.formatwarning = _one_line  # type: ignore[assignment]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, _stopped)
    try:
        app()
    except Exception as error:
        if os.environ.get("LLMC_ATTNMASK_TRACEBACK"):
            raise
        messages.failed(error)
        sys.exit(1)


def _stopped(*_: Any) -> NoReturn:
    raise ChildProcessError(
        "stopped by torchrun, because another process has ended or failed"
    )


def _one_line(message: Warning | str, category: type[Warning], *_: Any) -> str:
    return f"{category.__name__}: {message}\n"
