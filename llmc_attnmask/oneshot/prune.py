"""Run a recipe on a model and save the result: ``oneshot`` with the checks up front."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import CompressedTensorsConfig

from llmc_attnmask.calibration.micro_batches import share
from llmc_attnmask.calibration.samples import Offload
from llmc_attnmask.calibration.scratch import scratch
from llmc_attnmask.checkpoint.config import Storage
from llmc_attnmask.checkpoint.io.atomic import PROGRESS, check_new, new_folder
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.checkpoint.source import read_config, read_tokenizer
from llmc_attnmask.distributed import (
    barrier,
    is_source,
    process_group,
    rank,
    world_size,
)
from llmc_attnmask.modifiers.base import recipe_storage
from llmc_attnmask.oneshot.recipe import find_recipe, load_recipe
from llmc_attnmask.report.files import save_hook
from llmc_attnmask.report.numbers import versions
from llmc_attnmask.runlog.journal import run_metadata
from llmc_attnmask.runlog.progress import Progress, recorded
from llmc_attnmask.runlog.run import described
from llmc_attnmask.text.dataset import BUILTIN, load_texts
from llmc_attnmask.text.windows import calibration_windows, window_length
from llmc_attnmask.upstream.save import save_as


@process_group()
def prune(
    model: str | Path,
    recipe: str | Path,
    output: str | Path,
    dataset: str = BUILTIN,
    *,
    text_column: str = "text",
    num_samples: int = 128,
    max_length: int | None = None,
    seed: int = 0,
    storage: Storage | None = None,
    offload_activations: Offload | None = None,
    offload_model: Offload = "cpu",
    resume: bool = False,
) -> Path:
    """Apply a recipe to a model and write the checkpoint.

    Processes that torchrun has started share the calibration windows; each returns when
    the checkpoint is there.

    What is done is kept in the output folder, layer by layer, until the checkpoint is
    complete; only then a ``config.json`` is there.

    :param model: local folder or hub name
    :param recipe: YAML file, or the name of a recipe that the package ships; any
        llm-compressor recipe, ours in it or not
    :param output: folder to create; must not exist, or be empty
    :param dataset: calibration text, see ``load_texts``
    :param num_samples: calibration windows, at equal spacing over the text
    :param max_length: tokens per window; by default 2048 or the model's positions
    :param seed: of torch's generator, and of every modifier whose recipe sets none
    :param storage: of the 2:4 layers; by default what the recipe's modifiers ask for,
        or dense
    :param offload_activations: of every modifier that has this field and whose recipe
        does not set it
    :param offload_model: where weights wait for their turn: in memory, or in the
        checkpoint's files and, once they have changed, in TMPDIR or /var/tmp
    :param resume: go on with a run of the same arguments that was cut off, if the
        output folder holds one; the result is the same to the byte
    :return: the output folder
    :raises FileExistsError: if the output folder exists and is not empty
    :raises ProgressError: if it holds the progress of another run
    :raises ValueError: for bad input, before anything is written; ``RecipeError`` and
        ``DatasetError`` are such
    """
    output = Path(output)
    check_new(output, resume)
    if offload_model != "cpu" and world_size() > 1:
        raise ValueError(
            f"offload_model is {offload_model!r} in {world_size()} processes; they "
            'keep the model once, in memory that they share: leave it at "cpu"'
        )
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected at least 1")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed is {seed}; expected at least 0 and less than 2^63")
    recipe = find_recipe(recipe)
    parsed = load_recipe(recipe)
    storage = storage or recipe_storage(parsed.modifiers)
    _set_default(parsed.modifiers, "seed", seed)
    if offload_activations:
        _set_default(parsed.modifiers, "offload_activations", offload_activations)
    tokenizer = read_tokenizer(model)
    config = read_config(model)
    length = window_length(config, max_length)
    windows = calibration_windows(
        load_texts(dataset, text_column), tokenizer, num_samples, length
    )
    fingerprint = _fingerprint(model, config, recipe, windows, seed)
    progress = Progress(output / PROGRESS, fingerprint, parsed.modifiers)
    with _kept(progress), _loaded(model, config, offload_model) as loaded:
        torch.manual_seed(seed)
        run_metadata(loaded).update(
            modifiers=described(parsed.modifiers),
            options={
                "dataset": str(dataset),
                "text_column": text_column,
                "num_samples": len(windows),
                "max_length": length,
                "seed": seed,
                "storage": storage,
            },
        )
        with recorded(progress):
            compress(loaded, tokenizer, parsed.modifiers, windows)
        return save(loaded, tokenizer, output, storage)


def _set_default(modifiers: Iterable[Modifier], field: str, value: object) -> None:
    for modifier in modifiers:
        if hasattr(modifier, field) and field not in modifier.model_fields_set:
            setattr(modifier, field, value)


@contextmanager
def _kept(progress: Progress) -> Iterator[None]:
    """Say, if the run ends early, that what it has done is there."""
    try:
        yield
    except BaseException as error:
        if progress.steps:
            error.add_note(
                f"{progress.steps} finished steps are kept in {progress.folder}: the "
                "same command with --resume goes on from there"
            )
        raise
    finally:
        progress.close()


@contextmanager
def _loaded(
    model: str | Path, config: PreTrainedConfig, offload: Offload
) -> Iterator[PreTrainedModel]:
    """The model; on disk it lasts as long as this does."""
    if offload == "cpu":
        yield load(model, **_dequantized(config))
        return
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{model} is quantized or packed, which cannot be offloaded to disk; load "
            "it into memory, or `llmc-attnmask unpack` it first if it is packed only"
        )
    with tempfile.TemporaryDirectory(
        prefix="offloaded-weights-", dir=scratch()
    ) as folder:
        # accelerate's offloading, of which `oneshot` makes its own
        yield load(
            model,
            device_map={"": "disk"},
            offload_folder=folder,
            offload_buffers=True,
        )


def _fingerprint(
    model: str | Path,
    config: PreTrainedConfig,
    recipe: str | Path,
    windows: Tensor,
    seed: int,
) -> dict[str, str]:
    """What the bytes of the result depend on, but for the machine."""
    weights = sorted(Path(model).glob("*.safetensors"))
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weights]
    return {
        "model": str(Path(model).resolve() if weights else model),
        "revision": str(getattr(config, "_commit_hash", None)),  # of a hub model
        "weights": _digest(repr(files).encode()),
        "config": _digest(config.to_json_string().encode()),
        "recipe": _digest(Path(recipe).read_bytes()),
        "calibration data": _digest(windows.numpy().tobytes()),
        "seed": str(seed),
        "versions": ", ".join(f"{name} {found}" for name, found in versions().items()),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _dequantized(config: PreTrainedConfig) -> dict[str, CompressedTensorsConfig]:
    """Arguments that load a quantized checkpoint as values, which ``oneshot`` does."""
    quantization = getattr(config, "quantization_config", None) or {}
    if not quantization.get("config_groups"):
        return {}
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    modifiers: list,
    windows: Tensor,
) -> None:
    """Run modifiers on a model in memory, calibrated on the windows in their order.

    :param windows: int64 [samples, length]; the same on every rank, if there are
        several, each of which takes its share
    :raises ValueError: if there are fewer windows than ranks
    """
    own = share(len(windows), windows.shape[1], rank(), world_size())
    windows = windows[own]
    samples = [
        {"input_ids": window, "attention_mask": torch.ones_like(window)}
        for window in windows
    ]
    # a loader, as of a data set llm-compressor would sort samples of one length, too
    loader: DataLoader = DataLoader(samples, batch_size=1)  # type: ignore[arg-type]
    oneshot(model=model, tokenizer=tokenizer, dataset=loader, recipe=modifiers)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    storage: Storage = "dense",
) -> Path:
    """Write a checkpoint beside its destination, then rename it into place.

    Of several ranks one does; all return when it is there.
    """
    save_as(model, storage, save_hook)
    if is_source():
        with new_folder(output) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    else:
        model.save_pretrained(output)  # has its share in gathering, and writes nothing
    barrier()
    return output
