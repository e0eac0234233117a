"""Run a recipe on a model and save the result: ``oneshot`` with the checks up front."""

from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import CompressedTensorsConfig

from llmc_attnmask.checkpoint.atomic import check_new, new_folder
from llmc_attnmask.checkpoint.config import Storage
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.checkpoint.save import save_as
from llmc_attnmask.data import BUILTIN, calibration_windows, load_texts
from llmc_attnmask.evaluation import window_length
from llmc_attnmask.modifiers.storage import recipe_storage
from llmc_attnmask.recipe import load_recipe


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
) -> Path:
    """Apply a recipe to a model and write the checkpoint.

    The output folder appears only when everything in it is complete.

    :param model: local folder or hub name
    :param recipe: YAML file; any llm-compressor recipe, ours in it or not
    :param output: folder to create; must not exist, or be empty
    :param dataset: calibration text, see ``load_texts``
    :param num_samples: calibration windows, at equal spacing over the text
    :param max_length: tokens per window; by default 2048 or the model's positions
    :param seed: of torch's generator, and of every modifier whose recipe sets none
    :param storage: of the 2:4 layers; by default what the recipe's modifiers ask for,
        or dense
    :return: the output folder
    :raises FileExistsError: if the output folder exists and is not empty
    :raises RecipeError, DatasetError, ValueError: for bad input, before anything is
        written
    """
    output = Path(output)
    check_new(output)
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected at least 1")
    parsed = load_recipe(recipe)
    storage = storage or recipe_storage(parsed.modifiers)
    for modifier in parsed.modifiers:
        if hasattr(modifier, "seed") and "seed" not in modifier.model_fields_set:
            modifier.seed = seed
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = AutoConfig.from_pretrained(model)
    length = window_length(config, max_length)
    windows = calibration_windows(
        load_texts(dataset, text_column), tokenizer, num_samples, length
    )
    loaded = load(model, **_dequantized(config))
    torch.manual_seed(seed)
    compress(loaded, tokenizer, parsed.modifiers, windows)
    return save(loaded, tokenizer, output, storage)


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

    :param windows: int64 [samples, length]
    """
    samples = Dataset.from_dict(
        {
            "input_ids": windows.tolist(),
            "attention_mask": torch.ones_like(windows).tolist(),
        }
    )
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=samples,
        recipe=modifiers,
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    storage: Storage = "dense",
) -> Path:
    """Write a checkpoint beside its destination, then rename it into place."""
    save_as(model, storage)
    with new_folder(output) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return output
