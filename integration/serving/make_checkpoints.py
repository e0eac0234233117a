"""Prune and quantize the shipped model, for the serving tests; runs in .venv.

    python integration/serving/make_checkpoints.py OUT

OUT gets the folders NAME-dense and NAME-packed for bf16, int8 and fp8, with the whole
decoder at 2:4; planned, with some groups dense; mixed, with only q and k; and biased, a
random Qwen2 whose q, k and v have biases. It also gets unstructured-dense and
unstructured-int8-dense, with 60 % of the decoder pruned, and adapter, a LoRA adapter.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llmc_attnmask.checkpoint.config import packed_config
from llmc_attnmask.checkpoint.convert import to_dense, to_packed
from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask, sparse_bitmask
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.planned_recipe import PlannedRecipe
from llmc_attnmask.oneshot.prune import save
from llmc_attnmask.oneshot.recipe import load_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.text.dataset import BUILTIN, load_texts
from llmc_attnmask.text.windows import calibration_windows

BLOCK = "re:.*_proj$"
RANK = 8
ATTENTION = "re:.*(q|k)_proj$"
TEMPLATE = f"""
prune_stage:
  pruning_modifiers:
    WandaPruningModifier: {{sparsity: 0.5, mask_structure: "2:4", targets: ["{BLOCK}"]}}
"""


def shipped() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")


def biased(folder: Path) -> PreTrainedModel:
    """Make a random Qwen2 with two layers, four query and two key-value heads.

    It has the shipped model's vocabulary.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    # llm-compressor saves only models loaded from a folder
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def make_unstructured(out: Path, name: str, quantization: list) -> None:
    """Write NAME-dense and NAME-packed, whose layers have densities of their own."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    windows = calibration_windows(load_texts(BUILTIN), tokenizer, 4, 128)
    model = shipped()
    modifiers = [
        WandaPruningModifier(sparsity=share, mask_structure="0:0", targets=[targets])
        for share, targets in (
            (0.6, "re:.*(q|o|gate|up)_proj"),
            (0.4, "re:.*down_proj"),
        )
    ]
    compress(model, tokenizer, [*modifiers, *quantization], windows)
    dense = save(model, tokenizer, out / f"{name}-dense")
    to_packed(dense, out / f"{name}-packed", storage=sparse_bitmask.NAME)


def make_adapter(folder: Path) -> None:
    """Write a random LoRA adapter of every q and v projection of the shipped model."""
    config = AutoConfig.from_pretrained(MODEL_DIR)
    torch.manual_seed(0)
    heads = {
        "q_proj": config.num_attention_heads,
        "v_proj": config.num_key_value_heads,
    }
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, number in heads.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            rows = number * config.head_dim
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, config.hidden_size)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK) / RANK
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(heads),
    }
    (folder / "adapter_config.json").write_text(json.dumps(description))


def make(out: Path, name: str, model: PreTrainedModel, modifiers: list) -> None:
    """Write NAME-packed and NAME-dense, the latter with the marker in config.json."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    windows = calibration_windows(load_texts(BUILTIN), tokenizer, 4, 128)
    compress(model, tokenizer, modifiers, windows)
    pruned = save(model, tokenizer, out / name)
    packed = out / f"{name}-packed"
    if name == "mixed":  # which `pack` leaves dense
        pack_each(pruned, packed)
    else:
        to_packed(pruned, packed)
    to_dense(packed, out / f"{name}-dense")


def pack_each(directory: Path, output: Path) -> None:
    """Pack every 2:4 layer, even if a server fuses it with one that is not 2:4."""
    shutil.copytree(directory, output)
    tensors = load_file(output / "model.safetensors")
    config = json.loads((output / "config.json").read_text())
    targets = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith("_proj.weight")
        and not sparse_24_bitmask.crowded_groups(tensor)
    ]
    for target in targets:
        parts = sparse_24_bitmask.pack(tensors.pop(f"{target}.weight"))._asdict()
        tensors.update({f"{target}.{part}": parts[part] for part in parts})
    (output / "config.json").write_text(
        json.dumps(packed_config(config, sparse_24_bitmask.NAME, targets, 0.1))
    )
    save_file(tensors, output / "model.safetensors", {"format": "pt"})


def wanda(target: str) -> WandaPruningModifier:
    return WandaPruningModifier(sparsity=0.5, mask_structure="2:4", targets=[target])


def quantization(scheme: str) -> QuantizationModifier:
    return QuantizationModifier(
        scheme=scheme, targets=["Linear"], ignore=["re:.*lm_head"]
    )


def planned(folder: Path) -> list:
    """Return what prunes all but a part of some layers, as a plan writes it."""
    template = folder / "template.yaml"
    template.write_text(TEMPLATE, encoding="utf-8")
    recipe = PlannedRecipe(template)
    model = shipped()
    groups = recipe.groups(model)
    dense = [g for g in groups if g.endswith(("0.self_attn.o_proj", "2.mlp.down_proj"))]
    sparsities = {group: 0.0 if group in dense else 0.5 for group in groups}
    recipe.write(folder / "planned.yaml", model, groups, sparsities, {})
    return load_recipe(folder / "planned.yaml").modifiers


def main() -> None:
    out = Path(sys.argv[1])
    make(out, "bf16", shipped(), [wanda(BLOCK)])
    make(out, "int8", shipped(), [wanda(BLOCK), quantization("W8A8")])
    make(out, "fp8", shipped(), [wanda(BLOCK), quantization("FP8_DYNAMIC")])
    make_unstructured(out, "unstructured", [])
    make_unstructured(out, "unstructured-int8", [quantization("W8A8")])
    make(out, "planned", shipped(), planned(out))
    make(out, "mixed", shipped(), [wanda(ATTENTION)])
    make_adapter(out / "adapter")
    make(out, "biased", biased(out / "random"), [wanda(BLOCK)])


if __name__ == "__main__":
    main()
