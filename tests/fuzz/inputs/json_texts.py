"""JSON of any shape, and bytes that have been damaged."""

import json

from hypothesis import strategies as st

ODD_NUMBERS = [-1, 0, 2**31, 2**62, 2**63, 2**64, 10**18, 0.5, None, "4", [4], True]

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
    """Draw JSON of the content, most of the time."""
    return st.one_of(
        content.map(json.dumps),
        content.map(json.dumps),
        content.map(json.dumps),
        st.sampled_from(SPECIAL_JSON),
        st.text(max_size=20),
    )


def mutated(content: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Draw the content, unchanged, cut off, extended or with some bytes replaced."""

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
