"""Write what one of several ranks found, as JSON: torchrun ranks.py FOLDER."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from transformers import AutoModelForCausalLM

from llmc_attnmask import (
    ActivationSmoothingModifier,
    ALPSPruningModifier,
    AttentionMatrixPruningModifier,
    MaskedRecoveryModifier,
)
from llmc_attnmask.calibration.micro_batches import share
from llmc_attnmask.distributed import (
    all_sum,
    process_group,
    rank,
    reached,
    send_from,
    world_size,
    write_parameter,
)
from llmc_attnmask.evaluation.perplexity import load_model
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.recovery.error import OutputError
from tests.support.blocks import case_of, with_massive_channel

TWO_OF_FOUR = {"sparsity": 0.5, "mask_structure": "2:4"}


def refused(modifier) -> tuple[str, int]:
    """Return why one dataset on every rank is refused, and how many hooks are left."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")
    tokens = torch.arange(4 * 16).view(4, 16) + 10
    try:
        oneshot(
            model=model,
            dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
            recipe=[modifier],
            num_calibration_samples=4,
            shuffle_calibration_samples=False,
        )
    except ValueError as error:
        return str(error), sum(len(m._forward_pre_hooks) for m in model.modules())
    return "nothing was refused", 0


def channel_weights() -> list[float]:
    """Return the weights of a block's channels, from samples that the ranks share."""
    tokens = torch.arange(18 * 32).view(18, 32) % 200
    samples = share(18, 32, rank(), world_size())
    pair = case_of(load_model(MODEL_DIR), tokens[samples])
    return OutputError(with_massive_channel(pair, samples)).weights.tolist()


def main(folder: Path) -> None:
    found: dict[str, object] = {}
    with process_group():
        modifiers = {
            "attention": AttentionMatrixPruningModifier(steps=2, **TWO_OF_FOUR),
            "alps": ALPSPruningModifier(**TWO_OF_FOUR),
            "recovery": MaskedRecoveryModifier(steps=1),
            "smoothing": ActivationSmoothingModifier(),
            "sparsegpt": SparseGPTModifier(**TWO_OF_FOUR, targets=["Linear"]),
            "wanda": WandaPruningModifier(**TWO_OF_FOUR, targets=["Linear"]),
        }
        for name, modifier in modifiers.items():
            found[name], found[f"{name} hooks"] = refused(modifier)
        try:
            reached(["a", "b"] if rank() == 0 else ["a"])
        except ValueError as error:
            found["reached"] = str(error)
        found["channels"] = channel_weights()
        own = torch.full((2,), float(rank()))
        found["sum"] = all_sum([own.double() + 1])[0].tolist()
        found["sent"] = [send_from(1, own).tolist(), own.tolist()]
        linear = torch.nn.Linear(1, 2, bias=False)
        write_parameter(linear, "weight", torch.full((2, 1), 7.0 + rank()))
        found["written"] = linear.weight.flatten().tolist()
    (folder / f"{found['sent'][1][0]:.0f}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
