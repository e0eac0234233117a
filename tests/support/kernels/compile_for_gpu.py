"""Compile the decode kernel for a GPU, which need not be present, and check that it
uses the tensor cores.

    TRITON_INTERPRET=0 python -m tests.support.kernels.compile_for_gpu 90
"""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmc_attnmask.serving.kernels import triton_decode
from llmc_attnmask.serving.kernels.packing import GROUPS

KINDS = {
    "bf16": (tl.bfloat16, "*i16", "*i32", 16),
    "int8": (tl.int8, "*i8", "*i16", 8),
    "fp8": (tl.float8e4nv, "*i8", "*i16", 8),
}
POINTERS = range(7)  # the first arguments; all are aligned to 16 bytes


def compile_kernel(capability: int, x: str, weight: str, tokens: int, partial: bool):
    kind, x_pointer, _, _ = KINDS[x]
    w_kind, _, pairs, bits = KINDS[weight]
    total = "*i32" if x == "int8" else "*fp32"
    constants = {
        "X_KIND": kind,
        "W_KIND": w_kind,
        "DOT_KIND": kind,
        "W_BITS": bits,
        "SUM": tl.int32 if x == "int8" else tl.float32,
        "TOKEN_SCALED": x != "bf16",
        "CHANNEL_SCALED": weight != "bf16",
        "HAS_BIAS": True,
        "PARTIAL": partial,
        "ROWS": triton_decode.ROWS,
        "TOKENS": tokens,
        "GROUPS": GROUPS,
    }
    signature = {
        "x_ptr": x_pointer,
        "pairs_ptr": pairs,
        "indices_ptr": "*u8",
        "out_ptr": total if partial else "*bf16",
        "channel_ptr": "*fp32",
        "token_ptr": "*fp32",
        "bias_ptr": "*bf16",
        **dict.fromkeys(("M", "N", "K", "indices_stride", "chunks_each"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    source = ASTSource(
        fn=triton_decode._sparse_linear,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in POINTERS},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4})


def main() -> None:
    capability = int(sys.argv[1])
    eight = "fp8" if capability >= 89 else "int8"
    instruction = "wgmma.mma_async" if capability == 90 else "mma.sync"
    for kinds, tokens, partial in (
        (("bf16", "bf16"), 64, False),
        ((eight, eight), 16, True),
        (("bf16", eight), 16, False),
    ):
        ptx = compile_kernel(capability, *kinds, tokens, partial).asm["ptx"]
        assert instruction in ptx, f"{kinds}, {tokens} tokens: no {instruction}"


if __name__ == "__main__":
    main()
