"""Compile the CPU kernels when a wheel is built or the package is installed editable.

Nothing is compiled later. Without a compiler, or on another system than Linux on
x86-64, the wheel has no library, and layers are served dense. The system's compiler
($CXX, c++, g++ or clang++) is used if there is one, otherwise the one in the ziglang
package, which pip then fetches for the build.
"""

import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec, module_from_spec, spec_from_file_location
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
    "-mpopcnt",
)
MORE_FLAGS = {"any_mask": ("-mavx512vbmi2",)}


class KernelsHook(BuildHookInterface):
    """Adds the library to the wheel, or to the sources of an editable installation."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Ask for a compiler from PyPI if the system has none."""
        return ["ziglang"] if wanted() and not system_compiler() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        sources = Path(self.root) / SOURCES
        library = sources / LIBRARY
        command = compiler() if wanted() else None
        if command is None:
            if wanted():
                self.app.display_warning(
                    "no C++ compiler that knows AVX-512 was found: the package is "
                    "built without its CPU kernels, and vLLM serves its checkpoints "
                    "dense on CPUs"
                )
            if version == "editable":
                library.unlink(missing_ok=True)  # of an earlier installation
            return
        if version == "editable":  # found beside its sources
            compile_library(command, sources, library)
            return
        self._folder = TemporaryDirectory()
        built = Path(self._folder.name, LIBRARY)
        compile_library(command, sources, built)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
        build_data["force_include"][str(built)] = str(SOURCES / LIBRARY)

    def finalize(self, *_: Any) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def wanted() -> bool:
    """Return whether this system can use the library, and nobody has declined it."""
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    return here and os.environ.get(SWITCH) != "0"


@functools.cache
def system_compiler() -> list[str] | None:
    """Return the command of the system's C++ compiler, or None if it is too old."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        command = shlex.split(name)
        if command and shutil.which(command[0]) and _compiles(command):
            return command
    return None


def _compiles(command: Sequence[str]) -> bool:
    """Return whether a compiler knows the kernels' instructions and headers."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "probe.cpp")
        file.write_text("#include <immintrin.h>\n#include <type_traits>\n")
        flags = [*FLAGS, *MORE_FLAGS["any_mask"]]
        done = subprocess.run(
            [*command, *flags, "-c", str(file), "-o", f"{file}.o"],
            capture_output=True,
            check=False,
        )
    return done.returncode == 0


def compiler() -> list[str] | None:
    """Return the command of a C++ compiler, or None."""
    found = system_compiler()
    if found is None and find_spec("ziglang") is not None:
        found = [sys.executable, "-m", "ziglang", "c++"]
    return found


def compile_library(command: Sequence[str], sources: Path, library: Path) -> None:
    """Compile every kernel and link them.

    :param command: of a compiler that takes GCC's options
    :param sources: folder of the .cpp files
    :param library: file to write
    :raises RuntimeError: with the compiler's messages, if it fails
    """
    with TemporaryDirectory() as folder:
        files = sorted(sources.glob("*.cpp"))
        objects = [Path(folder, file.stem).with_suffix(".o") for file in files]

        define = f'-DATTNMASK_SOURCES="{_fingerprint(sources)}"'

        def compiled(file: Path, out: Path) -> None:
            _run([*command, *flags_of(file), define, "-c", str(file), "-o", str(out)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compiled, files, objects))
        linked = Path(folder, library.name)
        _run([*command, "-shared", *map(str, objects), "-o", str(linked), "-ldl"])
        # a cut-off copy is never loaded, nor mixed with that of another build
        partial = library.with_suffix(f".{os.getpid()}")
        shutil.copyfile(linked, partial)
        partial.replace(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed; fix the compiler, or install without the CPU "
            f"kernels ({SWITCH}=0):\n{done.stderr[-5000:]}"
        )


def flags_of(file: Path) -> tuple[str, ...]:
    """Return the options for a source; only its kernels may use its instructions."""
    more = (flags for name, flags in MORE_FLAGS.items() if file.name.startswith(name))
    # Each file has a namespace of its own: the linker would merge what they share, and
    # a kernel would get functions with another one's instructions.
    own = f"-Dattnmask=attnmask_{file.stem}"
    return (*FLAGS, *(flag for flags in more for flag in flags), own)


def _fingerprint(sources: Path) -> str:
    # the package is not imported, as its dependencies are not there during a build
    path = Path(__file__).parent / SOURCES / "sources.py"
    spec = spec_from_file_location("sources", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    found: str = module.fingerprint(sources)
    return found
