"""JSON and configs that broke a reader, or could: each once."""

import pytest

from llmc_attnmask.checkpoint.convert import to_packed
from llmc_attnmask.serving.recognise import annotate, recognise
from llmc_attnmask.text.dataset import DatasetError, load_texts
from tests.support.checkpoints import change_config

DEEP = ["[" * 100_000, '{"a":' * 400 + "1" + "}" * 400]


@pytest.mark.parametrize("content", [*DEEP, "9" * 5000, "\ufeff{}", "nul", ""])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_unusable_json_is_refused(dense, name, content):
    (dense / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        to_packed(dense, dense.parent / "out")


@pytest.mark.parametrize("line", [*DEEP, "9" * 5000])
def test_unusable_lines_are_named(tmp_path, line):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    with pytest.raises(DatasetError, match=r"d\.jsonl:2 is not JSON"):
        list(load_texts(path))


@pytest.mark.parametrize("names", [5, True, "Linear", {"a": 1}, [1], [None], ["re:("]])
@pytest.mark.parametrize("key", ["targets", "ignore"])
def test_targets_that_are_not_module_names_are_refused_by_the_server(names, key):
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    config = {"quant_method": "compressed-tensors"}
    with pytest.raises(ValueError, match=f"sparsity_config with {key}"):
        recognise(config | {"sparsity_config": sparsity | {key: names}})


def test_a_pattern_that_takes_forever_is_an_error():
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    config = {"quant_method": "compressed-tensors"}
    evil = {"sparsity_config": sparsity | {"targets": ["re:(a|a)*$"]}}
    found = recognise(config | evil)
    with pytest.raises(ValueError, match="takes more than 1 s"):
        found.is_packed("a" * 60 + "!")


@pytest.mark.parametrize("quantization", [5, "x", [1], [["a", "b", "c"]]])
def test_a_quantization_config_that_is_not_a_mapping_is_refused(dense, quantization):
    note = {"version": 1, "sparsity": {"structure": "2:4", "targets": ["a"]}}
    config = {"quantization_config": quantization, "llmc_attnmask": note}
    with pytest.raises(
        ValueError, match=r"quantization_config that is (no|not a) mapping"
    ):
        annotate(dict(config))
    change_config(dense, **config)
    with pytest.raises(ValueError, match="quantization_config that is not a mapping"):
        to_packed(dense, dense.parent / "out")
