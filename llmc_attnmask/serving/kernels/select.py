"""Select the kernels of a layer: one function, and the thresholds that it uses."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from llmc_attnmask.serving.kernels import cuda_decode, cusparselt, nvrtc, packing
from llmc_attnmask.serving.kernels.cpu import machine as cpu
from llmc_attnmask.serving.kernels.cpu import weights

Kernel = Literal["dense", "cuda", "cusparselt", "triton", "avx512"]
Wish = Kernel | Literal["sparse"]
WISHES: tuple[Wish, ...] = (*get_args(Kernel), "sparse")
VARIABLE = "LLMC_ATTNMASK_KERNEL"
DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
NO_LIMIT = 2**31 - 1

# Not measured yet: integration/gpu/measure_kernels.sh prints what belongs here.
DECODE_TOKENS = 64  # up to this many, the decode kernel runs; above, cuSPARSELt
SMALLEST = 2**20  # entries of a weight; below, launches cost more than memory traffic
CAPABILITIES = ((8, 0), (9, 0))  # first and last that are sparse by default
EIGHT_BITS = False  # whether 8-bit layers are, too; dense fp8 leaves little to gain


@dataclass(frozen=True)
class Machine:
    """Where a layer runs."""

    device: str  # as of a torch device
    capability: tuple[int, int] | None  # of a CUDA GPU; None on a CPU
    nvrtc: bool
    triton: bool
    cusparselt: bool
    flags: frozenset[str] = frozenset()  # instruction sets of a CPU

    @classmethod
    def detect(cls) -> "Machine":
        """Describe the machine of this process."""
        has_triton = find_spec("triton") is not None
        if not torch.cuda.is_available() or torch.version.hip:
            triton = has_triton and interpreted()
            other = torch.accelerator.is_available()  # layers are on that
            flags = frozenset() if other else cpu.flags()
            return cls("cpu", None, False, triton, False, flags)
        return cls(
            "cuda",
            torch.cuda.get_device_capability(),
            nvrtc.missing() is None,
            has_triton,
            cusparselt.available(),
        )


@dataclass(frozen=True)
class Layer:
    """The properties of a layer that the choice depends on."""

    rows: int
    columns: int
    dtype: torch.dtype  # of the weight
    two_of_four: bool  # all rows; for a fused layer, all parts
    # "8-bit" is static or asymmetric
    activations: Literal["16-bit", "8-bit per token", "8-bit", "other"]
    model_dtype: torch.dtype = torch.bfloat16  # of what a layer is given and returns


@dataclass(frozen=True)
class Choice:
    """The kernels of a layer, and the reason."""

    few: Kernel  # for up to ``tokens`` tokens
    many: Kernel  # for more tokens
    tokens: int
    reason: str
    timed: bool = False  # whether dense is to be preferred where it is faster

    @property
    def sparse(self) -> bool:
        return self.few != "dense"

    @property
    def label(self) -> str:
        if self.few == self.many:
            return self.few
        return f"{self.few} to {self.tokens} tokens, then {self.many}"


def interpreted() -> bool:
    """Return whether Triton kernels run on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def forced() -> Wish | None:
    """Return the kernel that the environment requests.

    :raises ValueError: if it is not one of ``WISHES``
    """
    requested = os.environ.get(VARIABLE) or None
    for wish in WISHES:
        if requested == wish:
            return wish
    if requested is None:
        return None
    raise ValueError(
        f"{VARIABLE} is {requested!r}; expected one of {', '.join(WISHES)}, or unset"
    )


def choose(layer: Layer, machine: Machine, requested: Wish | None = None) -> Choice:
    """Choose the kernels for few and for many tokens.

    :param requested: the kernel to take wherever it can run; dense elsewhere.
        "sparse" means the two default kernels, even where they are unmeasured
    """
    if requested == "dense":
        return keep_dense(f"{VARIABLE}=dense")
    if machine.device == "cpu" and requested in (None, "sparse", "avx512"):
        return _on_cpu(layer, machine, requested)
    reason = _impossible(layer, machine)
    if reason is None and requested is not None and requested != "sparse":
        return _only(requested, layer, machine)
    reason = reason or _missing(layer, machine)
    if requested != "sparse":
        reason = reason or _unwise(layer, machine)
    if reason is not None:
        return keep_dense(reason)
    return Choice("cuda", "cusparselt", DECODE_TOKENS, "2:4")


def _on_cpu(layer: Layer, machine: Machine, requested: Wish | None) -> Choice:
    """Choose for a layer whose parts may have any structure."""
    reason = None
    if layer.dtype not in weights.DTYPES or layer.model_dtype != torch.bfloat16:
        dtype = layer.model_dtype if layer.dtype in weights.DTYPES else layer.dtype
        reason = f"no sparse kernel for {str(dtype).removeprefix('torch.')} on CPUs"
    elif layer.activations == "other":
        reason = "no sparse kernel for this quantization of activations"
    elif layer.two_of_four and layer.columns % 4:
        reason = f"{layer.columns} inputs on this rank, not a multiple of 4"
    elif layer.dtype == torch.int8 and layer.columns > weights.LARGEST_COLUMNS:
        reason = f"{layer.columns} inputs, more than {weights.LARGEST_COLUMNS}"
    reason = reason or cpu.lacks(machine.flags, layer.dtype, layer.two_of_four)
    if requested is None:
        reason = reason or cpu.unmeasured(machine.flags)
    if reason is not None:
        return keep_dense(reason)
    given = f"{VARIABLE}={requested}" if requested else "sparse"
    return Choice("avx512", "avx512", NO_LIMIT, given, timed=requested is None)


def _impossible(layer: Layer, machine: Machine) -> str | None:
    if not layer.two_of_four:
        return "not all of its parts are 2:4"
    if layer.dtype not in DTYPES:
        return f"no sparse kernel for {str(layer.dtype).removeprefix('torch.')}"
    if layer.activations in ("8-bit", "other"):
        return "no sparse kernel for this quantization of activations"
    if layer.columns % packing.COLUMNS:
        return f"{layer.columns} inputs on this rank, not a multiple of 8"
    if machine.capability is None:
        return None if machine.triton else f"no sparse kernel on {machine.device}"
    least = (8, 9) if layer.dtype == torch.float8_e4m3fn else (8, 0)
    if machine.capability < least:
        return f"capability {_dotted(machine.capability)} is below {_dotted(least)}"
    return None


def _missing(layer: Layer, machine: Machine) -> str | None:
    if machine.capability is None:
        return f"no sparse kernel on {machine.device}"
    if not machine.nvrtc or not machine.cusparselt:
        lacking = "cuSPARSELt" if machine.nvrtc else "cuda-bindings"
        return f"{lacking} is not available"
    if not cusparselt.fits(layer.rows, layer.columns, layer.dtype.itemsize):
        return f"cuSPARSELt does not support {layer.rows} x {layer.columns}"
    return None  # the decode kernel takes every shape that cuSPARSELt takes


def _unwise(layer: Layer, machine: Machine) -> str | None:
    assert machine.capability is not None
    first, last = CAPABILITIES
    if not first <= machine.capability <= last:
        return f"capability {_dotted(machine.capability)} is untested"
    if layer.rows * layer.columns < SMALLEST:
        return f"too small: {layer.rows} x {layer.columns}"
    if layer.dtype.itemsize == 1 and not EIGHT_BITS:
        return f"8-bit kernels are unmeasured; set {VARIABLE}=sparse to try them"
    return None


def _only(kernel: Kernel, layer: Layer, machine: Machine) -> Choice:
    if kernel == "avx512":
        missing = True  # on a GPU
    elif kernel == "triton":
        missing = not machine.triton
    elif kernel == "cuda":
        missing = not machine.nvrtc
        missing |= cuda_decode.unfit(layer.columns, layer.dtype) is not None
    else:
        missing = not machine.cusparselt or not cusparselt.fits(
            layer.rows, layer.columns, layer.dtype.itemsize
        )
    if missing:
        return keep_dense(f"{VARIABLE}={kernel}, which cannot run this layer here")
    tokens = 0 if kernel == "cusparselt" else NO_LIMIT
    return Choice(kernel, kernel, tokens, f"{VARIABLE}={kernel}")


def keep_dense(reason: str) -> Choice:
    """Return the choice that keeps a layer dense."""
    return Choice("dense", "dense", NO_LIMIT, reason)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
