import itertools

import pytest
import torch

from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask, sparse_bitmask
from llmc_attnmask.serving.loading import ShardLoader
from tests.support.kernels.matrices import random_2of4

LAYOUTS = (sparse_24_bitmask, sparse_bitmask)


def _loader(
    shards: int, layout=sparse_24_bitmask, dtype=torch.bfloat16
) -> tuple[ShardLoader, dict]:
    delivered = {}
    loader = ShardLoader(
        "qkv_proj",
        layout.NAME,
        shards,
        torch.empty(0, dtype=dtype),
        lambda dense, shard: delivered.update({shard: dense}),
    )
    return loader, delivered


def _receive(loader: ShardLoader, part: str, tensor: torch.Tensor, *shard) -> None:
    loader.loader(part)(torch.nn.Parameter(torch.empty(0)), tensor, *shard)


@pytest.mark.parametrize(
    ("layout", "order"),
    [
        (layout, order)
        for layout in LAYOUTS
        for order in itertools.permutations(layout.Packed._fields)
    ],
    ids=str,
)
def test_a_shard_is_delivered_when_its_last_part_arrives(layout, order):
    weight = random_2of4(4, 16, torch.bfloat16)
    packed = layout.pack(weight)._asdict()
    loader, delivered = _loader(1, layout)
    for part in order:
        assert not delivered
        _receive(loader, part, packed[part])
    assert torch.equal(delivered[None], weight)
    loader.check_complete()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("on_tensor", [True, False])
def test_shards_may_be_interleaved(on_tensor, layout):
    weights = {shard: random_2of4(4, 16, torch.int8) for shard in ("q", "k", 0)}
    loader, delivered = _loader(3, layout, torch.int8)
    for part in layout.Packed._fields:
        for shard, weight in weights.items():
            tensor = layout.pack(weight)._asdict()[part]
            if on_tensor:  # as vLLM's newer loaders do it
                tensor.shard_id = shard
                _receive(loader, part, tensor)
            else:
                _receive(loader, part, tensor, shard)
    for shard, weight in weights.items():
        assert torch.equal(delivered[shard], weight)
        assert delivered[shard].shard_id == shard
    loader.check_complete()


def test_a_missing_part_is_named():
    loader, _ = _loader(1)
    packed = sparse_24_bitmask.pack(random_2of4(4, 16, torch.bfloat16))
    _receive(loader, "compressed", packed.compressed, "k")
    with pytest.raises(ValueError, match=r"part k of qkv_proj .* no bitmask, shape"):
        loader.check_complete()


def test_a_missing_shard_is_counted():
    loader, _ = _loader(2, dtype=torch.int8)
    for part, tensor in (
        sparse_24_bitmask.pack(random_2of4(4, 16, torch.int8))._asdict().items()
    ):
        _receive(loader, part, tensor, "q")
    with pytest.raises(ValueError, match=r"2 packed parts .* has 1"):
        loader.check_complete()


def test_a_broken_bitmask_is_reported_with_its_layer():
    loader, _ = _loader(1)
    packed = sparse_24_bitmask.pack(random_2of4(4, 16, torch.bfloat16))
    _receive(loader, "compressed", packed.compressed, "v")
    _receive(loader, "shape", packed.shape, "v")
    with pytest.raises(ValueError, match="part v of qkv_proj cannot be unpacked"):
        _receive(loader, "bitmask", packed.bitmask ^ 1, "v")


def test_row_offsets_that_go_back_are_reported_with_their_layer():
    loader, _ = _loader(1, sparse_bitmask)
    packed = sparse_bitmask.pack(random_2of4(4, 16, torch.bfloat16))._asdict()
    offsets = packed.pop("row_offsets")
    for part, tensor in packed.items():
        _receive(loader, part, tensor, "v")
    with pytest.raises(
        ValueError, match="part v of qkv_proj cannot be unpacked: a row"
    ):
        _receive(loader, "row_offsets", offsets.flip(0), "v")


@pytest.mark.parametrize(
    ("stored", "expected", "fits"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.float16, torch.bfloat16, True),
        (torch.int8, torch.bfloat16, False),
        (torch.bfloat16, torch.int8, False),
        (torch.float8_e4m3fn, torch.bfloat16, False),
    ],
)
def test_values_of_another_kind_than_config_json_describes_are_refused(
    stored, expected, fits
):
    loader, delivered = _loader(1, dtype=expected)
    packed = sparse_24_bitmask.pack(random_2of4(4, 16, stored))._asdict()
    values = packed.pop("compressed")
    for part, tensor in packed.items():
        _receive(loader, part, tensor)
    if fits:
        _receive(loader, "compressed", values)
        assert delivered[None].dtype == stored
    else:
        with pytest.raises(
            ValueError, match=f"values of {stored}; expected {expected}"
        ):
            _receive(loader, "compressed", values)
