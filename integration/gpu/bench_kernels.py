"""Every kernel on this GPU: is it right, how fast, and what does it take in memory.

    python integration/gpu/bench_kernels.py --out out/gpu

Needs a CUDA GPU of capability 8.0 or higher, torch, triton, and this package; without
a GPU it says so and ends with 0. Writes kernels.md and kernels.json.

Correctness first, against float64, with fresh random inputs and outputs that start as
NaN, in a CUDA graph, too; a kernel that fails is named with its reason and not timed,
the others are. What has been measured is written after every step. Then the four
linear shapes of Llama-3.1-8B: the median of CUDA events around a replayed graph, in
which inputs and weights rotate so that no cache holds them.
"""

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels import (
    activations,
    cusparselt,
    dense,
    packing,
    select,
)

SHAPES = {  # rows, columns
    "qkv_proj": (6144, 4096),
    "o_proj": (4096, 4096),
    "gate_up_proj": (28672, 4096),
    "down_proj": (4096, 14336),
}
TOKENS = (1, 8, 16, 32, 64, 256, 1024, 4096)
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
TIMED = ("bf16", "fp8", "int8")
ODD = ((1, 64, 256), (7, 96, 320), (33, 160, 1056), (65, 256, 2048))
ROTATED = 2**28  # bytes that the inputs of one replay read; several times any L2
REPLAYS = 20
CALLS = 8  # in one replay, at least

Kernel = Callable[[Tensor, Tensor | None], Tensor]  # of tokens and their scales


@dataclass
class Weight:
    """A random 2:4 weight in all its forms."""

    dense: Tensor
    values: Tensor
    places: Tensor
    compressed: Tensor | None
    scale: Tensor | None

    @classmethod
    def random(cls, rows: int, columns: int, dtype: torch.dtype) -> "Weight":
        weight = random_values(rows, columns, dtype)
        order = torch.rand(rows, columns // 4, 4, device="cuda").argsort(-1)
        bits = weight.view(torch.int8 if dtype.itemsize == 1 else torch.int16)
        bits.masked_fill_((order < 2).view(rows, columns), 0)
        values, places = packing.pack(weight)
        fits = cusparselt.available() and cusparselt.fits(rows, columns, dtype.itemsize)
        compressed = cusparselt.compress(weight) if fits else None
        scale = None
        if dtype.itemsize == 1:
            scale = torch.rand(rows, device="cuda") * 0.01 + 0.001
        return cls(weight, values, places, compressed, scale)

    def kernels(self) -> dict[str, Kernel]:
        """The sparse kernels that take this weight, with output in 16 bits."""
        from llmc_attnmask.serving.kernels import triton_decode

        out = self.dense.dtype if self.dense.itemsize == 2 else torch.bfloat16
        found: dict[str, Kernel] = {
            "triton": lambda x, scale: triton_decode.linear(
                x, self.values, self.places, self.scale, scale, None, out
            )
        }
        compressed = self.compressed
        if compressed is not None:
            found["cusparselt"] = lambda x, scale: cusparselt.linear(
                x, compressed, self.scale, scale, None, out
            )
        return found

    def dense_kernel(self) -> Kernel | None:
        """What the sparse ones must beat; torch has no dense int8 with scales."""
        if self.dense.itemsize == 2:
            return lambda x, _: torch.nn.functional.linear(x, self.dense)
        if self.dense.dtype == torch.float8_e4m3fn:
            assert self.scale is not None
            row = self.scale[None]
            return lambda x, scale: torch._scaled_mm(
                x,
                self.dense.t(),
                scale_a=scale[:, None],  # type: ignore[index]
                scale_b=row,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        return None  # `against_fp8` compares with the other 8-bit type


def random_values(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, (rows, columns), dtype=dtype, device="cuda")
    return torch.randn(rows, columns, device="cuda").to(dtype)


def random_tokens(n: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = torch.randn(n, columns, device="cuda", dtype=torch.bfloat16)
    if dtype.itemsize == 2:
        return x.to(dtype), None  # type: ignore[return-value]
    return activations.reference(x, dtype)


Errors = dict[str, float | str]  # kernel -> largest error, or why it is wrong


def check(weight: Weight, tokens: int) -> Errors:
    """Largest error of each kernel over the largest output, by itself and in a graph.

    From 2 % on, which no rounding explains, or for NaN, the kernel is wrong.
    """
    x, scale = random_tokens(tokens, weight.dense.shape[1], weight.dense.dtype)
    expected = dense.linear(
        x, weight.values, weight.places, weight.scale, scale, None, torch.float64
    )
    errors: Errors = {}
    for name, kernel in weight.kernels().items():
        poison(expected.numel())
        try:
            outs = [kernel(x, scale), in_graph(kernel, x, scale)]
        except RuntimeError as error:  # does not compile, or the library refuses
            errors[name] = f"{type(error).__name__} at {tokens} tokens: {error}"
            continue
        largest = [
            ((out - expected).abs().max() / expected.abs().max()).item() for out in outs
        ]
        if all(error < 0.02 for error in largest):  # False for NaN
            errors[name] = max(largest)
        else:
            errors[name] = f"errors {largest} at {tokens} tokens, eager and in a graph"
    return errors


def worse(one: float | str, other: float | str) -> float | str:
    """The larger error; a kernel that is wrong once is wrong."""
    if isinstance(one, str):
        return one
    return other if isinstance(other, str) else max(one, other)


def poison(entries: int) -> None:
    """Leave NaN in the memory that the next allocations get."""
    blocks = [
        torch.full((size,), float("nan"), device="cuda", dtype=dtype)
        for size in (entries, 2 * entries, 4 * entries, 8 * entries)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    del blocks


def in_graph(kernel: Kernel, x: Tensor, scale: Tensor | None) -> Tensor:
    """The output of a recorded and replayed kernel."""
    kernel(x, scale)  # compiles, which must not be recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(x, scale)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return out


def microseconds(calls: list[Callable[[], Tensor]]) -> float:
    """Median time of one of the calls, replayed one after another."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second read and written by a copy of a gigabyte."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds([lambda: target.copy_(source)]) * 1e6


@dataclass
class Row:
    """One measurement."""

    shape: str
    dtype: str
    tokens: int
    kernel: str
    microseconds: float
    speedup: float | None  # over dense of the same type; of int8 over dense fp8
    bandwidth_share: float  # of the weight's bytes, of what a copy reaches


def measure(shape: str, dtype: str, bandwidth: float, right: set[str]) -> list[Row]:
    """All kernels that are ``right`` and numbers of tokens of one shape and type."""
    rows, columns = SHAPES[shape]
    itemsize = DTYPES[dtype].itemsize
    copies = max(2, -(-ROTATED // (rows * columns * itemsize)))
    weights = [Weight.random(rows, columns, DTYPES[dtype]) for _ in range(copies)]
    repeated = [weights[i % copies] for i in range(max(CALLS, copies))]
    found = []
    for tokens in TOKENS:
        inputs = [random_tokens(tokens, columns, DTYPES[dtype]) for _ in repeated]
        kernels = [
            {name: k for name, k in weight.kernels().items() if name in right}
            for weight in repeated
        ]
        for weight, named in zip(repeated, kernels, strict=True):
            reference = weight.dense_kernel()
            if reference is not None:
                named["dense"] = reference
        times = {
            name: microseconds(
                [
                    partial(named[name], *pair)
                    for named, pair in zip(kernels, inputs, strict=True)
                ]
            )
            for name in sorted(kernels[0], reverse=True)
        }
        for name, time in times.items():
            used = sum(part.nbytes for part in parts(weights[0], name))
            found.append(
                Row(
                    shape,
                    dtype,
                    tokens,
                    name,
                    time,
                    times["dense"] / time if "dense" in times else None,
                    used / (time / 1e6) / bandwidth,
                )
            )
    return found


def against_fp8(rows: list[Row]) -> list[Row]:
    """Give int8 rows their speedup over dense fp8."""
    dense_fp8 = {
        (row.shape, row.tokens): row.microseconds
        for row in rows
        if (row.dtype, row.kernel) == ("fp8", "dense")
    }
    for row in rows:
        if row.dtype == "int8" and (row.shape, row.tokens) in dense_fp8:
            row.speedup = dense_fp8[row.shape, row.tokens] / row.microseconds
    return rows


def parts(weight: Weight, kernel: str) -> list[Tensor]:
    if kernel == "triton":
        return [weight.values, weight.places]
    if kernel == "cusparselt":
        assert weight.compressed is not None
        return [weight.compressed]
    return [weight.dense]


def memory(dtype: str) -> dict[str, float | bool]:
    """Bytes of a weight over dense, and whether both kernels can share the values."""
    weight = Weight.random(4096, 4096, DTYPES[dtype])
    share: dict[str, float | bool] = {
        kernel: sum(part.nbytes for part in parts(weight, kernel)) / weight.dense.nbytes
        for kernel in weight.kernels()
    }
    if weight.compressed is not None:
        kept = cusparselt.kept_values(weight.compressed, 4096)
        bits = torch.int8 if kept.itemsize == 1 else torch.int16
        shared = torch.equal(kept.view(bits), weight.values.view(bits))
        both = weight.places.nbytes + weight.compressed.nbytes
        both += 0 if shared else weight.values.nbytes
        share |= {"both": both / weight.dense.nbytes, "values shared": shared}
    return share


def machine() -> dict[str, str]:
    import triton

    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "cusparselt": str(torch.backends.cusparselt.version()),
    }


def markdown(report: dict) -> str:
    lines = ["# Kernels", ""]
    lines += [f"- {key}: {value}" for key, value in report["machine"].items()]
    lines += [
        f"- copy: {report['copy_bandwidth'] / 1e12:.2f} TB/s, read and written",
        "",
        "Largest error over the largest output, against float64:",
        "",
        *(
            f"- {name}: {error}" if isinstance(error, str) else f"- {name}: {error:.1e}"
            for name, error in report["errors"].items()
        ),
        "",
        "Bytes of a weight over dense:",
        "",
        *(f"- {name}: {share}" for name, share in report["memory"].items()),
        "",
        "| shape | type | tokens | kernel | µs | speedup | share of copy bandwidth |",
        "|---|---|--:|---|--:|--:|--:|",
    ]
    for row in report["rows"]:
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}"
        lines.append(
            f"| {row['shape']} | {row['dtype']} | {row['tokens']} | {row['kernel']} "
            f"| {row['microseconds']:.1f} | {speedup} | {row['bandwidth_share']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA GPU on this machine")
        return
    if torch.cuda.get_device_capability() < (8, 0):
        print("skipped: sparse tensor cores need capability 8.0")
        return
    if select.interpreted():
        sys.exit("TRITON_INTERPRET is set: kernels would run in the interpreter")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    usable = [
        dtype
        for dtype in DTYPES
        if dtype != "fp8" or torch.cuda.get_device_capability() >= (8, 9)
    ]
    report: dict[str, Any] = {
        "machine": machine(),
        "copy_bandwidth": bandwidth,
        "errors": {},
        "memory": {},
        "rows": [],
    }
    right: dict[str, set[str]] = {}
    for dtype in usable:
        errors: Errors = {}
        cases = [*ODD, *((t, *SHAPES["o_proj"]) for t in (1, 16, 64, 100))]
        for tokens, rows, columns in cases:
            weight = Weight.random(rows, columns, DTYPES[dtype])
            for name, error in check(weight, tokens).items():
                errors[name] = worse(errors.get(name, 0.0), error)
        right[dtype] = {n for n, e in errors.items() if not isinstance(e, str)}
        report["errors"] |= {f"{dtype} {name}": e for name, e in errors.items()}
        report["memory"][dtype] = memory(dtype)
        write(report, args.out)
    timed: list[Row] = []
    for dtype in (dtype for dtype in TIMED if dtype in usable):
        for shape in SHAPES:
            timed += measure(shape, dtype, bandwidth, right[dtype])
            report["rows"] = [asdict(row) for row in against_fp8(timed)]
            write(report, args.out)
    print(markdown(report))
    if any(isinstance(error, str) for error in report["errors"].values()):
        sys.exit("some kernels are wrong on this GPU, see above")


def write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "kernels.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
