"""Pack trimmed wheels into a few archives, which ``unpack.py`` turns into site folders.

    python -m integration.gpu.bundle.pack WHEELS OUT

OUT gets archives ``NAME-NUMBER.tar.xz`` of the wheels in WHEELS, a folder called NAME.
They have about the same size, so that as many processes can unpack them. CUDA libraries
lose the machine code for other GPUs, and all large libraries their symbols.
"""

import argparse
import io
import os
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from integration.gpu.bundle.fatbin import prune_library
from integration.gpu.bundle.trim import CUDA_LIBRARIES, carried

ARCHITECTURES = (90,)  # H100 and H200
PART_BYTES = 6 << 20  # unpacked; only a single large library may exceed it
STRIP_FROM = 1 << 20  # bytes; stripping breaks some small libraries
TIME = 1577836800  # 2020-01-01: the same wheels give the same archives

Files = dict[str, bytes]


def stripped(library: bytes) -> bytes:
    """Strip a shared library of the symbols that the loader does not need."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        path.write_bytes(library)
        subprocess.run(["strip", "--strip-all", path], check=True)
        return path.read_bytes()


def content(wheel: Path) -> Files:
    """Return the files of a wheel that the bundle includes, by path."""
    distribution = wheel.name.split("-")[0].lower()
    files: Files = {}
    with zipfile.ZipFile(wheel) as archive:
        for path in archive.namelist():
            if not carried(distribution, path):
                continue
            data = archive.read(path)
            if path in CUDA_LIBRARIES:
                data = prune_library(data, ARCHITECTURES)
            if path.endswith(".so") and len(data) >= STRIP_FROM:
                data = stripped(data)
            files[path] = data
    if not files:
        raise ValueError(f"no file of {wheel} is included: see trim.py")
    return files


def one_of_each(folder: Path) -> list[Path]:
    """Return the folder's wheels.

    :raises ValueError: if one distribution has two
    """
    found: dict[str, Path] = {}
    for wheel in sorted(folder.glob("*.whl")):
        other = found.setdefault(wheel.name.split("-")[0].lower(), wheel)
        if other != wheel:
            raise ValueError(
                f"{other} and {wheel}: delete the one that is no longer needed"
            )
    return list(found.values())


def divided(files: Files) -> Iterator[list[str]]:
    """Divide paths into lists of similar unpacked size, similar files together."""
    names = sorted(files, key=lambda path: (Path(path).suffix, path))
    part: list[str] = []
    size = 0
    for name in names:
        if part and size + len(files[name]) > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += len(files[name])
    yield part


def write(target: Path, files: Files) -> None:
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(data), 0o644, TIME
            archive.addfile(entry, io.BytesIO(data))


def pack(wheels: Path, out: Path) -> list[Path]:
    """Write archives of the wheels in a folder, replacing earlier ones."""
    files: Files = {}
    for wheel in one_of_each(wheels):
        files |= content(wheel)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{wheels.name}-*.tar.xz"):
        old.unlink()
    targets, jobs = [], []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for number, names in enumerate(divided(files)):
            targets.append(out / f"{wheels.name}-{number}.tar.xz")
            chosen = {name: files[name] for name in names}
            jobs.append(pool.submit(write, targets[-1], chosen))
        for job in jobs:
            job.result()
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    sizes = [target.stat().st_size for target in pack(args.wheels, args.out)]
    print(f"{args.wheels.name}: {sum(sizes) / 2**20:.1f} MiB in {len(sizes)} archives")


if __name__ == "__main__":
    main()
