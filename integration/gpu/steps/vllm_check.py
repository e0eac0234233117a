"""Check that this vLLM runs: import it, and call its own kernels.

A reduced vLLM has one extension with code for one capability. This step shows within
seconds, before a checkpoint is made, whether the driver accepts such a library.
"""

import argparse
import sys
import time
from importlib.metadata import entry_points
from typing import Any

import torch

import llmc_attnmask
from integration.gpu.context import Context
from integration.gpu.kernels import pack
from integration.gpu.steps.correct import errors
from integration.gpu.weights import random_weight
from llmc_attnmask.serving.kernels import activations


def imported() -> dict[str, Any]:
    start = time.monotonic()
    import vllm
    from vllm import LLM  # noqa: F401 - the whole engine
    from vllm.platforms import current_platform

    return {
        "seconds": time.monotonic() - start,
        "version": vllm.__version__,
        "platform": type(current_platform).__name__,
        "folder": next(iter(vllm.__path__)),
    }


def plugins() -> dict[str, Any]:
    """Return the names in vLLM's plugin group.

    :raises RuntimeError: if this package's is not among them
    """
    names = [entry.name for entry in entry_points(group="vllm.general_plugins")]
    if "llmc_attnmask" not in names:
        raise RuntimeError(
            f"the plugins that vLLM finds are {names}; expected llmc_attnmask among "
            "them: install this package, or its wheel, for this Python"
        )
    return {"plugins": names, "ours": llmc_attnmask.__file__}


def normed(device: str) -> dict[str, Any]:
    """Make the smallest call of a compiled kernel."""
    from vllm import _custom_ops as ops

    x = torch.randn(2, 64, device=device, dtype=torch.bfloat16)
    out = torch.full_like(x, float("nan"))
    ops.rms_norm(out, x, torch.ones(64, device=device, dtype=torch.bfloat16), 1e-5)
    expected = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return {"error": float((out.double() - expected).abs().max())}


def quantized(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Compare 8-bit tokens from vLLM, as served layers get them, with torch's."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        quantize = activations.quantizer(dtype, torch.device(device))
    x = torch.randn(5, 256, device=device, dtype=torch.bfloat16)
    found, scale = quantize(x)
    expected, expected_scale = activations.reference(x, dtype)
    values = found.double() * scale.double()[:, None]
    reference = expected.double() * expected_scale.double()[:, None]
    return {"error": float((values - reference).norm() / reference.norm())}


def multiplied(dtype: torch.dtype, device: str) -> dict[str, Any]:
    packed = pack("dense vllm", random_weight(256, 512, dtype, device))
    return errors(packed, 16, device)


def run(context: Context, options: argparse.Namespace) -> None:
    if context.attempt({"of": "import"}, imported) is None and not context.done:
        sys.exit("vLLM cannot be imported")
    device = context.device
    context.attempt({"of": "plugins"}, plugins)
    right = context.attempt({"of": "rms_norm"}, lambda: normed(device))
    if right is None and not context.done:
        sys.exit("vLLM's compiled kernels do not run here")
    for name, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        context.attempt(
            {"of": "quantize", "dtype": name},
            lambda dtype=dtype: quantized(dtype, device),  # type: ignore[misc]
        )
        if device == "cuda":
            context.attempt(
                {"of": "cutlass_scaled_mm", "dtype": name},
                lambda dtype=dtype: multiplied(dtype, device),  # type: ignore[misc]
            )
