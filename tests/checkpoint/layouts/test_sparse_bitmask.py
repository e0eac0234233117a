import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc_attnmask.checkpoint.layouts import bits
from llmc_attnmask.checkpoint.layouts.bits import bits_of
from llmc_attnmask.checkpoint.layouts.sparse_bitmask import (
    PartsDisagreeError,
    pack,
    unpack,
)
from tests.support.checkpoints import DTYPES, raw


@st.composite
def weights(draw):
    """Any bits in any dtype, with any share of zeros, rows without entries included."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, columns = draw(st.integers(0, 6)), draw(st.integers(0, 40))
    density = draw(st.sampled_from([0, 0.1, 0.5, 0.9, 1]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randint(0, 256, (rows * columns * dtype.itemsize,), generator=random)
    weight = values.to(torch.uint8).view(dtype).view(rows, columns)
    pruned = torch.rand(rows, columns, generator=random) >= density
    bits_of(weight).masked_fill_(pruned, 0)
    return weight


@given(weights())
def test_every_bit_survives_a_round_trip(weight):
    restored = unpack(*pack(weight))
    assert restored.dtype == weight.dtype and restored.shape == weight.shape
    assert raw(restored) == raw(weight)


@given(weights())
def test_the_encoding_matches_its_documentation(weight):
    packed = pack(weight)
    found = bits_of(weight).numpy()
    assert raw(packed.compressed) == found[found != 0].tobytes()
    assert packed.compressed.dtype == weight.dtype
    bitmask = np.packbits(found != 0, axis=-1, bitorder="little")
    assert (packed.bitmask.numpy() == bitmask).all()
    assert packed.shape.dtype == packed.row_offsets.dtype == torch.int64
    assert packed.shape.tolist() == list(weight.shape)
    starts = [int((found[:row] != 0).sum()) for row in range(len(found))]
    assert packed.row_offsets.tolist() == starts


def test_minus_zero_and_nan_are_entries():
    weight = torch.tensor([[0x7FC00001, 0, -0x80000000, 0]], dtype=torch.int32)
    weight = weight.view(torch.float32)
    packed = pack(weight)
    assert len(packed.compressed) == 2
    assert raw(unpack(*packed)) == raw(weight)


def test_rows_beyond_the_first_block_are_encoded_too(monkeypatch):
    monkeypatch.setattr(bits, "_BLOCK", 24)
    weight = torch.randn(11, 13)
    weight[weight < 0.5] = 0
    packed = pack(weight)
    assert raw(unpack(*packed)) == raw(weight)
    packed.row_offsets[7] += 1
    with pytest.raises(PartsDisagreeError, match="row_offsets"):
        unpack(*packed)


def test_a_strided_view_is_packed_like_its_copy():
    weight = torch.randn(4, 32).relu()
    assert raw(unpack(*pack(weight.T.contiguous().T))) == raw(weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(8), "expected two dimensions"),
        (torch.zeros(2, 8).double(), "8 bytes per entry"),
        (torch.zeros(2, 8, device="meta"), "on meta; expected"),
    ],
)
def test_other_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        pack(weight)


def _uint8(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": torch.tensor([2, 20])}, "disagree"),
        ({"shape": torch.tensor([3, 12])}, "disagree"),
        ({"shape": torch.tensor([2, -12])}, "disagree"),
        ({"shape": torch.tensor([24])}, "disagree"),
        ({"bitmask": _uint8([51], [51])}, "disagree"),
        ({"row_offsets": torch.tensor([0])}, "disagree"),
        ({"compressed": torch.ones(2, 5)}, "disagree"),
        ({"compressed": torch.ones(10).double()}, "8 bytes"),
        ({"bitmask": _uint8([51, 1], [51, 1]).char()}, "expected torch.uint8, torch.i"),
        ({"row_offsets": torch.tensor([0.0, 5.0])}, "expected torch.uint8, torch.i"),
        ({"shape": torch.tensor([2.0, 12.0])}, "expected torch.uint8, torch.int64"),
        ({"compressed": torch.ones(9)}, "at least 10 bits set, .* 9 values"),
        ({"compressed": torch.ones(11)}, "has 10 bits set, .* 11 values"),
        ({"bitmask": _uint8([51, 1], [51, 3])}, "at least 11 bits set, .* 10 values"),
        ({"bitmask": _uint8([51, 1], [51, 0])}, "has 9 bits set, .* 10 values"),
        ({"bitmask": _uint8([51, 0], [51, 3])}, "value 5 .* at 4 according"),
        ({"bitmask": _uint8([51, 1], [51, 16])}, "beyond column 12"),
        ({"row_offsets": torch.tensor([0, 4])}, "value 4 .* at 5 according"),
        ({"row_offsets": torch.tensor([5, 0])}, "value 5 .* at 0 according"),
        ({"row_offsets": torch.tensor([0, -(2**63)])}, "according to row_offsets"),
        ({"row_offsets": torch.tensor([0, 2**62])}, "according to row_offsets"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change, message):
    packed = {
        "compressed": torch.ones(10),
        "bitmask": _uint8([51, 1], [51, 1]),
        "shape": torch.tensor([2, 12]),
        "row_offsets": torch.tensor([0, 5]),
    }
    assert unpack(**packed).sum() == 10
    with pytest.raises(ValueError, match=message):
        unpack(**(packed | change))
