"""Measure the speed and memory with which ``pack`` and ``unpack`` convert a checkpoint.

It writes a synthetic sharded checkpoint in bfloat16, 2:4 or, for sparse-bitmask, with
60 % zeros, copies its files with shutil, packs it and unpacks it again. Each runs in
its own process, ``--repeats`` times in turn, and the fastest run counts. What is
written stays in the page cache, because none of the three calls fsync; with ``--sync``,
the time until ``sync`` returns is included. On a busy machine the ratios mean little:
copying hardly needs a processor.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 8192, 32000  # Llama-3.2-1B's matrices
_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
_LAYERS_PER_SHARD = 4

_MEASURED = """
import json, os, re, shutil, sys, time
from pathlib import Path
action, source, target, sync, storage = sys.argv[1:]
if action == "copy":
    def run():
        Path(target).mkdir()
        for path in Path(source).iterdir():
            shutil.copyfile(path, Path(target) / path.name)
else:
    import llmc_attnmask
    convert = getattr(llmc_attnmask, action)
    options = {"storage": storage} if action == "pack" else {}
    def run():
        convert(source, target, **options)
def peak_mb():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024 / 1e6
os.sync()
before = peak_mb()
start, cpu = time.perf_counter(), time.process_time()
run()
if sync == "True":
    os.sync()
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "cpu": time.process_time() - cpu,
    "peak_mb": peak_mb(),
    "imports_mb": before,
}))
"""


def synthesize(directory: Path, gigabytes: float, storage: str) -> int:
    """Write a Llama-shaped checkpoint of about this size; returns its bytes."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    layer_bytes = 2 * sum(rows * columns for rows, columns in _SHAPES.values())
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator).bfloat16()
    layers = round((gigabytes * 1e9 - 2 * embedding.numel()) / layer_bytes)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for first in range(0, layers, _LAYERS_PER_SHARD):
        name = f"model-{first // _LAYERS_PER_SHARD + 1:05d}.safetensors"
        tensors = {"model.embed_tokens.weight": embedding} if not first else {}
        for layer in range(first, min(first + _LAYERS_PER_SHARD, layers)):
            for module, shape in _SHAPES.items():
                tensors[f"model.layers.{layer}.{module}.weight"] = _sparse(
                    shape, generator, storage
                )
        save_file(tensors, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in directory.iterdir())


def _sparse(
    shape: tuple[int, int], generator: torch.Generator, storage: str
) -> torch.Tensor:
    weight = torch.randn(shape, generator=generator).bfloat16()
    if storage == "sparse-bitmask":
        return weight.masked_fill(torch.rand(shape, generator=generator) < 0.6, 0.0)
    order = torch.rand(weight.numel() // 4, 4, generator=generator).argsort(1)
    return weight.masked_fill((order > 1).view(shape), 0.0)


def measure(
    action: str, source: Path, target: Path, sync: bool, storage: str
) -> dict[str, float]:
    command = [sys.executable, "-c", _MEASURED, action, source, target, sync, storage]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def digests(directory: Path) -> dict[str, str]:
    """Return the sha256 of every tensor, by name."""
    return dict(_digests(directory))


def _digests(directory: Path) -> Iterator[tuple[str, str]]:
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is not a mapping
                content = tensors.get_tensor(name).view(torch.uint8).numpy()
                yield name, hashlib.sha256(content).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sync", action="store_true")
    storages = ["sparse-24-bitmask", "sparse-bitmask"]
    parser.add_argument("--storage", choices=storages, default=storages[0])
    parser.add_argument("--folder", type=Path, help="where to write. [default: /tmp]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        dense = Path(folder) / "dense"
        size = synthesize(dense, args.gigabytes, args.storage)
        runs: dict[str, list[dict[str, float]]] = {}
        for repeat in range(args.repeats):
            names = [Path(folder) / f"{x}{repeat}" for x in ("copy", "pack", "unpack")]
            copied, packed, restored = names
            for action, source, target in (
                ("copy", dense, copied),
                ("pack", dense, packed),
                ("unpack", packed, restored),
            ):
                result = measure(action, source, target, args.sync, args.storage)
                runs.setdefault(action, []).append(result)
            if digests(restored) != digests(dense):
                raise SystemExit("the round trip changed a tensor")
            for path in (*copied.iterdir(), *packed.iterdir(), *restored.iterdir()):
                path.unlink()
        print(f"{size / 1e9:.3f} GB dense, fsync: {'yes' if args.sync else 'no'}")
        fastest = {k: min(r["seconds"] for r in results) for k, results in runs.items()}
        for action, results in runs.items():
            seconds = ", ".join(f"{r['seconds']:.2f}" for r in results)
            print(
                f"{action:7s} {size / 1e9 / fastest[action]:5.2f} GB/s of dense size, "
                f"{fastest['copy'] / fastest[action]:.2f} x the speed of copying, "
                f"peak {max(r['peak_mb'] for r in results):.0f} MB "
                f"({max(r['imports_mb'] for r in results):.0f} MB imports); "
                f"seconds: {seconds}; "
                f"processor seconds {min(r['cpu'] for r in results):.2f}"
            )


if __name__ == "__main__":
    main()
