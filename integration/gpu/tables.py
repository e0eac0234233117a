"""Markdown tables of what was measured on one GPU; without figures, they say so."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from integration.gpu import record, targets
from integration.gpu.figures import DTYPES, NOT_YET, Figures
from integration.gpu.record import Row

_KERNELS = {
    "decode": ("dense", "dense vllm", "cuda", "cusparselt", "triton"),
    "prefill": ("dense", "dense vllm", "cusparselt", "cusparselt unsearched"),
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Make a Markdown table; all but the first ``left`` columns are numbers."""
    lines = [list(row) for row in rows]
    if not lines:
        return NOT_YET
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *lines])


def number(value: Any, digits: int) -> str:
    """Format a number; empty for anything else."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""


_NOT_NAMED = ("seconds", "left_out", "first")


def state(figures: Figures) -> str:
    """Say when the tables were measured, if they were."""
    dates = sorted({row["date"] for row in figures.rows})
    if not dates:
        return "**Nothing here has been measured yet.**"
    return f"Measured on {', '.join(dates)}."


def reached(figures: Figures) -> str:
    return table(
        ("what", "target", "reached"),
        ((row.what, row.target, row.reached(figures)) for row in targets.TABLE),
        left=3,
    )


def machine(figures: Figures) -> str:
    """List the card, versions and peak rates."""
    versions = figures.last("machine", "versions")
    if not versions:
        return NOT_YET
    lines = [f"- {name}: {version}" for name, version in versions.items() if version]
    for key, what, unit in (
        ("copy_tb_per_s", "copy", "TB/s, read and written"),
        ("product_tflop_per_s", "bf16 product, 8192 x 8192 x 8192", "TFLOP/s"),
    ):
        if (value := figures.last("machine", key)) is not None:
            lines.append(f"- {what}: {value:.2f} {unit}")
    for when in ("before", "after"):
        if found := figures.last("machine", "state", of=f"state {when}"):
            named = ", ".join(f"{name} {value}" for name, value in found.items())
            lines.append(f"- {when} the products: {named}")
    return "\n".join(lines)


def correctness(figures: Figures) -> str:
    """List the largest error of each kernel over all shapes, or what failed."""
    rows = []
    cases = figures.correctness()
    names = dict.fromkeys((row["kernel"], row.get("dtype")) for row in cases)
    for kernel, dtype in names:
        own = [r for r in cases if (r["kernel"], r.get("dtype")) == (kernel, dtype)]
        failed = [r["failed"] for r in own if "failed" in r]
        wrong = [r for r in own if r.get("right") is False]
        if missing := [r["missing"] for r in own if "missing" in r]:
            verdict = f"not available: {missing[-1]}"
        elif failed:
            verdict = f"**failed**: {_cell(failed[0])}"
        elif wrong:
            sizes = ", ".join(
                f"{r['tokens']} x {r['rows']} x {r['columns']}" for r in wrong[:3]
            )
            verdict = f"**wrong** in {len(wrong)}, such as {sizes}"
        else:
            verdict = "right"
        eager, graph = (_largest(own, mode) for mode in ("eager", "graph"))
        checked = str(sum("right" in r for r in own))
        rows.append((kernel, dtype or "all", verdict, checked, eager, graph))
    header = ("kernel", "type", "", "sizes", "error, eager", "in a graph")
    return table(header, rows, left=3)


def _largest(rows: Iterable[Row], mode: str) -> str:
    found = [row[mode] for row in rows if mode in row]
    if any(isinstance(value, str) for value in found):
        return "NaN"
    return f"{max(found):.1e}" if found else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def times(step: str) -> Callable[[Figures], str]:
    """Make a table of microseconds, replayed in a graph and called from Python."""

    def made(figures: Figures) -> str:
        kernels = _KERNELS[step]
        copy = figures.last("machine", "copy_tb_per_s")
        rows = []
        known = {
            (r["shape"], r["dtype"], r["tokens"]) for r in figures.of(step) if "us" in r
        }
        for size in (size for size in figures.sizes() if size in known):
            shape, dtype, tokens = size
            for mode in ("graph", "eager"):
                own = [
                    number(figures.times.get((*size, kernel, mode)), 1)
                    for kernel in kernels
                ]
                best = figures.best(*size, mode)
                cells = [dtype, shape, str(tokens), mode, *own]
                cells.append("" if best is None else f"{best.ratio:.2f} {best.kernel}")
                if step == "decode":
                    held = best and figures.last(
                        step, "bytes", shape=shape, dtype=dtype, kernel=best.kernel
                    )
                    share = (
                        held / best.us / copy / 1e6 if best and held and copy else None
                    )
                    cells.append(number(share, 2))
                rows.append(cells)
        header = ["type", "shape", "tokens", "called", *kernels, "best over dense"]
        if step == "decode":
            header.append("of copy bandwidth")
        return table(header, rows, left=2)

    return made


def blocks(figures: Figures) -> str:
    """List the microseconds of the decode kernel with other block sizes, in a graph."""
    found = figures.of("blocks", mode="graph")
    kernels = list(dict.fromkeys(row["kernel"] for row in found))
    times = {
        (row["dtype"], row["shape"], row["tokens"], row["kernel"]): row["us"]
        for row in found
    }
    sizes = dict.fromkeys(key[:3] for key in times)
    return table(
        ("type", "shape", "tokens", *kernels),
        (
            (
                *(dtype, shape, str(tokens)),
                *(number(times.get((dtype, shape, tokens, k)), 1) for k in kernels),
            )
            for dtype, shape, tokens in sizes
        ),
        left=2,
    )


def memory(figures: Figures) -> str:
    """List the bytes of a weight relative to dense, by kernel, and what is shared."""
    rows = []
    for dtype in DTYPES:
        for kernel in ("cuda", "cusparselt", "triton"):
            share = figures.last("decode", "share", dtype=dtype, kernel=kernel)
            seconds = figures.last("decode", "pack_seconds", dtype=dtype, kernel=kernel)
            prepared = figures.last(
                "decode", "prepare_seconds", dtype=dtype, kernel=kernel
            )
            if share is None:
                continue
            shared = ""
            if kernel == "cusparselt":
                shared = _shared(figures.of("cusparselt", of="stored", dtype=dtype))
            rows.append(
                (
                    *(dtype, kernel, shared, number(share, 4)),
                    *(number(seconds, 3), number(prepared, 3)),
                )
            )
    header = ("type", "kernel", "shared with decode", "bytes over dense", "s to pack")
    return table((*header, "s to prepare"), rows, left=3)


def _shared(stored: Sequence[Row]) -> str:
    """Return the part of cuSPARSELt's form that the decode kernel can read."""
    if not stored:
        return ""
    if spans := sorted({str(row["span"]) for row in stored if row.get("span")}):
        return f"all, in spans of {', '.join(spans)}"
    return "values" if all(row["values_shared"] for row in stored) else "nothing"


def attention(figures: Figures) -> str:
    rows = []
    for row in figures.of("attention", of="speed"):
        cells = (row["kernel"], str(row["length"]), number(row["ms"], 2))
        rows.append((*cells, number(row.get("peak_mb"), 0)))
    return table(("kernels", "tokens", "ms", "peak MB"), rows, left=1)


def pruning(figures: Figures) -> str:
    rows = [
        (
            row["recipe"],
            *(str(row[key]) for key in ("layers", "samples", "length", "width")),
            *(number(row["seconds"], 1), number(row["peak_gb"], 1)),
        )
        for row in figures.of("prune")
        if "seconds" in row
    ]
    header = ("recipe", "layers", "samples", "tokens", "width", "seconds", "peak GB")
    return table(header, rows, left=1)


def serving(figures: Figures) -> str:
    """Compare engines with the same weights, stock and with the plugin."""
    keys = ("dtype", "layers", "as_installed")
    setups = dict.fromkeys(
        (*(row[key] for key in keys), row["kernel"])
        for row in figures.of("engine", plugin="on")
    )
    rows = []
    for *setup, kernel in setups:
        case = dict(zip(keys, setup, strict=True))
        name = f"{case['dtype']}, {case['layers']} layers"
        name += ", as installed" if case["as_installed"] else ""
        name += f", LLMC_ATTNMASK_KERNEL={kernel}" if kernel else ""
        for what, key, digits, how in _serving_cases(figures, case):
            dense = figures.last("engine", key, plugin="off", **case, **how)
            ours = figures.last(
                "engine", key, plugin="on", kernel=kernel, **case, **how
            )
            ratio = number(ours / dense, 2) if dense and ours else ""
            cells = (name, what, number(dense, digits), number(ours, digits), ratio)
            if dense is not None or ours is not None:
                rows.append(cells)
    return table(("model", "", "stock vLLM", "2:4", "ratio"), rows, left=2)


def _serving_cases(
    figures: Figures, case: Row
) -> Iterable[tuple[str, str, int, dict[str, Any]]]:
    decoded = figures.of("engine", of="decode", **case)
    for batch in sorted({row["batch"] for row in decoded}):
        how = {"of": "decode", "batch": batch}
        yield f"tokens/s, batch {batch}", "tokens_per_s", 1, how
    prompts = {row["prompt"] for row in figures.of("engine", of="first token", **case)}
    for prompt in sorted(prompts):
        how = {"of": "first token", "prompt": prompt}
        yield f"ms to the first token after {prompt}", "ms", 1, how
    yield "GB of linear layers", "linear_gb", 3, {"of": "memory"}
    yield "s to start", "seconds", 1, {"of": "start"}
    for key, what in (
        ("first_tokens_equal", "first tokens equal to stock"),
        ("equal_until_they_part", "answers equal until they differ"),
    ):
        yield what, key, 3, {"of": "tokens"}


def counters(figures: Figures) -> str:
    """List the counters of Nsight Compute for every launch of a case."""
    keys = ("duration", "dram_percent", "alu_percent", "warps_percent", "registers")
    rows = [
        (
            *(row["dtype"], row["shape"], str(row["tokens"]), row["kernel"]),
            _cell(row["launch"][:40]),
            *(row.get(key, "") for key in keys),
        )
        for row in figures.of("profile")
        if "launch" in row
    ]
    header = ("type", "shape", "tokens", "kernel", "launch", "time", "DRAM", "ALU")
    return table((*header, "warps", "registers"), rows, left=5)


def failures(figures: Figures) -> str:
    """List the cases without figures, and why; each missing kernel only once."""
    rows = []
    for row in figures.failures():
        case = ", ".join(f"{k} {v}" for k, v in record.case(row, *_NOT_NAMED).items())
        why = row["failed"]
        if "left_out" in row:
            why += f" for {row['left_out']} cases, the first {row['first']}"
        rows.append((row["date"], row["step"], _cell(case), _cell(why)))
    if not rows:
        return "None." if figures.rows else NOT_YET
    return table(("date", "step", "case", "why"), rows, left=4)


TABLES: dict[str, tuple[str, Callable[[Figures], str]]] = {
    "gpu-state": ("", state),
    "gpu-machine": ("Machine", machine),
    "gpu-correct": ("Against float64", correctness),
    "gpu-decode": ("Few tokens, microseconds", times("decode")),
    "gpu-prefill": ("Many tokens, microseconds", times("prefill")),
    "gpu-blocks": ("Other block sizes of the decode kernel, microseconds", blocks),
    "gpu-memory": ("One weight", memory),
    "gpu-serving": ("vLLM", serving),
    "gpu-attention": ("Attention error and its gradient", attention),
    "gpu-pruning": ("Pruning", pruning),
    "gpu-counters": ("Hardware counters", counters),
    "gpu-failed": ("Failed or skipped", failures),
    "gpu-targets": ("Targets", reached),
}
