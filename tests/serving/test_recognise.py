import pytest

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.serving.recognise import METHOD, Sparsity, annotate, recognise

NAMES = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"]
PACKED = {
    "format": "sparse-24-bitmask",
    "sparsity_structure": "2:4",
    "targets": NAMES,
    "ignore": [],
}


def _quantization(**sparsity) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "sparsity_config": PACKED | sparsity,
    }


def test_a_dense_checkpoint_gets_a_quantization_config_that_names_this_package():
    config = {"model_type": "llama"}
    marker.write(config, NAMES)
    assert annotate(config)
    assert config["quantization_config"]["quant_method"] == METHOD
    assert recognise(config["quantization_config"]) == Sparsity(
        two_of_four=tuple(NAMES)
    )


def test_a_quantized_checkpoint_keeps_its_quantization_config():
    config = {"quantization_config": {"quant_method": "compressed-tensors", "a": 1}}
    marker.write(config, NAMES)
    assert annotate(config)
    found = config["quantization_config"]
    assert found["quant_method"] == "compressed-tensors" and found["a"] == 1
    assert recognise(found) == Sparsity(two_of_four=tuple(NAMES))


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": {"quant_method": "fp8"}}]
)
def test_other_checkpoints_are_left_alone(config):
    before = dict(config)
    assert not annotate(config)
    assert config == before


def test_one_checkpoint_may_have_packed_and_dense_layers():
    config = {"quantization_config": _quantization()}
    marker.write(config, ["lm_head"])
    annotate(config)
    found = recognise(config["quantization_config"])
    assert found == Sparsity(
        two_of_four=("lm_head",), packed=tuple(NAMES), storage="sparse-24-bitmask"
    )
    assert found.is_sparse("lm_head") and not found.is_packed("lm_head")
    assert found.is_packed(NAMES[0])
    assert not found.is_sparse("model.layers.0.mlp.down_proj")


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed-tensors", "sparsity_config": {}},
        {"quant_method": "compressed-tensors"},
        _quantization(targets=[]),
        _quantization(format="marlin-24"),
        _quantization(sparsity_structure="unstructured"),
        _quantization() | {"quant_method": "fp8"},
    ],
)
def test_foreign_formats_are_not_recognized(quantization):
    assert recognise(quantization) is None


def test_patterns_classes_and_ignored_names_match():
    found = recognise(_quantization(targets=["re:.*up_proj$"], ignore=["b.up_proj"]))
    assert found.is_packed("a.up_proj")
    assert not found.is_packed("b.up_proj") and not found.is_packed("a.down_proj")
    everything = recognise(_quantization(targets=["Linear"], ignore=["lm_head"]))
    assert everything.is_packed("anything") and not everything.is_packed("lm_head")


def test_a_malformed_marker_is_an_error():
    with pytest.raises(ValueError, match=marker.KEY):
        annotate({marker.KEY: {"version": 99}})


def test_the_marker_says_which_layers_stored_with_any_mask_are_2of4():
    structure = {"format": "sparse-bitmask", "sparsity_structure": "unstructured"}
    config = {"quantization_config": _quantization(**structure)}
    marker.write(config, NAMES[:1], NAMES[1:])
    annotate(config)
    found = recognise(config["quantization_config"])
    assert found.storage == "sparse-bitmask" and all(map(found.is_packed, NAMES))
    assert [found.structure(name) for name in NAMES] == ["2:4", "unstructured"]


def test_without_a_marker_layers_stored_with_any_mask_are_unstructured():
    for structure in ("unstructured", "0:0", "2:4", None):
        found = recognise(
            _quantization(format="sparse-bitmask", sparsity_structure=structure)
        )
        assert [found.structure(name) for name in NAMES] == ["unstructured"] * 2
