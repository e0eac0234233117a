"""Remove the machine code for other GPUs from a CUDA library in place.

    python integration/gpu/bundle/fatbin.py LIBRARY --keep 90 [--out LIBRARY]

A library that nvcc built holds one container per compiled file in its section
``.nv_fatbin``, each with the same kernels for many architectures. Entries for the
architectures to keep (``sm_90`` and ``sm_90a`` are both 90) move to the front of their
container, its size is corrected, and the bytes after them become zeros. Nothing else
moves, so every address in the library stays valid, and the zeros compress to nothing.

PTX is removed, too. A container with nothing to keep gets the smallest entry for
another architecture found anywhere: libraries whose kernels are for other GPUs already
have such containers, but never empty ones.

The layout, little-endian, after github.com/n-eiling/cuda-fatbin-decompression:

    container  magic u32, version u16, header bytes u16, bytes after the header u64
    entry      kind u16 (1 PTX, 2 machine code), version u16, header bytes u32,
               payload bytes u64, 12 bytes, architecture u32 (at offset 28), ...
"""

import argparse
import struct
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

SECTION = ".nv_fatbin"
MAGIC = 0xBA55ED50
MACHINE_CODE = 2
CONTAINER = struct.Struct("<IHHQ")
ENTRY = struct.Struct("<HHIQ12xI")


@dataclass(frozen=True)
class Entry:
    """One kernel collection for one architecture; ``start`` and ``end`` in bytes."""

    start: int
    end: int
    kind: int
    architecture: int

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def name(self) -> str:
        """nvcc's name: ``sm_90`` for machine code, ``compute_90`` for PTX."""
        kind = "sm" if self.kind == MACHINE_CODE else "compute"
        return f"{kind}_{self.architecture}"


@dataclass(frozen=True)
class Container:
    """``start`` of its header, ``end`` of its last entry, in bytes of the section."""

    start: int
    end: int
    entries: tuple[Entry, ...]


def _entries(section: bytes, start: int, end: int) -> Iterator[Entry]:
    while start < end:
        if end - start < ENTRY.size:
            raise ValueError(
                f"an entry at byte {start} has {end - start} bytes left in its "
                f"container, expected at least {ENTRY.size}: not a known fatbin layout"
            )
        kind, _, header, payload, architecture = ENTRY.unpack_from(section, start)
        after = start + header + payload
        if header < ENTRY.size or after > end:
            raise ValueError(
                f"an entry at byte {start} says {header} + {payload} bytes, but its "
                f"container ends at {end}: not a known fatbin layout"
            )
        yield Entry(start, after, kind, architecture)
        start = after


def containers(section: bytes) -> list[Container]:
    """Return the containers of a ``.nv_fatbin`` section, in order.

    :raises ValueError: where there is neither a container nor zeros between two
    """
    found, start = [], 0
    while start < len(section):
        if not any(section[start : start + 8]):
            start += 8  # padding
            continue
        if len(section) - start < CONTAINER.size:
            raise ValueError(
                f"{len(section) - start} bytes after the last container at byte "
                f"{start}, expected zeros: not a known fatbin layout"
            )
        magic, version, header, size = CONTAINER.unpack_from(section, start)
        if magic != MAGIC or version != 1:
            raise ValueError(
                f"magic {magic:#x}, version {version} at byte {start}, expected "
                f"{MAGIC:#x}, version 1: not a known fatbin layout"
            )
        end = start + header + size
        if end > len(section):
            raise ValueError(
                f"a container at byte {start} ends at {end}, its section at "
                f"{len(section)}: truncated?"
            )
        entries = tuple(_entries(section, start + header, end))
        found.append(Container(start, end, entries))
        start = end
    return found


def pruned(section: bytes, keep: Collection[int]) -> bytes:
    """Return the section with machine code for ``keep`` only, of the same length.

    :param keep: compute capabilities as numbers, 90 for 9.0
    :raises ValueError: if no container holds any of them
    """
    found = containers(section)

    def to_keep(entry: Entry) -> bool:
        return entry.kind == MACHINE_CODE and entry.architecture in keep

    everything = [entry for container in found for entry in container.entries]
    if not any(map(to_keep, everything)):
        there = sorted({entry.name for entry in everything})
        raise ValueError(
            f"no machine code for {sorted(keep)}, found {', '.join(there) or 'none'}: "
            "name architectures that the library was built for"
        )
    foreign = [e for e in everything if e.kind == MACHINE_CODE and not to_keep(e)]
    stand_in = min(foreign, key=lambda entry: entry.size, default=None)
    result = bytearray(len(section))
    for container in found:
        kept = [entry for entry in container.entries if to_keep(entry)]
        if not kept and container.entries:
            smallest = min(container.entries, key=lambda entry: entry.size)
            # where a container has only PTX, the stand-in may be too long
            fits = stand_in and stand_in.size <= smallest.size
            kept = [stand_in if stand_in and fits else smallest]
        body = b"".join(section[entry.start : entry.end] for entry in kept)
        magic, version, header, _ = CONTAINER.unpack_from(section, container.start)
        first = container.start + header
        result[container.start : first] = section[container.start : first]
        CONTAINER.pack_into(result, container.start, magic, version, header, len(body))
        result[first : first + len(body)] = body
    return bytes(result)


def section_range(library: bytes, name: str = SECTION) -> tuple[int, int]:
    """Return where a section's bytes start and end in a 64-bit little-endian ELF file.

    :raises ValueError: for another kind of file, or without such a section
    """
    if library[:6] != b"\x7fELF\x02\x01":
        raise ValueError(
            f"begins with {library[:6]!r}, expected a 64-bit little-endian ELF file"
        )
    (table,) = struct.unpack_from("<Q", library, 40)
    size, count, names = struct.unpack_from("<HHH", library, 58)
    headers = [
        struct.unpack_from("<I20xQQ", library, table + size * index)
        for index in range(count)
    ]
    for name_at, offset, length in headers:
        at = headers[names][1] + name_at
        if library[at : library.index(b"\0", at)] == name.encode():
            return offset, offset + length
    raise ValueError(f"no section {name} among {count}: is this a CUDA library?")


def prune_library(library: bytes, keep: Collection[int]) -> bytes:
    """Return a library with machine code for ``keep`` only, of the same length."""
    start, end = section_range(library)
    return library[:start] + pruned(library[start:end], keep) + library[end:]


def summary(library: bytes) -> str:
    """Write the bytes per architecture on one line."""
    start, end = section_range(library)
    sizes: Counter[str] = Counter()
    for container in containers(library[start:end]):
        for entry in container.entries:
            sizes[entry.name] += entry.size
    return ", ".join(f"{name} {sizes[name]:,}" for name in sorted(sizes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=Path)
    parser.add_argument("--keep", type=int, nargs="+", default=[90])
    parser.add_argument("--out", type=Path, help="default: the library itself")
    args = parser.parse_args()
    library = args.library.read_bytes()
    print(f"{args.library.name}: bytes before: {summary(library)}")
    library = prune_library(library, args.keep)
    print(f"{args.library.name}: bytes after: {summary(library)}")
    (args.out or args.library).write_bytes(library)


if __name__ == "__main__":
    main()
