"""Recipes."""

import re

from hypothesis import strategies as st

from tests.fuzz.inputs.json_texts import json_text, mutated, values

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
        "ActivationSmoothingModifier",
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
    """Draw a recipe with odd values, aliases or tags, or something else entirely."""
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
