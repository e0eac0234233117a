"""The command ``llmc-attnmask``: parse, call, print."""

import json
import os
import signal
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from llmc_attnmask.checkpoint.convert import Conversion
    from llmc_attnmask.evaluation.perplexity import Evaluation
    from llmc_attnmask.evaluation.tasks import TaskResult

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune a language model's attention by learning the masks that keep "
    "softmax(QK^T).",
)
_out = Console()
_err = Console(stderr=True)

DatasetOption = Annotated[
    str,
    typer.Option(
        help="Calibration text: builtin:pydoc, a .jsonl or text file, or a hub dataset."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    recipe: Annotated[Path, typer.Option(help="YAML file, or a shipped one.")],
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    dataset: DatasetOption = "builtin:pydoc",
    text_column: Annotated[str, typer.Option(help="Key of the text.")] = "text",
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per window. [default: 2048 or the model's positions]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Where the recipe sets none.")] = 0,
    storage: Annotated[
        Literal["dense", "sparse-24-bitmask"] | None,
        typer.Option(help="Of 2:4 layers. [default: the recipe's, or dense]"),
    ] = None,
    offload_activations: Annotated[
        Literal["cpu", "disk"] | None,
        typer.Option(help="Where the recipe sets none. [default: cpu]"),
    ] = None,
    offload_model: Annotated[
        Literal["cpu", "disk"], typer.Option(help="Where weights wait for their turn.")
    ] = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was cut off.")
    ] = False,
) -> None:
    """Apply a recipe to a model and write the checkpoint."""
    from llmc_attnmask.oneshot.prune import prune as run

    try:
        saved = run(
            model,
            recipe,
            output,
            dataset,
            text_column=text_column,
            num_samples=num_samples,
            max_length=max_length,
            seed=seed,
            storage=storage,
            offload_activations=offload_activations,
            offload_model=offload_model,
            resume=resume,
        )
    except KeyboardInterrupt as interrupt:
        if _speaks():
            _err.print(_plain("interrupted" + _notes(interrupt)), soft_wrap=True)
        raise typer.Exit(130) from None
    if os.environ.get("RANK", "0") == "0":  # torchrun's number of this process
        _out.print(_plain(f"saved {saved}"), soft_wrap=True)


@app.command(name="eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints to compare.")],
    reference: Annotated[
        str | None, typer.Option(help="Dense model to compare with.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="builtin:pydoc, a .jsonl or text file, or a hub dataset. "
            "[default: builtin:pydoc, or none with --tasks]"
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Key of the text.")] = "text",
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per window. [default: 2048 or the model's positions]"
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Of lm-evaluation-harness, separated by commas."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of further tasks, in YAML.")
    ] = None,
    update_report: Annotated[
        bool,
        typer.Option(
            "--update-report",
            help="Add the figures to the report and model card in each folder.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Perplexity over non-overlapping windows, or tasks, side by side."""
    figures: dict[str, list] = {}
    if update_report:
        from llmc_attnmask.report.files import add_evaluation, read
    for model in models if update_report else []:
        if not Path(model).is_dir():
            raise ValueError(f"--update-report: {model} is no folder with a report")
        read(Path(model))  # fails now, if at all, and not after hours
    if tasks:
        from llmc_attnmask.evaluation.tasks import evaluate_tasks

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        figures["tasks"] = evaluate_tasks(models, names, include_path, reference)
    if text or not tasks:
        from llmc_attnmask.evaluation.perplexity import evaluate as run

        text = text or "builtin:pydoc"
        compared = [*([reference] if reference else []), *models]
        figures["perplexity"] = run(compared, text, max_length, text_column)
    if as_json:
        lists = {k: [asdict(x) for x in found] for k, found in figures.items()}
        print(json.dumps(lists if tasks else lists["perplexity"], indent=2))
    else:
        if "tasks" in figures:
            _out.print(_task_table(figures["tasks"]))
        if "perplexity" in figures:
            title = f"Perplexity on {text}"
            _out.print(_perplexity_table(figures["perplexity"], title, bool(reference)))
    for model in models if update_report else []:
        measured = {
            kind: [x for x in found if x.model in (reference, model)]
            for kind, found in figures.items()
        }
        add_evaluation(model, **measured)


def _perplexity_table(results: "list[Evaluation]", title: str, compare: bool) -> Table:
    table = Table(title=_plain(title))
    for column in ("model", "perplexity", "to reference", "windows", "tokens", "bos"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for result in results:
        ratio = result.perplexity / results[0].perplexity if compare else None
        table.add_row(
            _plain(result.model),
            f"{result.perplexity:.3f}",
            f"{ratio:.3f} x" if ratio else "",
            f"{result.windows} x {result.window_length}",
            str(result.tokens),
            _plain(result.bos),
        )
    return table


def _task_table(results: "list[TaskResult]") -> Table:
    """A row per metric, a column per model."""
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
        table.add_column(_plain(model), justify="right")
    for key, cells in rows.items():
        table.add_row(*key, *(cells.get(model, "") for model in models))
    return table


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    as_json: JsonOption = False,
) -> None:
    """Per layer: format, sparsity, 2:4 or not, size on disk."""
    from llmc_attnmask.checkpoint.inspect import inspect as run

    layers = run(directory)
    if as_json:
        print(json.dumps([asdict(layer) for layer in layers], indent=2))
        return
    table = Table(title=_plain(str(directory)))
    for column in ("layer", "format", "shape", "zeros", "2:4", "MB"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in layers:
        table.add_row(
            _plain(layer.name),
            layer.format,
            " x ".join(map(str, layer.shape)),
            "" if layer.sparsity is None else f"{layer.sparsity:.4f}",
            "" if layer.two_of_four is None else "yes" if layer.two_of_four else "no",
            f"{layer.bytes / 1e6:.3f}",
        )
    _out.print(table)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    as_json: JsonOption = False,
) -> None:
    """Write report.html anew: what was pruned, what it cost, plots."""
    from llmc_attnmask.report.files import render
    from llmc_attnmask.report.mark import PAGE

    numbers = render(directory)
    if as_json:
        print(json.dumps(numbers, indent=1))
        return
    _out.print(f"wrote {directory / PAGE}", soft_wrap=True)


OutputArgument = Annotated[Path, typer.Argument(help="Folder to create.")]


@app.command()
def pack(
    directory: Annotated[Path, typer.Argument(help="Dense-stored checkpoint folder.")],
    output: OutputArgument,
    only_2of4: Annotated[
        bool,
        typer.Option(
            "--only-2of4", help="Pack what is 2:4 and leave the other layers dense."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Store 2:4 layers as sparse-24-bitmask, byte-exact."""
    from llmc_attnmask.report.conversion import pack as run

    _show_conversion(run(directory, output, only_2of4=only_2of4), as_json)


@app.command()
def unpack(
    directory: Annotated[Path, typer.Argument(help="Packed checkpoint folder.")],
    output: OutputArgument,
    as_json: JsonOption = False,
) -> None:
    """Store sparse-24-bitmask layers dense, byte-exact."""
    from llmc_attnmask.report.conversion import unpack as run

    _show_conversion(run(directory, output), as_json)


def _show_conversion(conversion: "Conversion", as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(conversion), indent=2))
        return
    before, after = conversion.bytes_before / 1e6, conversion.bytes_after / 1e6
    _out.print(
        f"saved {_plain(conversion.output)}: {len(conversion.layers)} layers, "
        f"{before:.1f} MB -> {after:.1f} MB",
        soft_wrap=True,
        highlight=False,
    )


def _plain(text: str) -> str:
    """Text that may be somebody else's, for a terminal: no markup, no control codes."""
    shown = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    return escape("".join(shown))


def _one_line(message: Warning | str, category: type[Warning], *_: Any) -> str:
    return f"{category.__name__}: {message}\n"


def main() -> None:
    """Exit code 0, 1 with one line on stderr, 2 for wrong usage, 130 if interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.formatwarning = _one_line  # type: ignore[assignment]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, _stopped)
    try:
        app()
    except Exception as error:
        if os.environ.get("LLMC_ATTNMASK_TRACEBACK"):
            raise
        expected = isinstance(error, OSError | ValueError | ImportError)
        kind = "" if expected else f"{type(error).__name__}: "
        hint = "" if expected else " (LLMC_ATTNMASK_TRACEBACK=1 shows where)"
        message = _plain(f"{kind}{error}{hint}{_notes(error)}")
        if _speaks():
            _err.print(f"[red]error:[/red] {message}", soft_wrap=True, highlight=False)
        sys.exit(1)


def _speaks() -> bool:
    """Whether this process says how the run ends: of several, the first that fails."""
    distributed = sys.modules.get("llmc_attnmask.distributed")
    return distributed is None or distributed.first_to_report()


def _stopped(*_: Any) -> NoReturn:
    raise ChildProcessError(
        "stopped by torchrun, as it does when another process has ended or failed"
    )


def _notes(error: BaseException) -> str:
    return "".join(f"; {note}" for note in getattr(error, "__notes__", []))


if __name__ == "__main__":
    main()
