"""Strategies for hostile input: folders, recipes, data files, configs, arguments."""

import json
import re
import struct
from typing import Any

from hypothesis import strategies as st

Files = dict[str, bytes]
Folder = dict[str, Any]  # see ``folders``; JSON once its bytes are spelled as latin-1

Q = "model.layers.0.self_attn.q_proj"
_MODULES = [Q, "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", ""]
_KINDS = ["weight", "compressed", "bitmask", "shape", "weight_packed", "bias", "[/x]"]
_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "I64": 8}
_SIZES |= {"F8_E4M3": 1, "BOOL": 1, "I32": 4, "U32": 4, "C64": 8}
_ODD_NUMBERS = [-1, 0, 2**31, 2**62, 2**63, 2**64, 10**18, 0.5, None, "4", [4], True]

SPECIAL_JSON = [
    "[" * 10_000,
    '{"a":' * 400 + "1" + "}" * 400,
    "9" * 5000,
    '{"a": NaN, "b": -Infinity, "a": 1e999}',
    '"\\ud800"',
    "\ufeff{}",
    "",
]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


def json_text(content: st.SearchStrategy) -> st.SearchStrategy[str]:
    """JSON of the content, most of the time."""
    return st.one_of(
        content.map(json.dumps),
        content.map(json.dumps),
        content.map(json.dumps),
        st.sampled_from(SPECIAL_JSON),
        st.text(max_size=20),
    )


def mutated(content: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """The content, or with an end that is missing, more at its end or other bytes."""

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(content))
        kind = draw(st.sampled_from(["none", "none", "none", "cut", "more", "other"]))
        if kind == "cut":
            del data[draw(st.integers(0, len(data))) :]
        elif kind == "more":
            data += draw(st.binary(max_size=40))
        elif kind == "other":
            for _ in range(draw(st.integers(1, 4))):
                if data:
                    data[draw(st.integers(0, len(data) - 1))] = draw(
                        st.integers(0, 255)
                    )
        return bytes(data)

    return changed()


_names = st.builds(
    "{}.{}".format, st.sampled_from(_MODULES), st.sampled_from(_KINDS)
) | st.text(max_size=10)
_dims = st.integers(0, 9) | st.sampled_from([4, 8, 8, 16])


@st.composite
def _entry(draw: st.DrawFn) -> tuple[str, dict[str, Any], bytes]:
    """A tensor as its header should say, and its bytes."""
    name = draw(_names)
    dtype = draw(st.sampled_from(sorted(_SIZES)))
    shape = draw(st.lists(_dims, max_size=3) | st.tuples(_dims, _dims).map(list))
    size = _SIZES[dtype]
    for length in shape:
        size *= length
    pattern = draw(st.sampled_from([b"\0", b"\1", b"\0\0\1\1", b"\x80\0\0\0\1", b"\3"]))
    return name, {"dtype": dtype, "shape": shape}, (pattern * size)[:size]


@st.composite
def _packed(draw: st.DrawFn) -> list[tuple[str, dict[str, Any], bytes]]:
    """The three tensors of a packed layer, more or less."""
    module = draw(st.sampled_from(_MODULES))
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
    for entry in entries:  # a header that lies where no byte stands against it
        if not entry[2]:
            entry[1]["shape"] = draw(
                st.sampled_from([entry[1]["shape"], [0, 2**63], [2**62, 0], [0]])
            )
    left_out = draw(st.integers(0, 8))
    return [
        (f"{module}.{kind}", header, data)
        for i, (kind, header, data) in enumerate(entries)
        if i != left_out
    ]


Entry = tuple[str, dict[str, Any], bytes]


@st.composite
def _good(draw: st.DrawFn, packed: bool) -> list[Entry]:
    """The tensors of a checkpoint that can be packed, or that is."""
    dtype = draw(st.sampled_from(["BF16", "I8", "F32"]))
    size, rows, groups = _SIZES[dtype], draw(st.integers(1, 4)), draw(st.integers(1, 5))
    entries: list[Entry] = [("norm.weight", {"dtype": "F32", "shape": [1]}, bytes(4))]
    for module in _MODULES[: draw(st.integers(1, 3))]:
        value = bytes([1] * size)
        if not packed:
            data = (value * 2 + bytes(2 * size)) * rows * groups
            header = {"dtype": dtype, "shape": [rows, 4 * groups]}
            entries.append((f"{module}.weight", header, data))
            continue
        mask = ([0x33] * (groups // 2) + [3] * (groups % 2)) * rows
        shape = [rows, -(-groups // 2)]
        values = value * rows * groups * 2
        content = struct.pack("<2q", rows, 4 * groups)
        entries += [
            (f"{module}.compressed", _header(dtype, rows, 2 * groups), values),
            (f"{module}.bitmask", _header("U8", *shape), bytes(mask)),
            (f"{module}.shape", _header("I64", 2, 1), content),
        ]
    return entries


def _header(dtype: str, *shape: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape)}


@st.composite
def _wild(draw: st.DrawFn) -> list[Entry]:
    """Tensors of any kind, some of the same name."""
    packed = draw(st.lists(_packed(), max_size=2))
    entries = [entry for part in packed for entry in part]
    return entries + draw(st.lists(_entry(), max_size=4))


@st.composite
def safetensors(draw: st.DrawFn, content: st.SearchStrategy[list[Entry]]) -> bytes:
    """A safetensors file: often good, else with a header that lies."""
    pairs: list[tuple[str, Any]] = []
    data = b""
    for name, header, values in sorted(
        draw(content), key=lambda entry: -_SIZES[entry[1]["dtype"]]
    ):
        if name in dict(pairs) and draw(st.integers(0, 3)):
            continue  # else the header has it twice
        places = [len(data), len(data) + len(values)]
        pairs.append((name, header | {"data_offsets": places}))
        data += values
    if pairs and not draw(st.integers(0, 3)):
        name, header = pairs[draw(st.integers(0, len(pairs) - 1))]
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "offsets"]))
        odd = st.sampled_from(_ODD_NUMBERS)
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


_targets = values | st.lists(
    st.sampled_from([*_MODULES, "Linear", "re:.*", "re:(", "re:(.*)*x"]), max_size=2
)
_sparsity = values | st.fixed_dictionaries(
    {"format": st.sampled_from(["dense", "sparse-24-bitmask"]) | values},
    optional={
        "targets": _targets,
        "ignore": _targets,
        "sparsity_structure": st.just("2:4") | values,
    },
)
_note = values | st.fixed_dictionaries(
    {
        "version": st.just(1) | values,
        "sparsity": values
        | st.fixed_dictionaries({"structure": st.just("2:4"), "targets": _targets}),
    }
)
quantizations = values | st.fixed_dictionaries(
    {},
    optional={
        "quant_method": st.sampled_from(["compressed-tensors", "fp8"]) | values,
        "sparsity_config": _sparsity,
        "config_groups": values,
        "llmc_attnmask": _note,
    },
)
PACKED = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-24-bitmask", "targets": [Q]},
    }
}
configs = st.one_of(
    values,
    st.fixed_dictionaries(
        {"model_type": st.just("llama") | values},
        optional={"quantization_config": quantizations, "llmc_attnmask": _note},
    ),
    st.just({}),
    st.just(PACKED),
)

_FILES = ["model.safetensors", "a.safetensors", "sub/b.safetensors"]
_paths = st.sampled_from(
    [*_FILES, *_FILES, "../outside/secret", "/etc/passwd", "..\\x", "a\0b", ".", ""]
) | st.text(max_size=6)
_indices = values | st.fixed_dictionaries(
    {"weight_map": values | st.dictionaries(_names, _paths | values, max_size=5)},
    optional={"metadata": values},
)
_others = st.fixed_dictionaries(
    {},
    optional={
        "config.json": json_text(configs),
        "model.safetensors.index.json": json_text(_indices),
        "extra/tokenizer.json": st.just("{}"),
        "pytorch_model.bin": st.just("\x80\x02."),
    },
).map(lambda files: {k: v.encode("utf-8", "surrogatepass") for k, v in files.items()})
_LINKS = ["../outside", "../outside/secret", ".", "/dev/zero", "/", "nowhere", "../in"]


@st.composite
def folders(draw: st.DrawFn) -> Folder:
    """A checkpoint folder: ``files`` by path, ``links`` and ``pipes`` beside them.

    Half of them are good but for a thing or two.
    """
    if draw(st.booleans()):
        packed = draw(st.booleans())
        content = safetensors(_good(packed))
        good = json.dumps(PACKED if packed else {})
        config = draw(st.just(good) | st.just(good) | json_text(configs))
        files: Files = {
            "model.safetensors": draw(content | mutated(content)),
            "config.json": config.encode("utf-8", "surrogatepass"),
        }
        odds = 8
    else:
        names = draw(st.lists(st.sampled_from(_FILES), max_size=3, unique=True))
        files = {name: draw(mutated(safetensors(_wild()))) for name in names}
        files |= draw(_others)
        odds = 2
    if draw(st.integers(0, odds)):
        return {"files": files, "links": {}, "pipes": []}
    special = st.sampled_from(["config.json", *_FILES[:2], "tokenizer.model", "more"])
    links = draw(st.dictionaries(special, st.sampled_from(_LINKS), max_size=1))
    return {
        "files": files,
        "links": links,
        "pipes": draw(st.lists(special, max_size=1)),
    }


_SCALARS = """\
0.5|"2:4"|2:4|1:2:3:4|.nan|-.inf|1e400|0x|~|*a|<<|'|[q, k]|9999-99-99|!!int ''
!!float ''|!!bool maybe|!!timestamp x|!!binary x|!!python/object/apply:os.system [true]
&a 1|&a [*a]|{a: *b}|- x"""
_scalar_yaml = st.sampled_from(
    [*re.split(r"[|\n]", _SCALARS), "\t", "\0", "9" * 5000, "[" * 3000, "{a: " * 400]
) | st.text(max_size=6)
_modifiers = st.sampled_from(
    [
        "AttentionMatrixPruningModifier",
        "ALPSPruningModifier",
        "MaskedRecoveryModifier",
        "MaskedGPTQModifier",
        "SparseGPTModifier",
        "WandaPruningModifier",
        "QuantizationModifier",
        "SmoothQuantModifier",
        "Modifier",
        "__init__",
    ]
)
_FIELDS = """\
sparsity mask_structure targets ignore scheme config_groups seed steps projections
storage block_size mappings __class__"""
_fields = st.sampled_from(_FIELDS.split())
_GOOD_FIELDS = {
    "sparsity": "0.5",
    "mask_structure": '"2:4"',
    "targets": "['re:.*q_proj$']",
    "ignore": "[lm_head]",
    "scheme": "W8A8",
    "projections": "[q, k]",
    "storage": "dense",
}


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    """A recipe: of the right shape with odd values, aliases or tags, or no recipe."""
    kind = draw(st.sampled_from(["fields", "fields", "values", "aliases", "text"]))
    if kind == "values":
        return draw(
            mutated(json_text(values).map(lambda t: t.encode("utf-8", "replace")))
        )
    if kind == "text":
        return draw(
            mutated(st.sampled_from([b"a_stage:\n  b_modifiers: {}\n", b"- *a"]))
        )
    if kind == "aliases":
        width, depth = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        lists = draw(st.booleans())
        lines = ["a0_stage: &a0 {b_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}"]
        for i in range(1, depth):
            copies = ", ".join([f"*a{i - 1}"] * width)
            many = f"[{copies}]" if lists else f"{{<<: [{copies}]}}"
            lines.append(f"a{i}_stage: &a{i} {many}")
        return "\n".join(lines).encode()
    lines = []
    for stage in draw(
        st.lists(st.sampled_from(["a_stage", "b_stage", "c"]), max_size=2)
    ):
        lines.append(f"{stage}:\n  b_modifiers:")
        for name in draw(st.lists(_modifiers, max_size=2)):
            lines.append(f"    {name}:")
            for field in draw(st.lists(_fields, max_size=3)):
                good = st.just(_GOOD_FIELDS.get(field, "1"))
                value = draw(good | good | _scalar_yaml | json_text(values))
                lines.append(f"      {field}: {value}")
    return draw(mutated(st.just("\n".join(lines).encode("utf-8", "replace"))))


_rows = values | st.fixed_dictionaries({"text": st.text(max_size=20) | values})
datasets = mutated(
    st.lists(json_text(_rows), max_size=3).map(
        lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")
    )
)

_WORDS = """\
prune eval inspect pack unpack --json --only-2of4 --help --recipe --output --num-samples
--max-length --seed --storage --dataset --text-column --reference --text --resume FOLDER
NEW RECIPE -1 0 nan dense builtin:pydoc [/x]"""
_words = st.sampled_from([*_WORDS.split(), "10" * 30, "\x1b[2J", ""])
arguments = st.lists(_words | st.text(max_size=5), max_size=8)

LLAMA = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
_CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


@st.composite
def _models(draw: st.DrawFn) -> str:
    """The config of a tiny Llama with a field or two that are odd."""
    kind = draw(st.sampled_from(["llama", "llama", "llama", "gpt2", "nonsense", None]))
    config: dict[str, Any] = {"model_type": kind, **LLAMA}
    odd = st.sampled_from([*_ODD_NUMBERS, 10**7, 10**9, [], {}, "x"]) | values
    fields = [*LLAMA, "rope_parameters", "architectures", "dtype", "torch_dtype"]
    fields += ["tie_word_embeddings", "model_type", "max_position_embeddings"]
    fields += ["hidden_act", "pad_token_id", "transformers_version", "auto_map"]
    fields += ["attention_bias", "_name_or_path", "attn_implementation", "layer_types"]
    for field in draw(st.lists(st.sampled_from(fields), max_size=2)):
        config[field] = draw(odd)
    if not draw(st.integers(0, 4)):
        config["quantization_config"] = draw(quantizations)
    if not draw(st.integers(0, 9)):
        config["auto_map"] = _CODE
    return draw(json_text(st.just(config)))


models = _models()
