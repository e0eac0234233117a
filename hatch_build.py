"""Compile the CPU kernels when a wheel is built or the package is installed editable.

Nothing is compiled later. Without a compiler, or on another system than Linux on
x86-64, the wheel has no library, and layers are served dense. The system's compiler
($CXX, c++, g++ or clang++) is used if there is one, otherwise the one in the ziglang
package, which pip then fetches for the build.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("llmc_attnmask/serving/kernels/cpu")
LIBRARY = "libattnmask_cpu.so"
SWITCH = "LLMC_ATTNMASK_COMPILE"  # 0 leaves the library out
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions"),
    # Each kernel runs only where serving/kernels/cpu/machine.py finds what it needs.
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
    *("-mavx512vnni", "-mavx512vbmi2", "-mpopcnt"),
)


class KernelsHook(BuildHookInterface):
    """Builds the library beside its sources, and adds it to the wheel."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Ask for a compiler from PyPI if the system has none."""
        return ["ziglang"] if wanted() and not system_compiler() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        library = root / SOURCES / LIBRARY
        command = compiler() if wanted() else None
        if command is None and wanted():
            self.app.display_warning(
                "no C++ compiler was found: the package is built without its CPU "
                "kernels, and vLLM serves its checkpoints dense on CPUs"
            )
        if command is None:
            if version == "editable":
                library.unlink(missing_ok=True)  # of an earlier installation
            return
        if not _is_fresh(library, root):
            compile_library(command, root / SOURCES, library)
        if version == "editable":  # which finds it beside its sources
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
        build_data["force_include"][str(library)] = str(SOURCES / LIBRARY)


def wanted() -> bool:
    """Return whether this system can use the library, and nobody has declined it."""
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    return here and os.environ.get(SWITCH) != "0"


def system_compiler() -> list[str] | None:
    """Return the command of the system's C++ compiler, or None."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next(([name] for name in names if name and shutil.which(name)), None)


def compiler() -> list[str] | None:
    """Return the command of a C++ compiler, or None."""
    found = system_compiler()
    if found is None and find_spec("ziglang") is not None:
        found = [sys.executable, "-m", "ziglang", "c++"]
    return found


def compile_library(
    command: Sequence[str], sources: Path, library: Path, extra: Sequence[str] = ()
) -> None:
    """Compile every kernel and link them.

    :param command: of a compiler that takes GCC's options
    :param sources: folder of the .cpp files
    :param library: file to write
    :param extra: further options
    :raises RuntimeError: with the compiler's messages, if it fails
    """
    with TemporaryDirectory() as folder:
        files = sorted(sources.glob("*.cpp"))
        objects = [Path(folder, file.stem).with_suffix(".o") for file in files]

        def compiled(file: Path, out: Path) -> None:
            _run([*command, *FLAGS, *extra, "-c", str(file), "-o", str(out)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compiled, files, objects))
        linked = Path(folder, library.name)
        _run(
            [*command, *extra, "-shared", *map(str, objects), "-o", str(linked), "-ldl"]
        )
        partial = library.with_suffix(".partial")  # a cut-off copy is never loaded
        shutil.copyfile(linked, partial)
        partial.replace(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed; fix the compiler, or install without the CPU "
            f"kernels ({SWITCH}=0):\n{done.stderr[-5000:]}"
        )


def _is_fresh(library: Path, root: Path) -> bool:
    sources = (*(root / SOURCES).glob("*.?pp"), root / Path(__file__).name)
    return library.is_file() and library.stat().st_mtime > max(
        source.stat().st_mtime for source in sources
    )
