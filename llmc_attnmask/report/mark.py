"""Names of the files about a checkpoint, and how this package's cards are recognized.

This module imports nothing heavy, because every conversion of a checkpoint needs it.
"""

import hashlib
import re

REPORT, PAGE, CARD = "report.json", "report.html", "README.md"

# the digest of the rest of a card shows whether the card has been edited since
_MARK = "<!-- written by llmc-attnmask, {} -->"
_FOUND = re.compile(_MARK.format("([0-9a-f]{16})"))
UNSIGNED = _MARK.format("0" * 16)  # placeholder in a card that is not signed yet


def signed(text: str) -> str:
    """Replace ``UNSIGNED`` in a card with the mark that has the card's digest."""
    return text.replace(UNSIGNED, _MARK.format(_digest(text)), 1)


def is_ours(text: str) -> bool:
    """Return whether this package wrote a card and nobody has edited it since."""
    found = _FOUND.search(text)
    return found is not None and found[1] == _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(_FOUND.sub("", text).encode()).hexdigest()[:16]
