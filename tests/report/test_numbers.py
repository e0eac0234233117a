"""report.json says what happened, and only what its schema allows."""

import json
from importlib.resources import files

import jsonschema
import pytest

from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.report.numbers import missing, of_folder, reduced

SCHEMA = json.loads(
    (files("llmc_attnmask.report") / "schema.json").read_text(encoding="utf-8")
)


def check(report: dict) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(report, SCHEMA, cls=jsonschema.Draft202012Validator)


def test_a_run_fills_the_schema(report):
    check(report)
    by_modifier: dict[str, list[dict]] = {}
    for layer in report["layers"]:
        by_modifier.setdefault(layer["modifier"], []).append(layer)
    assert {name: len(found) for name, found in by_modifier.items()} == {
        "AttentionMatrixPruningModifier": 4,
        "MaskedRecoveryModifier": 2,
    }
    for layer in by_modifier["AttentionMatrixPruningModifier"]:
        assert layer["errors"].keys() == {"q and k", "v and o"}
        assert set(layer["compared"]) == {"ours", "magnitude", "Wanda", "SparseGPT"}
        assert layer["samples"] == 9
        assert layer["zeros"] * 2 == layer["entries"]
        assert {r: len(z) for r, z in layer["zeros_by_head"].items()} == {
            "q": 4,
            "k": 2,
            "v": 2,
            "o": 4,
        }
        assert len({picture["head"] for picture in layer["pictures"]}) == 2
    for layer in by_modifier["MaskedRecoveryModifier"]:
        (errors,) = layer["errors"].values()
        assert len(errors) == 2 and errors[-1] <= errors[0]


def test_the_report_has_everything_needed_to_repeat_the_run(report):
    assert report["options"]["num_samples"] == 9
    assert report["options"]["dataset"].endswith("calibration.txt")
    seeds = {m["name"]: m["fields"].get("seed") for m in report["modifiers"]}
    assert seeds == {
        "AttentionMatrixPruningModifier": 0,
        "SparseGPTModifier": None,
        "MaskedRecoveryModifier": 0,
        "QuantizationModifier": None,
    }
    assert report["base_model"] == str(MODEL_DIR)
    assert {"llmc-attnmask", "torch", "llmcompressor"} <= report["versions"].keys()
    assert "QuantizationModifier" in report["recipe"]


def test_masks_are_counted_after_quantization(report):
    assert len(report["masks"]) == 28
    for mask in report["masks"]:
        assert mask["pruned"] * 2 == mask["entries"]
        assert mask["filled"] == 0
    zeros = {layer["name"]: layer for layer in report["checkpoint"]}
    for mask in report["masks"]:
        on_disk = zeros[mask["layer"]]
        assert on_disk["format"] == "int8" and on_disk["two_of_four"]
        assert on_disk["sparsity"] >= 0.5  # survivors may round to zero


def test_a_token_reads_five_eighths_of_8_bit_sparse_layers(report):
    layers = {x["layer"]: x for x in report["reading"]}
    up = layers["model.layers.0.mlp.up_proj"]
    assert up["sparse"] / up["dense"] == 0.625
    head = layers["lm_head"] if "lm_head" in layers else layers["model.embed_tokens"]
    assert head["sparse"] == head["dense"]
    assert len(layers) == 29


def test_a_checkpoint_of_another_origin_has_a_reduced_report():
    report = reduced() | of_folder(MODEL_DIR)
    check(report)
    assert len(report["checkpoint"]) > 28 and not report["layers"]
    assert any("report.json" in line for line in missing(report))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"extra": 1},
        {"masks": [{"layer": "x"}]},
        {"layers": [{"modifier": "M"}]},
    ],
)
def test_the_schema_refuses_unknown_and_incomplete_content(report, change):
    with pytest.raises(jsonschema.ValidationError):
        check(report | change)
