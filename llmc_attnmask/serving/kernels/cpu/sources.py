"""Tell whether the compiled library belongs to the sources beside it.

It imports nothing of the package, because the build uses it, too.
"""

import hashlib
from pathlib import Path


def fingerprint(folder: Path) -> str:
    """Return a hash of the C++ sources in a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.?pp")):
        content = file.read_bytes()
        found.update(f"{file.name} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()
