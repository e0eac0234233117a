"""Tensors of a checkpoint and safetensors files, good ones and ones that lie."""

import json
import struct
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.inputs.json_texts import ODD_NUMBERS, SPECIAL_JSON, scalars

Entry = tuple[str, dict[str, Any], bytes]  # name, header, content

Q = "model.layers.0.self_attn.q_proj"

MODULES = [Q, "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", ""]

STORAGES = ("sparse-24-bitmask", "sparse-bitmask")

_KINDS = ["weight", "compressed", "bitmask", "shape", "weight_packed", "bias", "[/x]"]
_KINDS += ["row_offsets"]

_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "I64": 8}
_SIZES |= {"F8_E4M3": 1, "BOOL": 1, "I32": 4, "U32": 4, "C64": 8}

tensor_names = st.builds(
    "{}.{}".format, st.sampled_from(MODULES), st.sampled_from(_KINDS)
) | st.text(max_size=10)

_dims = st.integers(0, 9) | st.sampled_from([4, 8, 8, 16])


@st.composite
def _entry(draw: st.DrawFn) -> tuple[str, dict[str, Any], bytes]:
    """Draw a tensor: a correct header entry and its bytes."""
    name = draw(tensor_names)
    dtype = draw(st.sampled_from(sorted(_SIZES)))
    shape = draw(st.lists(_dims, max_size=3) | st.tuples(_dims, _dims).map(list))
    size = _SIZES[dtype]
    for length in shape:
        size *= length
    pattern = draw(st.sampled_from([b"\0", b"\1", b"\0\0\1\1", b"\x80\0\0\0\1", b"\3"]))
    return name, {"dtype": dtype, "shape": shape}, (pattern * size)[:size]


@st.composite
def _packed(draw: st.DrawFn) -> list[tuple[str, dict[str, Any], bytes]]:
    """Draw the tensors of a packed layer, some of them wrong or missing."""
    module = draw(st.sampled_from(MODULES))
    rows, groups = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    dtype = draw(st.sampled_from(["BF16", "I8", "F32", "F64"]))
    mask = -(-groups // 2)
    byte = draw(st.sampled_from([0x33, 0x5A, 0x03, 0xFF, 0x00]))
    values = bytes(rows * groups * 2 * _SIZES[dtype])
    shape = draw(st.sampled_from([[rows, 4 * groups], [0, 0], [2**62, 4], [-1, 4]]))
    entries = [
        ("compressed", {"dtype": dtype, "shape": [rows, 2 * groups]}, values),
        (
            "bitmask",
            {"dtype": "U8", "shape": [rows, mask]},
            bytes([byte] * rows * mask),
        ),
        ("shape", {"dtype": "I64", "shape": [2, 1]}, struct.pack("<2q", *shape)),
    ]
    for entry in entries:  # without data, nothing contradicts a header that lies
        if not entry[2]:
            entry[1]["shape"] = draw(
                st.sampled_from([entry[1]["shape"], [0, 2**63], [2**62, 0], [0]])
            )
    if draw(st.booleans()):  # any mask: values without rows, and row offsets
        count = draw(st.sampled_from([2, 2, 2, 1, 3])) * rows * groups
        header = {"dtype": dtype, "shape": [count]}
        entries[0] = ("compressed", header, bytes(count * _SIZES[dtype]))
        entries[2][1]["shape"] = draw(st.sampled_from([[2], [2], [2, 1], []]))
        step = draw(st.sampled_from([2 * groups, 2 * groups, 0, -1, 2**60]))
        offsets = [row * step for row in range(rows)]
        entries.append(
            (
                "row_offsets",
                {"dtype": "I64", "shape": [rows]},
                struct.pack(f"<{rows}q", *offsets),
            )
        )
    left_out = draw(st.integers(0, 8))
    return [
        (f"{module}.{kind}", header, data)
        for i, (kind, header, data) in enumerate(entries)
        if i != left_out
    ]


@st.composite
def good_tensors(draw: st.DrawFn, storage: str) -> list[Entry]:
    """Draw the tensors of a checkpoint that is packed or, if dense, can be packed."""
    dtype = draw(st.sampled_from(["BF16", "I8", "F32"]))
    size, rows, groups = _SIZES[dtype], draw(st.integers(1, 4)), draw(st.integers(1, 5))
    entries: list[Entry] = [("norm.weight", {"dtype": "F32", "shape": [1]}, bytes(4))]
    for module in MODULES[: draw(st.integers(1, 3))]:
        value = bytes([1] * size)
        if storage == "dense":
            data = (value * 2 + bytes(2 * size)) * rows * groups
            header = {"dtype": dtype, "shape": [rows, 4 * groups]}
            entries.append((f"{module}.weight", header, data))
            continue
        mask = ([0x33] * (groups // 2) + [3] * (groups % 2)) * rows
        shape = [rows, -(-groups // 2)]
        values = value * rows * groups * 2
        content = struct.pack("<2q", rows, 4 * groups)
        by_row = storage == "sparse-24-bitmask"
        kept = (rows, 2 * groups) if by_row else (rows * 2 * groups,)
        entries += [
            (f"{module}.compressed", _header(dtype, *kept), values),
            (f"{module}.bitmask", _header("U8", *shape), bytes(mask)),
            (f"{module}.shape", _header("I64", 2, *[1] * by_row), content),
        ]
        if not by_row:
            offsets = struct.pack(f"<{rows}q", *range(0, 2 * groups * rows, 2 * groups))
            entries.append((f"{module}.row_offsets", _header("I64", rows), offsets))
    return entries


def _header(dtype: str, *shape: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape)}


@st.composite
def wild_tensors(draw: st.DrawFn) -> list[Entry]:
    """Draw tensors of any kind, some with the same name."""
    packed = draw(st.lists(_packed(), max_size=2))
    entries = [entry for part in packed for entry in part]
    return entries + draw(st.lists(_entry(), max_size=4))


@st.composite
def safetensors(draw: st.DrawFn, content: st.SearchStrategy[list[Entry]]) -> bytes:
    """Draw a safetensors file, often a good one, otherwise with a header that lies."""
    pairs: list[tuple[str, Any]] = []
    data = b""
    for name, header, values in sorted(
        draw(content), key=lambda entry: -_SIZES[entry[1]["dtype"]]
    ):
        if name in dict(pairs) and draw(st.integers(0, 3)):
            continue  # otherwise, the header has it twice
        places = [len(data), len(data) + len(values)]
        pairs.append((name, header | {"data_offsets": places}))
        data += values
    if pairs and not draw(st.integers(0, 3)):
        name, header = pairs[draw(st.integers(0, len(pairs) - 1))]
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "offsets"]))
        odd = st.sampled_from(ODD_NUMBERS)
        header[key] = draw(st.lists(odd, max_size=3) | odd | st.text(max_size=5))
    if not draw(st.integers(0, 3)):
        metadata = draw(st.dictionaries(st.text(max_size=5), scalars, max_size=2))
        pairs.append(("__metadata__", metadata))
    inner = ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in pairs)
    text = f"{{{inner}}}".encode()
    if not draw(st.integers(0, 15)):
        text = draw(st.sampled_from(SPECIAL_JSON)).encode("utf-8", "replace")
    length = len(text)
    if not draw(st.integers(0, 15)):
        length = draw(st.sampled_from([0, 1, 10**8, 10**18, 2**63, 2**64 - 1]))
    return struct.pack("<Q", length) + text + data
