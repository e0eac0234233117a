"""Measure the peak memory of ``llmc-attnmask prune`` on a 2.5 GB model, under a limit.

    python integration/benchmarks/memory.py [--limit 6] [--out memory.json]

It writes a random Llama in bfloat16, layer by layer, and prunes it in a process whose
address space is limited as by ``ulimit -v 6291456``. There are two recipes: ``light``
prunes q and k and leaves survivors as they are; ``block`` prunes every Linear and
recovers one block, whose memory is free again afterwards. Both take few steps and
samples, because steps cost time but no memory. Model and calibration activations are in
memory or on disk. Printed for each process, in MB:

- resident: the peak of what was in memory, including files mapped from disk
- anonymous: the same without those files, which the system can drop at any time
- address space: what the limit counts; the first line shows what imports alone take
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmc_attnmask.oneshot.shipped import MODEL_DIR

RECIPES = {
    "light": """
prune_stage:
  attention_modifiers:
    AttentionMatrixPruningModifier: {sparsity: 0.5, mask_structure: "2:4", steps: 2}
""",
    "block": """
prune_stage:
  attention_modifiers:
    AttentionMatrixPruningModifier: {sparsity: 0.5, mask_structure: "2:4", steps: 0}
  rest_modifiers:
    WandaPruningModifier:
      {sparsity: 0.5, mask_structure: "2:4", targets: ["re:.*(v|o|gate|up|down)_proj$"]}
  recovery_modifiers:
    MaskedRecoveryModifier: {steps: 2, targets: ["re:.*layers.1$"]}
""",
}
_FIELDS = {"VmHWM": "resident", "RssAnon": "anonymous", "VmPeak": "address_space"}


@dataclass
class Result:
    """The result of one process; memory in bytes."""

    recipe: str
    model: str
    activations: str
    exit_code: int
    seconds: float
    resident: int = 0
    anonymous: int = 0
    address_space: int = 0


def synthesize(directory: Path, layers: int, hidden: int, intermediate: int) -> int:
    """Write a random Llama, one file per layer, with the shipped model's tokenizer.

    :return: bytes of its weights
    """
    directory.mkdir()
    for path in MODEL_DIR.glob("tokenizer*"):
        shutil.copyfile(path, directory / path.name)
    config = LlamaConfig.from_pretrained(
        MODEL_DIR,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        head_dim=128,
    )
    config.save_pretrained(directory)
    # Reading anything from a file while weights are on disk maps the whole file.
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        layer = re.search(r"layers\.(\d+).*_proj", name)
        file = f"model-{layer[1] if layer else 'rest'}.safetensors"
        files.setdefault(file, {})[name] = shape
    weight_map: dict[str, str] = {}
    for file, tensors in files.items():
        values = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, generator=generator) * 0.02).bfloat16()
            for name, shape in tensors.items()
        }
        save_file(values, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def measure(
    command: list[str], limit: int, log: Path
) -> tuple[int, float, dict[str, int]]:
    """Run a command in an address space limited to this many bytes.

    :return: exit code, seconds, peaks in bytes
    """

    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    # arenas of threads that never allocate reserve 64 MB of address space each
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    peaks = dict.fromkeys(_FIELDS.values(), 0)
    start = time.perf_counter()
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdout=output, stderr=output, preexec_fn=limited, env=environment
        ) as process,
    ):
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for field, kilobytes in re.findall(
                r"(\w+):\s+(\d+) kB", status.read_text()
            ):
                if name := _FIELDS.get(field):
                    peaks[name] = max(peaks[name], int(kilobytes) * 1024)
            time.sleep(0.05)
    return process.returncode, time.perf_counter() - start, peaks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=6.0, help="GiB; 0 for no limit")
    parser.add_argument("--layers", type=int, default=35)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument(
        "--places",
        nargs="+",
        default=["cpu/cpu", "cpu/disk", "disk/disk"],
        help="where model/activations are kept",
    )
    parser.add_argument("--folder", type=Path, help="where to write. [default: TMPDIR]")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    limit = int(args.limit * 2**30)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        dense = Path(folder) / "dense"
        size = synthesize(dense, args.layers, args.hidden, args.intermediate)
        print(f"model: {size / 1e9:.3f} GB, limit: {args.limit} GiB")
        print(f"imports: {_imports(limit, Path(folder))}")
        for name in args.recipes:
            recipe = Path(folder) / f"{name}.yaml"
            recipe.write_text(RECIPES[name])
            for place in args.places:
                model, activations = place.split("/")
                output, log = Path(folder) / "pruned", Path(folder) / "log"
                command = [sys.executable, "-m", "llmc_attnmask", "prune"]
                command += [str(dense), "--recipe", str(recipe)]
                command += ["--output", str(output), "--offload-model", model]
                command += ["--offload-activations", activations]
                command += ["--num-samples", str(args.samples)]
                command += ["--max-length", str(args.length)]
                done = measure(command, limit, log)
                results.append(Result(name, model, activations, *done[:2], **done[2]))
                print(_line(results[-1]), flush=True)
                if done[0]:
                    print(log.read_text()[-2000:])
                shutil.rmtree(output, ignore_errors=True)
    if args.out:
        figures = {"model": size, "limit": limit, "runs": map(asdict, results)}
        args.out.write_text(json.dumps(figures, indent=2, default=list))
    if any(result.exit_code for result in results):
        sys.exit(1)


def _imports(limit: int, folder: Path) -> str:
    """Return the peaks of a process that only imports what pruning imports."""
    command = [sys.executable, "-c", "import llmc_attnmask.oneshot.prune"]
    *_, peaks = measure(command, limit, folder / "log")
    return ", ".join(f"{name} {value / 1e6:.0f}" for name, value in peaks.items())


def _line(result: Result) -> str:
    outcome = "finished" if not result.exit_code else f"exit code {result.exit_code}"
    return (
        f"{result.recipe:6s} model on {result.model:4s} activations on "
        f"{result.activations:4s} {outcome:9s} in {result.seconds:4.0f} s: resident "
        f"{result.resident / 1e6:5.0f}, anonymous {result.anonymous / 1e6:5.0f}, "
        f"address space {result.address_space / 1e6:5.0f}"
    )


if __name__ == "__main__":
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "INFO")
    main()
