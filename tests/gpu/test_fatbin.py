"""Removing machine code from the bundle's libraries, on handmade containers."""

import struct

import pytest

from integration.gpu.bundle import fatbin

PTX, CODE = 1, 2


def entry(kind: int, architecture: int, payload: bytes, header: int = 64) -> bytes:
    """``header`` is 112 for architectures with a suffix from 100 on, 80 for PTX."""
    assert len(payload) % 8 == 0
    first = struct.pack("<HHIQ", kind, 0x101, header, len(payload))
    rest = bytearray(header - len(first))
    struct.pack_into("<I", rest, 28 - len(first), architecture)
    return first + bytes(rest) + payload


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(section: bytes) -> bytes:
    """An ELF file with ``.nv_fatbin`` between two other sections."""
    names = b"\0.text\0.nv_fatbin\0.shstrtab\0"
    parts = [b"", b"c" * 24, section, names]
    offsets, at = [], 64
    for part in parts:
        offsets.append(at)
        at += len(part)
    headers = b"".join(
        struct.pack("<II16xQQ24x", names.index(name) if name else 0, 1, offset, size)
        for name, offset, size in zip(
            (b"", b".text\0", b".nv_fatbin\0", b".shstrtab\0"),
            offsets,
            map(len, parts),
            strict=True,
        )
    )
    header = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q", at)
    return (
        header.ljust(58, b"\0")
        + struct.pack("<HHH", 64, 4, 3)
        + b"".join([*parts, headers])
    )


OTHERS = [
    entry(CODE, 80, b"a" * 40),
    entry(PTX, 90, b"p" * 24, header=80),
    entry(CODE, 120, b"b" * 32, header=112),
]
WANTED = [entry(CODE, 90, b"w" * 48), entry(CODE, 90, b"v" * 16)]


def described(section: bytes) -> list[list[tuple[int, int]]]:
    return [
        [(x.kind, x.architecture) for x in found.entries]
        for found in fatbin.containers(section)
    ]


def test_kept_entries_move_to_the_front_and_zeros_follow():
    section = container(OTHERS[0], WANTED[0], *OTHERS[1:], WANTED[1])
    kept = container(*WANTED)
    found = fatbin.pruned(section, [90])
    assert found == kept + bytes(len(section) - len(kept))
    assert described(found) == [[(CODE, 90), (CODE, 90)]]


def test_containers_stay_where_they_are():
    first = container(OTHERS[0], WANTED[0])
    second = container(WANTED[1], OTHERS[2])
    section = first + bytes(16) + second  # padding in between
    found = fatbin.pruned(section, [90])
    starts = [x.start for x in fatbin.containers(found)]
    assert starts == [0, len(first) + 16]
    assert described(found) == [[(CODE, 90)], [(CODE, 90)]]
    assert fatbin.pruned(found, [90]) == found


def test_a_container_with_nothing_to_keep_gets_the_smallest_foreign_entry():
    small = entry(CODE, 75, b"s" * 8)
    section = container(*OTHERS) + container(small, WANTED[0]) + container()
    found = fatbin.pruned(section, [90])
    assert described(found) == [[(CODE, 75)], [(CODE, 90)], []]
    assert found.startswith(container(small))


def test_a_container_too_short_for_the_smallest_foreign_entry_keeps_its_own():
    ptx = entry(PTX, 80, b"", header=80)
    section = container(ptx) + container(entry(CODE, 75, b"s" * 64), WANTED[0])
    assert described(fatbin.pruned(section, [90])) == [[(PTX, 80)], [(CODE, 90)]]


def test_the_rest_of_the_library_stays_as_it_is():
    section = container(OTHERS[0], WANTED[0])
    before = library(section)
    after = fatbin.prune_library(before, [90])
    assert after == library(fatbin.pruned(section, [90])) != before
    assert fatbin.summary(after) == f"sm_90 {len(WANTED[0])}"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            container(*OTHERS),
            "no machine code for .90., found compute_90, sm_120, sm_80",
        ),
        (b"x" * 32, "magic 0x78787878"),
        (container(WANTED[0])[:-8], "ends at 128, its section at 120"),
        (container(WANTED[0][:-8]), r"says 64 \+ 48 bytes, but its container ends"),
        (container(bytes(16)), "has 16 bytes left in its container"),
        (container(WANTED[0]) + b"x" * 8, "8 bytes after the last container"),
    ],
)
def test_another_layout_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        fatbin.pruned(section, [90])


def test_another_file_is_refused():
    with pytest.raises(ValueError, match="expected a 64-bit little-endian ELF"):
        fatbin.section_range(b"MZ" * 40)
    with pytest.raises(ValueError, match=r"no section \.other among 4"):
        fatbin.section_range(library(b""), ".other")
