"""The targets of the kernels, serving and pruning, and what they reach."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from integration.gpu.figures import NOT_YET, SHAPES, Best, Figures

FEW = (1, 8, 16)
LAYERS = 32  # of Llama-3.1-8B
MISSED = "missed"
KERNEL = {"bf16": None, "fp8": "sparse"}  # LLMC_ATTNMASK_KERNEL of the served model


@dataclass(frozen=True)
class Target:
    """A row of the table; ``reached`` says "missed" if the target is missed."""

    what: str
    target: str
    reached: Callable[[Figures], str]


def ratios(found: Iterable[Best | None], least: float) -> str:
    """Write the range from the slowest to the fastest case; the slowest decides."""
    cases = list(found)
    known = [case.ratio for case in cases if case is not None]
    if not known:
        return NOT_YET
    text = f"{min(known):.2f} to {max(known):.2f}"
    if len(known) < len(cases):
        text += f" ({len(known)} of {len(cases)} sizes)"
    return _decided(text, min(known) >= least)


def _decided(text: str, enough: bool) -> str:
    return text if enough else f"{text}, {MISSED}"


def decode(dtype: str, least: float) -> Callable[[Figures], str]:
    return lambda figures: ratios(
        (figures.best(shape, dtype, n) for shape in SHAPES[:2] for n in FEW), least
    )


def prefill(dtype: str, least: float) -> Callable[[Figures], str]:
    return lambda figures: ratios(
        (figures.best(shape, dtype, 4096) for shape in SHAPES), least
    )


def slower(figures: Figures) -> str:
    """Name the worst size, and count the sizes that are over 3 % slower than dense."""
    known = [
        (best.ratio, f"{dtype} {shape}, {tokens} tokens: {best.kernel}")
        for shape, dtype, tokens in figures.sizes()
        if (best := figures.best(shape, dtype, tokens))
    ]
    if not known:
        return NOT_YET
    ratio, where = min(known)
    below = sum(ratio < 0.97 for ratio, _ in known)
    text = f"{ratio:.2f} ({where}); {below} of {len(known)} sizes below 0.97"
    return _decided(text, not below)


def against_stock(
    figures: Figures, key: str, dtype: str, **case: Any
) -> tuple[float, str] | None:
    """Return a figure of the served model relative to the stock engine's.

    It is that of the deepest model with both figures; the result names this model.
    """
    case = {"dtype": dtype, **case}
    for setup in figures.setups():
        ours = {"plugin": "on", "kernel": KERNEL[dtype]}
        sparse = figures.last("engine", key, **(case | setup | ours))
        dense = figures.last("engine", key, **(case | setup | {"plugin": "off"}))
        if sparse and dense:
            how = f"{setup['layers']} layers"
            how += ", as installed" if setup["as_installed"] else ""
            return sparse / dense, how
    return None


def memory(dtype: str, most: float) -> Callable[[Figures], str]:
    """Compare the bytes of the linear layers with the stock engine's."""

    def reached(figures: Figures) -> str:
        found = against_stock(figures, "linear_gb", dtype, of="memory")
        if found is None:
            return NOT_YET
        return _decided(f"{found[0]:.3f} ({found[1]})", found[0] <= most)

    return reached


def speed(batch: int, least: float) -> Callable[[Figures], str]:
    """Compare the tokens per second with the stock engine's, in bf16."""

    def reached(figures: Figures) -> str:
        case = {"of": "decode", "batch": batch}
        found = against_stock(figures, "tokens_per_s", "bf16", **case)
        if found is None:
            return NOT_YET
        return _decided(f"{found[0]:.2f} ({found[1]})", found[0] >= least)

    return reached


def pruning(figures: Figures) -> str:
    """Take 32 times the time of the measured layer."""
    case = {"samples": 128, "length": 2048, "width": 4096}
    seconds = figures.last("prune", "seconds_per_layer", **case)
    peak = figures.last("prune", "peak_gb", **case)
    if seconds is None or peak is None:
        return NOT_YET
    minutes = LAYERS * seconds / 60
    text = f"{minutes:.0f} minutes ({seconds:.1f} s a layer), {peak:.1f} GB"
    return _decided(text, minutes <= 20 and peak <= 60)


FP8 = "over dense fp8"
TABLE = (
    Target(
        "decode, 1 to 16 tokens, gate_up and down, bf16 over dense bf16",
        "1.5 x (1.78 is the limit by bytes)",
        decode("bf16", 1.5),
    ),
    Target(f"the same, fp8 {FP8}", "1.3 x (1.6 is the limit)", decode("fp8", 1.3)),
    Target(f"the same, int8 {FP8}", "1.3 x (1.6 is the limit)", decode("int8", 1.3)),
    Target("prefill, 4096 tokens, bf16 over dense bf16", "1.3 x", prefill("bf16", 1.3)),
    Target(f"the same, fp8 {FP8}", "1.4 x", prefill("fp8", 1.4)),
    Target("at any size, slower than dense by at most", "3 % (0.97 x)", slower),
    Target("weights in GPU memory over dense, bf16", "0.58", memory("bf16", 0.58)),
    Target("the same, 8 bits", "0.64", memory("fp8", 0.64)),
    *(
        Target(
            f"tokens per second, whole block 2:4 in bf16, batch {batch}, "
            "over dense in the same vLLM",
            f"{least} x",
            speed(batch, least),
        )
        for batch, least in ((1, 1.35), (16, 1.3), (128, 1.1))
    ),
    Target(
        "pruning Llama-3.1-8B's shapes, 128 x 2048 tokens, most accurate recipe, "
        "from the measured layer",
        "20 minutes, 60 GB",
        pruning,
    ),
)
