"""What a type checker sees of the public names; mypy reads this file, nothing runs it.

A name that lost its type would be ``Any``, which these assertions reject.
"""

from collections.abc import Callable
from pathlib import Path
from typing import assert_type

from transformers import PreTrainedModel

import llmc_attnmask as package
from llmc_attnmask.checkpoint.convert import Conversion
from llmc_attnmask.checkpoint.inspect import LayerInfo
from llmc_attnmask.evaluation.perplexity import Evaluation
from llmc_attnmask.modifiers import MaskedGPTQModifier


def public_names(folder: Path) -> None:
    assert_type(package.prune(folder, "recipe.yaml", folder), Path)
    assert_type(package.evaluate([folder]), list[Evaluation])
    assert_type(package.inspect(folder), list[LayerInfo])
    assert_type(package.pack(folder, folder, only_2of4=True), Conversion)
    assert_type(package.unpack(folder, folder), Conversion)
    assert_type(package.MaskedGPTQModifier, type[MaskedGPTQModifier])
    load: Callable[[Path], PreTrainedModel] = package.load
    load(folder)
    package.prune(folder, "r.yaml", folder, storage="sparse")  # type: ignore[arg-type]
    package.inspect(3)  # type: ignore[arg-type]
