"""Lines of a dataset and words of a command line."""

from hypothesis import strategies as st

from tests.fuzz.inputs.json_texts import json_text, mutated, values

_rows = values | st.fixed_dictionaries({"text": st.text(max_size=20) | values})

datasets = mutated(
    st.lists(json_text(_rows), max_size=3).map(
        lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")
    )
)

_WORDS = """\
prune eval inspect bench pack unpack --json --only-2of4 --help --recipe --output
--num-samples
--max-length --seed --storage --dataset --text-column --reference --text --resume FOLDER
NEW RECIPE -1 0 nan dense builtin:pydoc [/x]"""

_words = st.sampled_from([*_WORDS.split(), "10" * 30, "\x1b[2J", ""])

arguments = st.lists(_words | st.text(max_size=5), max_size=8)
