"""The checkpoints and the table of ``make demo-serve``."""

import pytest
import torch

from integration.demo_serve import checkpoints, table
from llmc_attnmask.checkpoint.inspect import inspect
from llmc_attnmask.serving.recognise import recognise
from tests.support.checkpoints import config_of


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(checkpoints, "LAYERS", 1)
    monkeypatch.setattr(checkpoints, "VOCABULARY", 32)
    shapes = {name: (64, 128) for name in checkpoints.SHAPES}
    monkeypatch.setattr(checkpoints, "SHAPES", shapes)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(x, weights) for x, kinds in checkpoints.TYPES.items() for weights in kinds],
)
def test_a_checkpoint_has_the_zeros_and_the_storage_of_its_name(
    tmp_path, dtype, weights
):
    folder = checkpoints.make(tmp_path, weights, dtype)
    layers = [x for x in inspect(folder) if x.name.endswith("_proj")]
    assert len(layers) == 7
    config = config_of(folder).get("quantization_config", {})
    found = recognise(config)
    for layer in layers:
        names = {"bf16": "bfloat16", "int8": "int8", "int4": "packed"}
        assert layer.format.startswith(names[dtype])
        if weights == "dense":
            assert (layer.sparsity or 0) < 0.05 and found is None
            continue
        assert layer.format.endswith(checkpoints.STORAGES[weights])
        structure = found.structure(layer.name)
        if weights == "2:4":
            assert layer.two_of_four and structure == "2:4"
        else:
            assert layer.sparsity == pytest.approx(0.6, abs=0.03)
            assert structure == "unstructured"
    assert checkpoints.make(tmp_path, weights, dtype) == folder
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_pruning_leaves_exactly_two_of_every_four():
    weight = checkpoints._pruned(torch.ones(8, 16), "2:4")
    assert torch.equal(weight.view(-1, 4).sum(1), torch.full((32,), 2.0))


def test_the_table_has_medians_and_ratios_within_a_round():
    def row(weights: str, rate: list[float], first: list[float], size: float) -> dict:
        rates = {what: rate for what in table.BATCHES}
        name = {"model": "M", "type": "bf16", "weights": weights}
        more = {table.FIRST: first, "bytes": size, "reference": [10, 10, 10]}
        return name | rates | more

    rows = [
        row("dense", [10, 20, 30], [1, 2, 3], 2e9),
        row("2:4", [20, 30, 60], [0.5, 4, 1.5], 1e9),
    ]
    header, _, dense, sparse = table.markdown(rows).splitlines()
    assert header.count("|") == dense.count("|") == sparse.count("|") == 10
    assert (
        dense == "| M | bf16 | dense | 20.0 | 20.0 | 20.0 | 2.00 s | 2.00 GB | 2.00 x |"
    )
    expected = " | ".join(["30.0 (2.00 x)"] * 3)
    assert sparse == (
        f"| M | bf16 | 2:4 | {expected} | 1.50 s (2.00 x) | 1.00 GB (0.50 x) | 3.00 x |"
    )


def test_four_bits_are_packed_from_the_lowest():
    weight = torch.arange(-7, 8).repeat(128 * 16 // 15 + 1)[: 16 * 128].view(16, 128)
    weight[:, 0] = 7  # so that every scale is 1
    stored = checkpoints._stored(weight.float(), "int4")
    assert stored["weight_packed"].shape == (16, 16)
    nibbles = stored["weight_packed"].unsqueeze(2) >> 4 * torch.arange(8) & 15
    assert torch.equal(nibbles.view(16, 128) - 8, weight)


def test_answers_are_shown_beside_what_the_weights_are():
    rows = [
        {"weights": "2:4", "answers": [" Paris. "]},
        {"weights": "x", "answers": []},
    ]
    assert table.answers(rows) == ["2:4: Paris."]
