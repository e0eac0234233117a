"""Arguments and options of the commands, with their help texts."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

# prune
Model = Annotated[str, Argument(help="Model folder, or name on the Hub.")]
Recipe = Annotated[
    Path, Option(help="Recipe in YAML, or the name of one that the package ships.")
]
Output = Annotated[Path, Option(help="Folder to create for the checkpoint.")]
Dataset = Annotated[
    list[str] | None,
    Option(
        help="Calibration data: builtin:self (the model's own answers), builtin:pydoc, "
        "a .jsonl or text file, or a dataset on the Hub. Several share the windows "
        "evenly. By default builtin:self and builtin:pydoc, or only the latter if the "
        "model has no chat template."
    ),
]
TextColumn = Annotated[str, Option(help="Column that holds the text.")]
NumSamples = Annotated[int, Option(help="Number of calibration windows.")]
MaxLength = Annotated[
    int | None,
    Option(
        help="Tokens per window; by default 2048, or the model's limit if that is less."
    ),
]
Seed = Annotated[
    int,
    Option(help="Seed for builtin:self and for modifiers whose recipe sets none."),
]
Storage = Annotated[
    Literal["dense", "sparse-24-bitmask", "sparse-bitmask"] | None,
    Option(
        help="Storage of 2:4 layers, or with sparse-bitmask of all sparse ones; by "
        "default what the recipe asks for, or dense."
    ),
]
PackedStorage = Annotated[
    Literal["sparse-24-bitmask", "sparse-bitmask"],
    Option(
        "--storage",
        help="sparse-24-bitmask holds layers that are 2:4; sparse-bitmask holds layers "
        "with zeros anywhere.",
    ),
]
OffloadActivations = Annotated[
    Literal["cpu", "disk"] | None,
    Option(
        help="Where calibration activations are kept, for modifiers whose recipe does "
        "not say; by default cpu."
    ),
]
OffloadModel = Annotated[
    Literal["cpu", "disk"], Option(help="Where weights are kept until used.")
]
Resume = Annotated[
    bool, Option("--resume", help="Continue a run that was interrupted.")
]

# plan
PlanOutput = Annotated[Path, Option(help="Recipe to create.")]
DenseShare = Annotated[
    float | None, Option(help="Budget: share of the weights that stay dense.")
]
Sparsity = Annotated[
    float | None, Option(help="Budget: share of all weights that is pruned.")
]
Size = Annotated[
    float | None,
    Option(help="Budget: bytes of the weights, packed, over those of the dense ones."),
]
Loss = Annotated[
    float | None,
    Option(help="Budget: expected rise of the perplexity, 0.05 for 5 %."),
]
PlanSamples = Annotated[
    int, Option(help="Number of windows to prune on; 8 more measure the loss.")
]
PlanSeed = Annotated[int, Option(help="Seed for builtin:self.")]
PlanOffload = Annotated[
    Literal["cpu", "disk"], Option(help="Where calibration activations are kept.")
]

# eval
Models = Annotated[list[str], Argument(help="Checkpoints to evaluate.")]
Reference = Annotated[
    str | None, Option(help="Dense model to compare the checkpoints with.")
]
Text = Annotated[
    str | None,
    Option(
        help="Evaluation text: builtin:pydoc, a .jsonl or text file, or a dataset on "
        "the Hub; by default builtin:pydoc, or none with --tasks."
    ),
]
NoAnswers = Annotated[
    bool,
    Option(
        "--no-answers",
        help="Do not compare the checkpoints with the reference's own answers, which "
        "takes a reference with a chat template.",
    ),
]
Tasks = Annotated[
    str | None,
    Option(help="Tasks of lm-evaluation-harness, separated by commas."),
]
IncludePath = Annotated[
    Path | None, Option(help="Folder with tasks of your own, in YAML.")
]
UpdateReport = Annotated[
    bool,
    Option(
        "--update-report",
        help="Add the results to the report and the model card in each folder.",
    ),
]

# inspect, report, pack, unpack
Directory = Annotated[Path, Argument(help="Checkpoint folder.")]
DenseDirectory = Annotated[Path, Argument(help="Checkpoint folder, stored dense.")]
PackedDirectory = Annotated[Path, Argument(help="Checkpoint folder, stored packed.")]
NewDirectory = Annotated[Path, Argument(help="Folder to create.")]
Only2Of4 = Annotated[
    bool,
    Option("--only-2of4", help="Pack the layers that are 2:4; leave the others dense."),
]
Json = Annotated[bool, Option("--json", help="Print JSON instead of a table.")]
