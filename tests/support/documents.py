"""The documents of the project and the code blocks in them.

    python -m tests.support.documents

counts the blocks by what the tests do with them.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
DOCUMENTS += sorted(ROOT.glob("docs/*.md"))
DOCUMENTS += sorted(ROOT.glob("integration/**/*.md"))

# Maps the first word of a command to why it is not run here. Each is checked in another
# way in tests/test_document_blocks.py.
NOT_RUN = {
    "cd": "only makes sense after git clone",
    "git": "needs the repository's address",
    "make": "sets up environments, or is the test suite itself",
    "pip": "installs into an environment of its own",
    "python": "benchmarks, generators and GPU scripts: minutes, or a GPU",
    "torchrun": "several processes; tests/test_distributed.py runs such a command",
    "vllm": "vLLM's environment; make test-serving runs it",
}


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    document: Path
    section: str  # the heading of level 2 above it
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Return command lines, with continued lines joined and without comments."""
        joined = self.text.replace("\\\n", " ")
        lines = [re.sub(r"(^|\s+)#.*", "", line).strip() for line in joined.split("\n")]
        commands = [c for line in lines for c in re.split(r"\s+(?:&&|\|)\s+", line)]
        return [command for command in commands if command]


def blocks(document: Path) -> Iterator[Block]:
    """Yield the code blocks of a document in order."""
    section, start, language = "", 0, ""
    lines: list[str] = []
    for number, line in enumerate(document.read_text("utf-8").split("\n"), start=1):
        fence = re.fullmatch(r"```(\S*)", line)
        if start and fence:
            text = "\n".join(lines) + "\n"
            yield Block(document, section, start, language, text)
            start = 0
        elif fence:
            start, language, lines = number, fence[1], []
        elif start:
            lines.append(line)
        elif line.startswith("## "):
            section = line
    assert not start, f"{document}:{start} opens a block that nothing closes"


def first_word(command: str) -> str:
    """Return a command's first word, without an environment's folder."""
    return command.split()[0].rpartition("/")[2]


def _counts() -> Counter[str]:
    found: Counter[str] = Counter()
    for block in (block for document in DOCUMENTS for block in blocks(document)):
        found[f"{block.language} blocks"] += 1
        if block.language == "bash":
            for command in block.commands():
                run = first_word(command) not in NOT_RUN
                found[f"commands {'run' if run else 'checked only'}"] += 1
    return found


if __name__ == "__main__":
    for kind, count in sorted(_counts().items()):
        print(f"{count:4d} {kind}")
