"""What is done with hostile input, and what must hold for any input.

Every target raises ``AssertionError`` for a finding: an error without a message for
users, or a file that was touched outside the output folder.
"""

import contextlib
import copy
import hashlib
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmc_attnmask import cli
from llmc_attnmask.checkpoint import marker
from llmc_attnmask.checkpoint.config import packed_storage
from llmc_attnmask.checkpoint.convert import to_dense, to_packed
from llmc_attnmask.checkpoint.inspect import inspect
from llmc_attnmask.checkpoint.io.files import open_checkpoint
from llmc_attnmask.serving.recognise import Sparsity, annotate, recognise
from llmc_attnmask.text.dataset import load_texts
from tests.fuzz.inputs.configs import LLAMA, configs, models
from tests.fuzz.inputs.folders import Folder, folders
from tests.fuzz.inputs.lines import arguments, datasets
from tests.fuzz.inputs.recipes import recipes

# the command line shows these as one line; any other error is a bug in this package
EXPECTED = (OSError, ValueError, ImportError)
# ValueErrors of the standard library that do not name the file
RAW = {"JSONDecodeError", "UnicodeDecodeError", "UnicodeEncodeError"}


def attempt(call: Callable[[], Any], *mentions: str) -> Any:
    """Return the call's result or its expected error.

    :param mentions: words of which the message must contain one
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except EXPECTED as error:
        message = str(error)
        assert type(error).__name__ not in RAW, repr(error)
        assert len(message.split()) > 3, f"no message: {error!r}"
        assert any(word in message for word in mentions), f"names nothing: {error!r}"
        return error


def checkpoint(folder: Folder) -> None:
    """Read and convert a folder."""
    with tempfile.TemporaryDirectory() as base:
        source = write(Path(base), folder)
        before = snapshot(Path(base))
        names = (str(source), "config.json", "out")
        attempt(lambda: inspect(source), *names)
        for convert in (
            to_packed,
            lambda a, b: to_packed(a, b, only_2of4=True),
            lambda a, b: to_packed(a, b, storage="sparse-bitmask"),
            to_dense,
        ):
            output = Path(base) / "out"
            result = attempt(lambda: convert(source, output), *names)  # noqa: B023
            if isinstance(result, Exception):
                assert not output.exists(), f"left behind by {result!r}"
            else:
                assert not [p for p in output.rglob("*") if p.is_symlink()]
                open_checkpoint(output)
                inspect(output)
                shutil.rmtree(output)
            assert snapshot(Path(base)) == before, "touched what is not the output"


def write(base: Path, folder: Folder) -> Path:
    """Write the folder as ``base/in``, beside one that does not belong to it."""
    source = base / "in"
    source.mkdir()
    (base / "outside").mkdir()
    (base / "outside" / "secret").write_bytes(b"secret")
    for name, content in folder["files"].items():
        path = source / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    for name, target in folder["links"].items():
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(target)
    for name in folder["pipes"]:
        (source / name).unlink(missing_ok=True)
        os.mkfifo(source / name)
    return source


def snapshot(base: Path) -> dict[str, str]:
    """Map every path below to a digest of its content, without following links."""
    found = {}
    for root, subfolders, files in os.walk(base):
        for name in (*subfolders, *files):
            path = Path(root) / name
            plain = path.is_file() and not path.is_symlink()
            content = path.read_bytes() if plain else str(path.lstat().st_mode).encode()
            found[str(path)] = hashlib.sha256(content).hexdigest()
    return found


def quantization(config: Any) -> None:
    """Read what a server reads of a config.json."""
    if not isinstance(config, dict):
        return  # vLLM never gets that far
    attempt(lambda: marker.read(config), "config.json")
    attempt(lambda: packed_storage(config), "config.json")
    changed = copy.deepcopy(config)
    attempt(lambda: annotate(changed), "config.json")
    found = changed.get("quantization_config")
    if not isinstance(found, dict):
        return
    sparsity = attempt(lambda: recognise(found), "config.json")
    if isinstance(sparsity, Sparsity):
        for name in ("model.layers.0.self_attn.q_proj", "lm_head", ""):
            attempt(lambda: sparsity.is_sparse(name), "config.json")  # noqa: B023


def recipe(content: bytes) -> None:
    """Read a recipe."""
    from llmc_attnmask.oneshot.recipe import load_recipe

    with tempfile.TemporaryDirectory() as base:
        path = Path(base) / "recipe.yaml"
        path.write_bytes(content)
        result = attempt(lambda: load_recipe(path), str(path))
        assert len(str(result)) < 100_000, "the message is as long as a book"


def dataset(content: bytes) -> None:
    """Read texts, as one object per line and as one document."""
    with tempfile.TemporaryDirectory() as base:
        for name in ("d.jsonl", "d.json", "d.txt"):
            path = Path(base) / name
            path.write_bytes(content)
            result = attempt(lambda: list(load_texts(path)), str(path))  # noqa: B023
            assert len(str(result)) < 2000 + 2 * len(content)


def command(words: list[str]) -> None:
    """Run the command line on a good folder; it may only exit with code 0, 1 or 2.

    ``prune`` and ``eval`` load models, which is slow, so they get no valid arguments.
    """
    with tempfile.TemporaryDirectory() as base:
        source = write(Path(base), {"files": {}, "links": {}, "pipes": []})
        (source / "config.json").write_text("{}")
        weight = torch.zeros(4, 4)
        save_file({"layers.0.[/x].weight": weight}, source / "model.safetensors")
        before = snapshot(Path(base))
        places = {"FOLDER": str(source), "NEW": str(Path(base) / "new")}
        places["RECIPE"] = str(Path(base) / "none.yaml")
        filled = [places.get(word, word) for word in words]
        printed = io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["llmc-attnmask", *filled]),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            contextlib.chdir(base),
        ):
            try:
                cli.main()
                code: Any = 0
            except SystemExit as ended:
                code = ended.code or 0
        assert code in (0, 1, 2), code
        assert "LLMC_ATTNMASK_TRACEBACK" not in printed.getvalue(), printed.getvalue()
        shutil.rmtree(Path(base) / "new", ignore_errors=True)
        assert snapshot(Path(base)) == before, "touched what is not the output"


def attention_config(text: str) -> None:
    """Call ``load`` with a config and usable weights."""
    from llmc_attnmask.checkpoint.load import load

    with tempfile.TemporaryDirectory() as base:
        source = write(Path(base), {"files": {}, "links": {}, "pipes": []})
        (source / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        save_file(WEIGHTS, source / "model.safetensors")
        before = snapshot(Path(base))
        attempt(lambda: load(source), str(source))
        assert snapshot(Path(base)) == before, "touched what is not the output"


def _tiny() -> dict[str, torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**LLAMA)).state_dict()


WEIGHTS = _tiny()

TARGETS: dict[str, tuple[st.SearchStrategy, Callable[[Any], None]]] = {
    "checkpoint": (folders(), checkpoint),
    "quantization": (configs, quantization),
    "recipe": (recipes(), recipe),
    "dataset": (datasets, dataset),
    "command": (arguments, command),
    "model": (models(), attention_config),
}
