"""The tables that commands print."""

from itertools import takewhile
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from llmc_attnmask.checkpoint.inspect import LayerInfo
    from llmc_attnmask.evaluation.perplexity import Evaluation
    from llmc_attnmask.evaluation.tasks import TaskResult
    from llmc_attnmask.oneshot.plan import Plan
    from llmc_attnmask.serving.bench.result import Bench, Kind


def perplexities(results: "list[Evaluation]", title: str, compare: bool) -> Table:
    """Make a table with a row per model.

    The last columns compare with the reference on its own answers, if that was done.

    :param compare: whether the first model is the reference
    """
    table = Table(title=plain(title))
    columns = ["model", "perplexity", "to reference", "windows", "tokens", "bos"]
    answers = any(result.answers for result in results)
    if answers:
        columns += ["KL on answers", "agreement"]
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for result in results:
        ratio = result.perplexity / results[0].perplexity if compare else None
        own = result.answers
        table.add_row(
            plain(result.model),
            f"{result.perplexity:.3f}",
            f"{ratio:.3f} x" if ratio else "",
            f"{result.windows} x {result.window_length}",
            str(result.tokens),
            plain(result.bos),
            *([f"{own.kl:.4f}", f"{own.agreement:.1%}"] if own else []),
        )
    return table


def tasks(results: "list[TaskResult]") -> Table:
    """Make a table with a row per metric and a column per model."""
    table = Table(title="Tasks, with recovery of the reference")
    for column in ("task", "metric", "samples"):
        table.add_column(column)
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for result in results:
        samples = "" if result.samples is None else str(result.samples)
        cell = f"{result.value:.4f}"
        if result.stderr is not None:
            cell += f" ± {result.stderr:.4f}"
        if result.recovery is not None:
            cell += f" ({result.recovery:.1f} %)"
        row = rows.setdefault((result.task, result.metric, samples), {})
        row[result.model] = cell
    models = list(dict.fromkeys(result.model for result in results))
    for model in models:
        table.add_column(plain(model), justify="right")
    for key, cells in rows.items():
        table.add_row(*key, *(cells.get(model, "") for model in models))
    return table


def layers(found: "list[LayerInfo]", title: str) -> Table:
    """Make a table with a row per weight matrix."""
    table = Table(title=plain(title))
    for column in ("layer", "format", "shape", "zeros", "2:4", "MB"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in found:
        table.add_row(
            plain(layer.name),
            layer.format,
            " x ".join(map(str, layer.shape)),
            "" if layer.sparsity is None else f"{layer.sparsity:.4f}",
            "" if layer.two_of_four is None else "yes" if layer.two_of_four else "no",
            f"{layer.bytes / 1e6:.3f}",
        )
    return table


_LATE = "If the recipe recovers, costs of late layers count for more in the choice."


def groups(plan: "Plan") -> Table:
    """Make a table with a row per group of a plan, in model order."""
    parts = zip(*(group.split(".") for group in plan.costs), strict=False)
    alike = takewhile(lambda part: len(set(part)) == 1, parts)
    common = ".".join(part[0] for part in alike)  # such as model.layers
    table = Table(
        title=f"Groups of weights in {plain(common)}",
        caption=f"cost: nats per token, alone. {_LATE}",
    )
    table.add_column("group")
    levels = sorted({level for of in plan.costs.values() for level in of})
    for column in ("weights", *(f"cost at {level:g}" for level in levels), "choice"):
        table.add_column(column, justify="right")
    for group, costs in plan.costs.items():
        sparsity = plan.chosen.sparsities[group]
        table.add_row(
            plain(group.removeprefix(f"{common}.")),
            f"{plan.entries[group]:,}",
            *(f"{costs[level]:.5f}" for level in levels),
            f"{sparsity:.0%}" if sparsity else "dense",
        )
    return table


def curve(plan: "Plan") -> Table:
    """Make a table of the points of a plan's trade-off, the chosen one marked."""
    table = Table(
        title="Size against loss",
        caption="size: of the weights, packed, over dense. Loss: KL divergence in nats "
        "per token, pruned by SparseGPT: added up, and of all groups together. On "
        f"a few blocks, the recipe has left {plan.left:.0%} of it, from which the "
        f"perplexity after the recipe is expected. {_LATE}",
    )
    for column in (
        "",
        "size",
        "dense",
        "pruned",
        "loss, added up",
        "together",
        "perplexity",
    ):
        table.add_column(column, justify="right")
    for point in plan.curve:
        table.add_row(
            "chosen" if point is plan.chosen else "",
            f"{point.size:.3f}",
            f"{point.dense_share:.1%}",
            f"{point.sparsity:.1%}",
            f"{point.predicted:.4f}",
            f"{point.measured:.4f}",
            f"{point.expected:+.1%}",
        )
    return table


def bench(found: "Bench") -> Table:
    """Make a table with a row per kind of layer, and one for all of them."""
    table = Table(
        title=plain(f"{found.model} on {found.machine}"),
        caption=plain(
            "Milliseconds of one step. dense: what vLLM uses here if layers are not "
            f"sparse, {found.rival} of version {found.vllm}. Attention, norms and "
            "communication are not included"
            + f", nor are {found.left_out} Linears of experts"
            * bool(found.left_out)
        ),
        show_lines=True,
    )
    for column in ("layers", "MB", "tokens", "dense", "sparse", "ratio"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for kind in found.kinds:
        described = [
            f"{kind.layers} x {kind.name}, {kind.rows} x {kind.columns}",
            f"{kind.zeros:.0%} zeros, stored {kind.storage}",
            f"{kind.kernel}: {kind.reason}",
        ]
        _add_times(table, described, kind)
    _add_times(table, ["all"], found)
    return table


def _add_times(table: Table, described: list[str], of: "Kind | Bench") -> None:
    sizes = (f"{size / 1e6:.1f}" for size in (of.dense_bytes, of.sparse_bytes))
    table.add_row(
        plain("\n".join(described)),
        "\n".join(sizes),
        "\n".join(str(time.tokens) for time in of.times),
        "\n".join(f"{time.dense_ms:.3f}" for time in of.times),
        "\n".join(f"{time.sparse_ms:.3f}" for time in of.times),
        "\n".join(f"{time.ratio:.2f} x" for time in of.times),
    )


def plain(text: str) -> str:
    """Make any text safe for a terminal: without markup and control codes."""
    shown = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    return escape("".join(shown))
