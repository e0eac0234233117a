import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.oneshot.shipped import MODEL_DIR

TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]


def test_a_written_marker_is_read_back():
    config = {"model_type": "llama"}
    marker.write(config, TARGETS)
    assert marker.read(json.loads(json.dumps(config))) == TARGETS
    assert config["llmc_attnmask"] == {
        "version": 1,
        "sparsity": {"structure": "2:4", "targets": TARGETS},
    }


def test_unstructured_layers_are_named_beside_the_2of4_ones():
    config = {"model_type": "llama"}
    marker.write(config, TARGETS[:1], TARGETS[1:])
    found = json.loads(json.dumps(config))
    assert marker.read(found) == TARGETS[:1]
    assert marker.read_unstructured(found) == TARGETS[1:]
    marker.write(config, [], TARGETS)
    assert marker.read(config) == []
    assert marker.read_unstructured({}) == []


@pytest.mark.parametrize("note", [[], "all", {}, {"targets": "all"}, {"targets": [1]}])
def test_malformed_unstructured_layers_are_refused(note):
    config = {"model_type": "llama"}
    marker.write(config, TARGETS)
    config["llmc_attnmask"]["unstructured"] = note
    with pytest.raises(ValueError, match=r"expected (unstructured|targets) that"):
        marker.read_unstructured(config)


def test_a_config_without_the_marker_has_no_targets():
    assert marker.read({"model_type": "llama"}) is None


def test_writing_no_targets_removes_the_marker():
    config = {"model_type": "llama"}
    marker.write(config, TARGETS)
    marker.write(config, [])
    assert config == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (None, "expected a mapping"),
        ([], "expected a mapping"),
        ({}, "expected version 1"),
        ({"version": 2}, "expected version 1: a newer"),
        ({"version": 1}, 'structure "2:4"'),
        ({"version": 1, "sparsity": {"structure": "4:8", "targets": []}}, "2:4"),
        ({"version": 1, "sparsity": {"structure": "2:4"}}, "list of module names"),
        (
            {"version": 1, "sparsity": {"structure": "2:4", "targets": [1]}},
            "list of module names",
        ),
        (
            {"version": 1, "sparsity": {"structure": "2:4", "targets": "q_proj"}},
            "list of module names",
        ),
    ],
)
def test_a_malformed_marker_is_refused(note, message):
    with pytest.raises(ValueError, match=message):
        marker.read({"llmc_attnmask": note})


def test_plain_transformers_ignores_the_marker_and_keeps_it(tmp_path):
    model = shutil.copytree(MODEL_DIR, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    marker.write(config, TARGETS)
    (model / "config.json").write_text(json.dumps(config))
    marked = AutoModelForCausalLM.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    for (name, a), (_, b) in zip(
        marked.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    AutoConfig.from_pretrained(model).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert marker.read(saved) == TARGETS
