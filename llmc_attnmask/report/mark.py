"""Names of the files about a checkpoint, and how a model card of ours is known.

Nothing heavy is imported here: whoever copies a checkpoint asks.
"""

import hashlib
import re

REPORT, PAGE, CARD = "report.json", "report.html", "README.md"

# with a digest of the rest, by which a card is known that was edited since
_MARK = "<!-- written by llmc-attnmask, {} -->"
_FOUND = re.compile(_MARK.format("([0-9a-f]{16})"))
UNSIGNED = _MARK.format("0" * 16)  # its place in a card that is not signed yet


def signed(text: str) -> str:
    """A card with ``UNSIGNED`` in it, as it is written."""
    return text.replace(UNSIGNED, _MARK.format(_digest(text)), 1)


def is_ours(text: str) -> bool:
    """Whether a model card is as it was written here, so that it may be overwritten."""
    found = _FOUND.search(text)
    return found is not None and found[1] == _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(_FOUND.sub("", text).encode()).hexdigest()[:16]
