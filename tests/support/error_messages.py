"""Every error and warning that the package's sources can print, read from them.

    python -m tests.support.error_messages

lists them, for docs/troubleshooting.md.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOLE = "\N{HORIZONTAL ELLIPSIS}"  # stands for what is filled in at run time
# names of what prints a message, besides everything that ends in Error
_PRINTING = {"BadParameter", "SystemExit", "UsageError", "exit", "warn", "warning"}
_FEWEST_LETTERS = 9  # shorter texts only put a name before another message


@dataclass(frozen=True)
class Message:
    """One message, on one line, with holes."""

    text: str
    place: str  # file:line


def messages(package: Path = ROOT / "llmc_attnmask") -> list[Message]:
    """Return the messages in the order of files and lines."""
    found: list[Message] = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        place = path.relative_to(package.parent).as_posix()
        for line, text in sorted(_of_module(tree)):
            if len(re.sub(r"[^A-Za-z]", "", text)) >= _FEWEST_LETTERS:
                found.append(Message(text, f"{place}:{line}"))
    return found


def _of_module(tree: ast.Module) -> Iterator[tuple[int, str]]:
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not _prints(node.func):
            continue
        for value in [*node.args, *(keyword.value for keyword in node.keywords)]:
            # the text may come from a function of this module
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                maker = functions.get(value.func.id)
                yield from _returned(maker, constants) if maker else ()
            elif text := _text(value, constants):
                yield node.lineno, text
                break  # what follows is a category, or what `%s` stands for


def _returned(
    maker: ast.FunctionDef, constants: dict[str, str]
) -> Iterator[tuple[int, str]]:
    for node in ast.walk(maker):
        if isinstance(node, ast.Return) and node.value is not None:
            yield node.lineno, _text(node.value, constants)


def _prints(function: ast.expr) -> bool:
    name = ast.unparse(function).rpartition(".")[2]
    return name.endswith("Error") or name in _PRINTING


def _text(value: ast.expr, constants: dict[str, str]) -> str:
    """Return a string with holes, or an empty one for anything that is not a string."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        text = value.value.replace("%s", HOLE)
    elif isinstance(value, ast.JoinedStr):
        text = "".join(_part(part, constants) for part in value.values)
    else:
        return ""
    return re.sub(r"\s+", " ", text)


def _part(part: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    name = part.value.id if isinstance(part.value, ast.Name) else ""
    return constants.get(name, HOLE)


if __name__ == "__main__":
    for message in messages():
        print(f"{message.place}\n    {message.text}")
