"""The commands; each parses its arguments, calls one function and prints the result.

Functions are imported when their command runs, so that ``--help`` takes no time.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from llmc_attnmask.cli import messages, tables
from llmc_attnmask.cli import options as o
from llmc_attnmask.cli.tables import plain

if TYPE_CHECKING:
    from llmc_attnmask.checkpoint.convert import Conversion

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune language models: masks that keep the attention matrix softmax(QK^T), "
    "2:4 checkpoints, reports.",
)
_out = Console()


@app.command()
def prune(
    model: o.Model,
    recipe: o.Recipe,
    output: o.Output,
    dataset: o.Dataset = None,
    text_column: o.TextColumn = "text",
    num_samples: o.NumSamples = 128,
    max_length: o.MaxLength = None,
    dense_share: o.DenseShare = None,
    sparsity: o.Sparsity = None,
    size: o.Size = None,
    loss: o.Loss = None,
    seed: o.Seed = 0,
    storage: o.Storage = None,
    offload_activations: o.OffloadActivations = None,
    offload_model: o.OffloadModel = "cpu",
    resume: o.Resume = False,
) -> None:
    """Apply a recipe, planned first if a budget is given, and write the checkpoint."""
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
            dense_share=dense_share,
            sparsity=sparsity,
            size=size,
            loss=loss,
            seed=seed,
            storage=storage,
            offload_activations=offload_activations,
            offload_model=offload_model,
            resume=resume,
        )
    except KeyboardInterrupt as interrupt:
        messages.interrupted(interrupt)
        raise typer.Exit(130) from None
    if os.environ.get("RANK", "0") == "0":  # this process's number, set by torchrun
        _out.print(plain(f"saved {saved}"), soft_wrap=True)


@app.command()
def plan(
    model: o.Model,
    recipe: o.Recipe,
    output: o.PlanOutput,
    dataset: o.Dataset = None,
    dense_share: o.DenseShare = None,
    sparsity: o.Sparsity = None,
    size: o.Size = None,
    loss: o.Loss = None,
    text_column: o.TextColumn = "text",
    num_samples: o.PlanSamples = 32,
    max_length: o.MaxLength = None,
    seed: o.PlanSeed = 0,
    offload_activations: o.PlanOffload = "cpu",
    resume: o.Resume = False,
    as_json: o.Json = False,
) -> None:
    """Choose how sparse each part of a model becomes; write that as a recipe."""
    from llmc_attnmask.oneshot.plan import plan as run

    try:
        made = run(
            model,
            recipe,
            output,
            dataset,
            dense_share=dense_share,
            sparsity=sparsity,
            size=size,
            loss=loss,
            text_column=text_column,
            num_samples=num_samples,
            max_length=max_length,
            seed=seed,
            offload_activations=offload_activations,
            resume=resume,
        )
    except KeyboardInterrupt as interrupt:
        messages.interrupted(interrupt)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(asdict(made), indent=2, default=str))
        return
    _out.print(tables.groups(made))
    _out.print(tables.curve(made))
    _out.print(plain(f"saved {made.recipe}"), soft_wrap=True)


@app.command(name="eval")
def evaluate(
    models: o.Models,
    reference: o.Reference = None,
    text: o.Text = None,
    text_column: o.TextColumn = "text",
    max_length: o.MaxLength = None,
    no_answers: o.NoAnswers = False,
    tasks: o.Tasks = None,
    include_path: o.IncludePath = None,
    update_report: o.UpdateReport = False,
    as_json: o.Json = False,
) -> None:
    """Measure perplexity and answers, or run tasks, on checkpoints side by side."""
    results: dict[str, list] = {}
    if update_report:
        from llmc_attnmask.report.files import add_evaluation, read
    for model in models if update_report else []:
        if not Path(model).is_dir():
            raise ValueError(
                f"--update-report: {model} is not a folder; expected a checkpoint "
                "folder, whose report can be updated"
            )
        read(Path(model))  # a broken report fails now, not after hours
    if tasks:
        from llmc_attnmask.evaluation.tasks import evaluate_tasks

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        results["tasks"] = evaluate_tasks(models, names, include_path, reference)
    if text or not tasks:
        from llmc_attnmask.evaluation.perplexity import evaluate as run

        text = text or "builtin:pydoc"
        results["perplexity"] = run(
            models, text, max_length, text_column, reference, answers=not no_answers
        )
    if as_json:
        lists = {k: [asdict(x) for x in found] for k, found in results.items()}
        print(json.dumps(lists if tasks else lists["perplexity"], indent=2))
    else:
        if "tasks" in results:
            _out.print(tables.tasks(results["tasks"]))
        if "perplexity" in results:
            title = f"Perplexity on {text}"
            _out.print(
                tables.perplexities(results["perplexity"], title, bool(reference))
            )
    for model in models if update_report else []:
        measured = {
            kind: [x for x in found if x.model in (reference, model)]
            for kind, found in results.items()
        }
        add_evaluation(model, **measured)


@app.command()
def inspect(directory: o.Directory, as_json: o.Json = False) -> None:
    """List the weights of a checkpoint with format, sparsity, 2:4 or not, and size."""
    from llmc_attnmask.checkpoint.inspect import inspect as run

    found = run(directory)
    if as_json:
        print(json.dumps([asdict(layer) for layer in found], indent=2))
    else:
        _out.print(tables.layers(found, str(directory)))


@app.command()
def bench(directory: o.Directory, as_json: o.Json = False) -> None:
    """Time the layers of a sparse checkpoint here, dense and sparse, as vLLM would."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from llmc_attnmask.serving.bench.run import bench as run
    except ModuleNotFoundError as error:
        raise ImportError(
            f"bench needs vLLM, which is not installed here ({error}): run it in the "
            'environment that serves the model, pip install vllm "llmc-attnmask[serve]"'
        ) from None

    found = run(directory)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _out.print(tables.bench(found))


@app.command()
def report(directory: o.Directory, as_json: o.Json = False) -> None:
    """Rewrite report.html, which shows what was pruned and what it cost."""
    from llmc_attnmask.report.files import render
    from llmc_attnmask.report.mark import PAGE

    numbers = render(directory)
    if as_json:
        print(json.dumps(numbers, indent=1))
    else:
        _out.print(f"wrote {directory / PAGE}", soft_wrap=True)


@app.command()
def pack(
    directory: o.DenseDirectory,
    output: o.NewDirectory,
    storage: o.PackedStorage = "sparse-24-bitmask",
    only_2of4: o.Only2Of4 = False,
    as_json: o.Json = False,
) -> None:
    """Store sparse layers without their zeros, byte-exact."""
    from llmc_attnmask.report.conversion import pack as run

    packed = run(directory, output, storage=storage, only_2of4=only_2of4)
    _show_conversion(packed, as_json)


@app.command()
def unpack(
    directory: o.PackedDirectory, output: o.NewDirectory, as_json: o.Json = False
) -> None:
    """Store packed layers dense, byte-exact."""
    from llmc_attnmask.report.conversion import unpack as run

    _show_conversion(run(directory, output), as_json)


def _show_conversion(conversion: "Conversion", as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(conversion), indent=2))
        return
    before, after = conversion.bytes_before / 1e6, conversion.bytes_after / 1e6
    _out.print(
        f"saved {plain(conversion.output)}: {len(conversion.layers)} layers, "
        f"{before:.1f} MB -> {after:.1f} MB",
        soft_wrap=True,
        highlight=False,
    )
