"""Which layers are packed."""

import json
import re
import warnings

import pytest
import torch

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.checkpoint.convert import to_dense, to_packed
from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask
from llmc_attnmask.checkpoint.selection import CheckpointWarning, NothingToPackError
from tests.support.checkpoints import NAMES, Q, decoder, digests, two_of_four, write

pytestmark = pytest.mark.usefixtures("small_blocks")


def test_a_layer_that_is_not_2of4_is_named(tmp_path):
    tensors = decoder()
    weight = tensors[f"{Q}.weight"]
    weight[9, 4:8] = 1
    weight[15] = 1
    dense = write(tmp_path / "dense", tensors)
    message = rf"{re.escape(Q)}\.weight in .* is not 2:4: 5 of its 64 groups .*--only"
    with pytest.raises(sparse_24_bitmask.NotTwoOfFourError, match=message):
        to_packed(dense, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_layers_that_the_marker_names_are_packed_and_must_be_2of4(tmp_path):
    tensors = decoder()
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(1)
    dense = write(tmp_path / "dense", tensors)
    named = [n.removesuffix(".weight") for n in tensors if "mlp" in n or "o_proj" in n]
    named.remove("model.layers.0.mlp.down_proj")
    config = json.loads((dense / "config.json").read_text())
    marker.write(config, named)
    (dense / "config.json").write_text(json.dumps(config))
    conversion = to_packed(dense, tmp_path / "packed")
    assert sorted(conversion.layers) == sorted(named)
    marker.write(config, [*named, "model.layers.0.mlp.down_proj"])
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        sparse_24_bitmask.NotTwoOfFourError, match=r"0\.mlp\.down_proj.* is not"
    ):
        to_packed(dense, tmp_path / "again")
    marker.write(config, ["layers.9.mlp.down_proj"])
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names layers\.9\.mlp\.down_proj as 2:4"):
        to_packed(dense, tmp_path / "again")


def test_a_number_of_inputs_not_divisible_by_four_is_named(tmp_path):
    tensors = {"h.0.fc.weight": torch.zeros(2, 6), "h.1.fc.weight": torch.zeros(2, 8)}
    dense = write(tmp_path / "dense", tensors)
    with pytest.raises(
        sparse_24_bitmask.NotTwoOfFourError, match=r"h\.0\.fc.* 6 inputs are not"
    ):
        to_packed(dense, tmp_path / "packed")
    conversion = to_packed(dense, tmp_path / "packed", only_2of4=True)
    assert conversion.layers == ["h.1.fc"]


def test_only_2of4_layers_are_packed_and_fused_layers_only_together(tmp_path):
    tensors = decoder()
    for name in ("0.self_attn.k_proj", "0.mlp.down_proj", "1.mlp.up_proj"):
        tensors[f"model.layers.{name}.weight"].fill_(1)
    dense = write(tmp_path / "dense", tensors)
    with pytest.warns(CheckpointWarning) as caught:
        conversion = to_packed(dense, tmp_path / "packed", only_2of4=True)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert messages[0] == (
        "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj stay dense: "
        "servers fuse them with model.layers.0.self_attn.k_proj, which cannot be packed"
    )
    assert "model.layers.1.mlp.gate_proj stay dense" in messages[1]
    dense_layers = {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    }
    assert set(conversion.layers) == set(NAMES) - dense_layers
    to_dense(tmp_path / "packed", tmp_path / "restored")
    assert digests(tmp_path / "restored") == digests(dense)


def test_modules_that_are_already_fused_are_packed(tmp_path):
    tensors = {
        "layers.0.self_attn.qkv_proj.weight": two_of_four(24, 8),
        "layers.0.mlp.gate_up_proj.weight": two_of_four(16, 8),
        "layers.1.mlp.gate_up_proj.weight": torch.ones(16, 8),
    }
    dense = write(tmp_path / "dense", tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conversion = to_packed(dense, tmp_path / "packed", only_2of4=True)
    assert len(conversion.layers) == 2


def test_routers_and_embeddings_are_not_expected_to_be_2of4(tmp_path):
    tensors = decoder() | {"model.layers.0.mlp.gate.weight": torch.ones(4, 16)}
    dense = write(tmp_path / "dense", tensors)
    assert sorted(to_packed(dense, tmp_path / "packed").layers) == sorted(NAMES)


def test_minus_zero_as_a_pruned_entry_is_not_2of4(tmp_path):
    weight = two_of_four(4, 8).masked_fill(torch.zeros(4, 8).bool(), 0)
    weight[weight == 0] = -0.0
    dense = write(tmp_path / "dense", {"h.0.fc.weight": weight})
    with pytest.raises(
        sparse_24_bitmask.NotTwoOfFourError, match=r"that are not \+0\.0"
    ):
        to_packed(dense, tmp_path / "packed")


def test_integers_packed_into_words_cannot_be_packed(tmp_path):
    tensors = {"layers.0.fc.weight_packed": torch.ones(8, 2, dtype=torch.int32)}
    dense = write(tmp_path / "dense", tensors)
    with pytest.raises(NothingToPackError, match="W4A16"):
        to_packed(dense, tmp_path / "packed")


def test_a_dense_model_has_nothing_to_pack(tmp_path):
    dense = write(tmp_path / "dense", {"h.0.fc.weight": torch.ones(4, 8)})
    with pytest.raises(NothingToPackError, match=r"no Linear of its decoder .* is 2:4"):
        to_packed(dense, tmp_path / "packed", only_2of4=True)


def test_any_mask_is_packed_where_an_eighth_is_zero(tmp_path):
    names = {"model.layers.0.mlp.up_proj": 8, "model.layers.0.mlp.down_proj": 7}
    tensors = {"lm_head.weight": torch.zeros(4, 16)}
    for name, zeros in names.items():
        tensors[f"{name}.weight"] = torch.ones(4, 16)
        tensors[f"{name}.weight"].view(-1)[-zeros:] = 0
    dense = write(tmp_path / "dense", tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # gate_proj, fused with up_proj, may be dense
        packed = to_packed(dense, tmp_path / "packed", storage="sparse-bitmask")
    assert packed.layers == ["model.layers.0.mlp.up_proj"]
    to_dense(tmp_path / "packed", tmp_path / "restored")
    assert digests(tmp_path / "restored") == digests(dense)


def test_minus_zero_is_no_zero_of_any_mask(tmp_path):
    weight = torch.full((4, 8), -0.0)
    dense = write(tmp_path / "dense", {"h.0.fc.weight": weight})
    with pytest.raises(NothingToPackError, match=r"in no Linear .* are 12\.5% of"):
        to_packed(dense, tmp_path / "packed", storage="sparse-bitmask")
