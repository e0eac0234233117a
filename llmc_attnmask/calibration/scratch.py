"""The folder for large temporary files."""

import os
import tempfile
from pathlib import Path


def scratch() -> Path:
    """Return ``TMPDIR``, or ``/var/tmp``, as ``/tmp`` is in memory on many systems."""
    folders = (os.environ.get("TMPDIR"), "/var/tmp", tempfile.gettempdir())
    usable = [f for f in folders if f and os.access(f, os.W_OK | os.X_OK)]
    return Path(usable[0] if usable else tempfile.gettempdir())
