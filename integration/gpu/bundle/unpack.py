"""Unpack the bundle's archives into folders for PYTHONPATH; needs only Python.

    python integration/gpu/bundle/unpack.py DEST [--bundle build/gpu] [--only kernels]

Makes DEST/site-kernels (llm-compressor and this package) and DEST/site-serving (vLLM
and this package), one process per archive, and compiles the Python files.
"""

import argparse
import os
import py_compile
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

PARTS = ("kernels", "serving")
SHARED = ("package", "common")  # this package, and what both parts need
BUNDLE = Path(__file__).parents[3] / "build" / "gpu"


def unpack_one(archive: Path, folders: list[Path]) -> int:
    """Unpack into each folder and compile; returns the bytes of one copy."""
    size = 0
    for folder in folders:
        with tarfile.open(archive, "r:xz") as tar:
            members = tar.getmembers()
            tar.extractall(folder, members, filter="data")
        for member in members:
            if member.name.endswith(".py"):
                # a file that does not compile is not for this Python, or never imported
                py_compile.compile(str(folder / member.name), quiet=2)
        size = sum(member.size for member in members)
    return size


def unpack(bundle: Path, destination: Path, parts: tuple[str, ...] = PARTS) -> int:
    """Unpack all archives of ``parts`` and what they share; returns unpacked bytes.

    :raises FileNotFoundError: if a part has no archive
    """
    jobs: list[tuple[Path, list[Path]]] = []
    for part in (*SHARED, *parts):
        found = sorted(bundle.glob(f"{part}-*.tar.xz"))
        if not found:
            raise FileNotFoundError(
                f"no {part}-*.tar.xz in {bundle}: make it with bash "
                "integration/gpu/bundle.sh, on a machine with network"
            )
        of = parts if part in SHARED else (part,)
        jobs += [(x, [destination / f"site-{name}" for name in of]) for x in found]
    jobs.sort(key=lambda job: -job[0].stat().st_size)  # the longest first
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        return sum(pool.map(unpack_one, *zip(*jobs, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("destination", type=Path)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--only", choices=PARTS)
    args = parser.parse_args()
    start = time.perf_counter()
    parts = (args.only,) if args.only else PARTS
    size = unpack(args.bundle, args.destination, parts)
    seconds = time.perf_counter() - start
    print(f"unpacked {size / 2**20:.0f} MiB in {seconds:.1f} s", flush=True)
    for part in parts:
        print(args.destination / f"site-{part}")


if __name__ == "__main__":
    main()
