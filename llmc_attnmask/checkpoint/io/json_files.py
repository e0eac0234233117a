"""Read JSON that others wrote; what cannot be used is refused with one line."""

import json
from pathlib import Path
from typing import Any

_DEPTH = 64  # levels, more than any config has; code that handles JSON recurses


def parse(text: str | bytes) -> Any:
    """Parse a JSON text.

    :raises ValueError: if it is not JSON, is nested too deep, or has a number with more
        digits than Python reads
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    level = [content]
    for _ in range(_DEPTH):
        level = [child for value in level for child in _children(value)]
        if not level:
            return content
    raise _too_deep()


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    :raises FileNotFoundError: if it does not exist
    :raises ValueError: if it is not JSON, or is not an object
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}, so it is not a checkpoint"
        )
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping but {type(content).__name__}")
    return content


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Serve as an ``object_pairs_hook`` that refuses what JSON readers disagree about.

    :raises ValueError: for a key that occurs twice in one object
    """
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key!r} occurs twice in one object")
        content[key] = value
    return content


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {_DEPTH} levels deep")
