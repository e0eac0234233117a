"""Find out which of the CPU kernels this machine can run."""

import functools
from pathlib import Path

import torch

from llmc_attnmask.serving.kernels.cpu import library

_BASE = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")
_INT8 = ("avx512_vnni",)
_ANY_MASK = ("avx512_vbmi2",)
_UNMEASURED = "amx_tile"  # dense kernels are much faster there


@functools.cache
def flags() -> frozenset[str]:
    """Return the instruction sets of this CPU that Linux reports; elsewhere none."""
    path = Path("/proc/cpuinfo")
    return flags_of(path.read_text(encoding="utf-8")) if path.exists() else frozenset()


def flags_of(cpuinfo: str) -> frozenset[str]:
    """Return the flags of the first processor in the content of /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def lacks(found: frozenset[str], dtype: torch.dtype, two_of_four: bool) -> str | None:
    """Return why a CPU cannot run a kernel; None if it can.

    :param found: from ``flags``
    :param dtype: of the weight
    :param two_of_four: whether the weight is 2:4; otherwise it has any mask
    """
    needed: tuple[str, ...] = _BASE
    if dtype == torch.int8:
        needed += _INT8
    if not two_of_four:
        needed += _ANY_MASK
    missing = [flag for flag in needed if flag not in found]
    if missing:
        return f"this CPU lacks {', '.join(missing)}"
    return library.missing()


def unmeasured(found: frozenset[str]) -> str | None:
    """Return why the kernels are not the default on a CPU that can run them."""
    if _UNMEASURED in found:
        return "unmeasured on CPUs with AMX, whose dense kernels are faster"
    return None
