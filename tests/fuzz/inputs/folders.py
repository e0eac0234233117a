"""Checkpoint folders."""

import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.inputs.configs import PACKED, configs
from tests.fuzz.inputs.json_texts import json_text, mutated, values
from tests.fuzz.inputs.tensors import (
    STORAGES,
    good_tensors,
    safetensors,
    tensor_names,
    wild_tensors,
)

Files = dict[str, bytes]

Folder = dict[str, Any]  # see ``folders``; JSON when its bytes are written as latin-1

_FILES = ["model.safetensors", "a.safetensors", "sub/b.safetensors"]

_paths = st.sampled_from(
    [*_FILES, *_FILES, "../outside/secret", "/etc/passwd", "..\\x", "a\0b", ".", ""]
) | st.text(max_size=6)

_indices = values | st.fixed_dictionaries(
    {"weight_map": values | st.dictionaries(tensor_names, _paths | values, max_size=5)},
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
    """Draw a checkpoint folder: ``files`` by path, ``links`` and ``pipes`` beside them.

    Half of them are good except for one or two things.
    """
    if draw(st.booleans()):
        storage = draw(st.sampled_from(["dense", *STORAGES]))
        content = safetensors(good_tensors(storage))
        good = json.dumps(PACKED.get(storage, {}))
        config = draw(st.just(good) | st.just(good) | json_text(configs))
        files: Files = {
            "model.safetensors": draw(content | mutated(content)),
            "config.json": config.encode("utf-8", "surrogatepass"),
        }
        odds = 8
    else:
        names = draw(st.lists(st.sampled_from(_FILES), max_size=3, unique=True))
        files = {name: draw(mutated(safetensors(wild_tensors()))) for name in names}
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
