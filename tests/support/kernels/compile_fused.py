"""Compile the attention kernels as they are launched; this needs no GPU.

    TRITON_INTERPRET=0 python -m tests.support.kernels.compile_fused CAPABILITY

Prints one JSON object: kernel and variant -> registers per thread, bytes of local
memory per thread (spilled registers and others), bytes of shared memory per program.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmc_attnmask.attention import fused_kernels
from llmc_attnmask.attention.fused import LAUNCH, TILES

KERNELS = ("statistics", "change", "query_gradient", "key_gradient")
# Name -> head dimension, whether the length is a multiple of 16, flags of the kernels.
VARIANTS = {
    "Llama": (128, True, {"OUTPUT", "MASKED"}),
    "matrix alone": (128, True, {"MASKED"}),
    "odd, with all extras": (64, False, {"OUTPUT", "MASKED", "CAPPED", "HAS_SINKS"}),
}
_FLOATS = ("scaling", "softcap", "matrix_weight")
_COUNTS = ("heads", "groups", "length", "keys")


def _source(kernel, width: int, whole: bool, flags: set[str]) -> ASTSource:
    """Compile with the specializations that Triton makes at a launch with float32."""
    signature, constants, multiples = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[name] = {"dh": width, "dv": width, **TILES}.get(
                name, name in flags
            )
            continue
        aligned = True  # tensors and the mask's padded rows
        if name in _FLOATS:
            signature[name], aligned = "fp32", False
        elif name in _COUNTS:
            signature[name], aligned = "i32", whole and name in ("length", "keys")
        elif name.startswith("mask_"):
            signature[name] = "i32"
        else:
            signature[name] = "*i32" if name == "ranges" else "*fp32"
        if aligned:
            multiples[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=multiples)


def _registers_and_local(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run(
            [tool, "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def main(capability: int) -> None:
    found = {}
    for variant, (width, whole, flags) in VARIANTS.items():
        for name in KERNELS:
            compiled = triton.compile(
                _source(getattr(fused_kernels, name), width, whole, flags),
                target=GPUTarget("cuda", capability, 32),
                options=LAUNCH,
            )
            registers, local = _registers_and_local(compiled.asm["cubin"])
            found[f"{name}, {variant}"] = registers, local, compiled.metadata.shared
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
