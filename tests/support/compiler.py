"""A C compiler for tests: zig's, which pip installs."""

import subprocess
import sys
from pathlib import Path

import pytest


def shared_library(source: Path, folder: Path, *flags: str) -> Path:
    """Compile one file of C, or of C++ without its standard library.

    Skips the test where zig is not installed. Compiles once for each set of flags while
    the folder exists; it is best made once per session.

    :param source: the file; its suffix gives the language, unless the flags do
    :param folder: where the result goes
    :param flags: further arguments for the compiler
    :return: the shared library
    """
    pytest.importorskip("ziglang", reason="needs zig to compile C: pip install ziglang")
    name = "".join(c if c.isalnum() else "_" for c in "".join(flags))
    library = folder / f"{source.stem}{name}.so"
    if not library.exists():
        command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", "-O2"]
        options = ["-Wall", "-Wextra", "-Werror", *flags]
        done = subprocess.run(
            [*command, *options, str(source), "-o", str(library)],
            capture_output=True,
            text=True,
        )
        assert not done.returncode, f"{source.name} does not compile:\n{done.stderr}"
    return library
