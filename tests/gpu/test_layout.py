"""Any layout of metadata is found by probing."""

import pytest
import torch

from integration.gpu.steps import layout
from llmc_attnmask.serving.kernels import packing

ROWS, COLUMNS = 64, 128
GROUPS = COLUMNS // 4


def compressing(order: torch.Tensor):
    """A library that stores the nibbles of all groups in this order."""

    def compress(weight):
        values, nibbles = packing.kept(weight)
        ordered = nibbles.view(-1)[order]
        stored = ordered[0::2] | ordered[1::2] << 4
        flat = torch.cat([values.view(torch.uint8).view(-1), stored])
        return flat.view(weight.dtype).view(ROWS, -1)

    return compress


def tiled() -> torch.Tensor:
    """Tiles of 32 rows and 8 groups."""
    numbers = torch.arange(ROWS * GROUPS).view(ROWS // 32, 32, GROUPS // 8, 8)
    return numbers.permute(0, 2, 1, 3).reshape(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "order",
    [
        torch.arange(ROWS * GROUPS),
        tiled(),
        torch.randperm(ROWS * GROUPS, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["by rows", "tiles", "at random"],
)
def test_the_order_of_the_groups_is_found(dtype, order):
    found = layout.of(compressing(order), dtype, ROWS, COLUMNS, "cpu")
    assert found["regular"] and found["groups"] == order.tolist()
    assert found["metadata_bytes"] == ROWS * GROUPS // 2
    assert found["codes"] == {
        f"{first}{second}": first | second << 2 for first, second in layout.PAIRS
    }


def test_metadata_that_are_not_nibbles_are_reported_as_irregular():
    def compress(weight):
        values, nibbles = packing.kept(weight)
        bits = torch.stack([nibbles & 3, nibbles >> 2], dim=-1)
        halves = torch.cat([bits[..., 0], bits[..., 1]]).view(-1)  # apart
        pairs = halves.view(-1, 4)
        stored = sum(pairs[:, i] << 2 * i for i in range(4)).to(torch.uint8)
        flat = torch.cat([values.view(torch.uint8).view(-1), stored])
        return flat.view(weight.dtype).view(ROWS, -1)

    found = layout.of(compress, torch.bfloat16, ROWS, COLUMNS, "cpu")
    assert not found["regular"]
