"""Check what the project assumes about cuSPARSELt.

It records the version, the bytes of a weight, and how the metadata are laid out. It
checks whether the kept values are row by row at the start of the buffer, where the
decode kernels read them, whether a product of a size that was never called can be
recorded, and whether scales can be a vector.
"""

import argparse
from functools import partial
from typing import Any

import torch

from integration.gpu.context import Context
from integration.gpu.kernels import missing, pack
from integration.gpu.steps import layout
from integration.gpu.steps.correct import errors, tolerance
from integration.gpu.weights import (
    DTYPES,
    SHAPES,
    random_tokens,
    random_weight,
)
from llmc_attnmask.serving.kernels import cusparselt, forms, packing

PROBED = (128, 256)  # rows, columns


def stored(dtype: torch.dtype, shape: tuple[int, int], device: str) -> dict[str, Any]:
    """Describe how cuSPARSELt stores a weight.

    :return: ``share``: bytes relative to dense; ``values_shared``: whether the kept
        values come first, row by row; ``span``: the span with which the decode kernel
        can read the metadata, if it can
    """
    weight = random_weight(*shape, dtype, device).dense
    compressed = cusparselt.compress(weight)
    values, _ = packing.kept(weight)
    return {
        "share": compressed.nbytes / weight.nbytes,
        "values_shared": forms.shares_values(compressed, values),
        "span": forms.shared_span(compressed, weight),
    }


def recorded_first(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Record a product in a graph without calling it first."""
    weight = random_weight(*SHAPES["o_proj"], dtype, device)
    packed = pack("cusparselt", weight)
    packed.prepare([64])
    x, scale = random_tokens(48, weight.dense.shape[1], dtype, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed(x, scale)
    graph.replay()
    expected = weight.product(x, scale)
    error = float((out.double() - expected).norm() / expected.norm())
    return {"error": error, "right": error < tolerance(dtype)}


def in_vector(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Scale an 8-bit product with a vector of the weight's scales."""
    weight = random_weight(*SHAPES["o_proj"], dtype, device)
    packed = pack("cusparselt", weight)
    packed.prepare([16])
    return errors(packed, 16, device)


def run(context: Context, options: argparse.Namespace) -> None:
    if why := cusparselt.why_not():
        context.record(of="version", missing=why)
        return
    device = context.device
    context.attempt({"of": "version"}, lambda: {"version": cusparselt.version()})
    for kind, dtype in DTYPES.items():
        case: dict[str, Any] = {"dtype": kind}
        if why := missing("cusparselt", dtype, PROBED, device):
            context.record(**case, missing=why)
            continue
        for name in ("o_proj", "down_proj"):
            context.attempt(
                case | {"of": "stored", "shape": name},
                partial(stored, dtype, SHAPES[name], device),
            )
        context.attempt(
            case | {"of": "recorded first"}, partial(recorded_first, dtype, device)
        )
        if dtype.itemsize == 1:
            context.attempt(
                case | {"of": "scales in a vector"}, partial(in_vector, dtype, device)
            )
        context.attempt(
            case | {"of": "layout", "rows": PROBED[0], "columns": PROBED[1]},
            partial(layout.of, cusparselt.compress, dtype, *PROBED, device),
        )
