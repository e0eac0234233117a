import platform

import pytest
import torch

from llmc_attnmask.serving.kernels.cpu import library, machine

ZEN4 = """processor\t: 0
flags\t\t: fpu avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512_vnni avx512_vbmi2
"""


def test_flags_are_those_of_the_first_processor() -> None:
    assert "avx512_bf16" in machine.flags_of(ZEN4 + "flags : none\n")
    assert machine.flags_of("Features : asimd\n") == frozenset()  # as on Arm


@pytest.mark.parametrize(
    ("without", "dtype", "two_of_four", "reason"),
    [
        ("avx512_bf16", torch.bfloat16, True, "this CPU lacks avx512_bf16"),
        ("avx512_vnni", torch.int8, True, "this CPU lacks avx512_vnni"),
        ("avx512_vbmi2", torch.bfloat16, False, "this CPU lacks avx512_vbmi2"),
        ("avx512_vbmi2", torch.bfloat16, True, library.missing()),
        ("avx512_vnni", torch.bfloat16, True, library.missing()),
    ],
)
def test_each_kernel_needs_its_own_instructions(
    without: str, dtype: torch.dtype, two_of_four: bool, reason: str | None
) -> None:
    found = machine.flags_of(ZEN4) - {without}
    assert machine.lacks(found, dtype, two_of_four) == reason


def test_kernels_are_unmeasured_on_amx() -> None:
    assert machine.unmeasured(machine.flags_of(ZEN4)) is None
    assert "AMX" in str(machine.unmeasured(frozenset({"amx_tile"})))


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the library is compiled for x86-64"
)
def test_the_library_of_this_environment_fits_its_sources() -> None:
    # a stale one would silently leave out every test of the kernels
    assert library.missing() is None
