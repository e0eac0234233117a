import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmc_attnmask.checkpoint.layouts import bits
from llmc_attnmask.checkpoint.layouts.bits import bits_of
from llmc_attnmask.checkpoint.layouts.sparse_24_bitmask import (
    NotTwoOfFourError,
    crowded_groups,
    pack,
    unpack,
)
from tests.support.checkpoints import DTYPES, raw


@st.composite
def weights(draw):
    """Any bits in any dtype, with at most ``most`` non-zero entries per group."""
    dtype = draw(st.sampled_from(DTYPES))
    rows = draw(st.integers(0, 5))
    columns = 4 * draw(st.integers(1, 9))
    most = draw(st.sampled_from([0, 1, 2]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count = rows * columns
    values = torch.randint(0, 256, (count * dtype.itemsize,), generator=random)
    weight = values.to(torch.uint8).view(dtype).view(rows, columns)
    order = torch.rand(count // 4, 4, generator=random).argsort(1)
    kept = (order < most).view(rows, columns)
    return where(kept, weight)


def where(kept: Tensor, weight: Tensor) -> Tensor:
    """Fill with +0.0 by way of bits: float8 has no masked_fill."""
    bits = bits_of(weight)
    return bits.masked_fill(~kept, 0).view(weight.dtype)


def kept_entries(weight: torch.Tensor) -> torch.Tensor:
    """Return the mask that ``pack`` uses by default, bool [rows, columns]."""
    packed = pack(weight)
    ones = torch.ones(packed.compressed.shape, dtype=torch.uint8)
    return unpack(ones, packed.bitmask, packed.shape).bool()


@given(weights())
def test_every_bit_survives_a_round_trip(weight):
    assert raw(unpack(*pack(weight))) == raw(weight)
    assert crowded_groups(weight) == 0


@given(weights())
def test_the_encoding_matches_its_documentation(weight):
    rows, columns = weight.shape
    kept = kept_entries(weight)
    assert kept.view(-1, 4).sum(-1).eq(2).all()
    packed = pack(weight)
    expected = np.packbits(kept.numpy(), axis=-1, bitorder="little")
    assert (packed.bitmask.numpy() == expected).all()
    bits = bits_of(weight)
    assert raw(packed.compressed) == raw(bits[kept])
    assert packed.compressed.dtype == weight.dtype
    assert packed.shape.tolist() == [[rows], [columns]]
    assert packed.shape.dtype == torch.int64


@given(weights(), st.integers(0, 2**32))
def test_an_explicit_mask_decides_and_may_keep_zeros(weight, seed):
    groups = weight.numel() // 4
    chosen = torch.rand(groups, 4, generator=torch.Generator().manual_seed(seed))
    kept = (chosen.argsort(1) < 2).view(weight.shape)
    packed = pack(weight, kept)
    assert raw(unpack(*packed)) == raw(where(kept, weight))
    flags = np.unpackbits(packed.bitmask.numpy(), axis=-1, bitorder="little")
    assert (flags[:, : weight.shape[1]].astype(bool) == kept.numpy()).all()


def test_a_group_with_more_zeros_keeps_the_entries_that_topk_would():
    weight = torch.zeros(5, 4)
    weight[1:] = torch.eye(4)
    kept = kept_entries(weight)
    assert [row.nonzero().flatten().tolist() for row in kept] == [
        [2, 3],
        [0, 2],
        [1, 3],
        [2, 3],
        [2, 3],
    ]
    assert torch.equal(unpack(*pack(weight)), weight)


def test_values_that_arithmetic_would_lose_survive():
    int8 = torch.tensor([[-128, 0, 0, 127]], dtype=torch.int8)
    assert torch.equal(unpack(*pack(int8)), int8)
    nan = torch.tensor([[0x7FC00001, 0, -0x80000000, 0]], dtype=torch.int32)
    assert raw(unpack(*pack(nan.view(torch.float32)))) == raw(nan)


def test_minus_zero_is_a_value():
    weight = torch.tensor([[1.0, -0.0, 2.0, 0.0]])
    assert crowded_groups(weight) == 1
    with pytest.raises(
        NotTwoOfFourError, match=r"row 0 has more than two entries that are not \+0.0"
    ):
        pack(weight)


def test_rows_beyond_the_first_block_are_encoded_too(monkeypatch):
    monkeypatch.setattr(bits, "_BLOCK", 24)
    weight = where(torch.arange(8).expand(11, 8) % 4 < 2, torch.randn(11, 8))
    assert raw(unpack(*pack(weight))) == raw(weight)
    weight[7, 6] = 1
    with pytest.raises(NotTwoOfFourError, match=r"row 7 .* columns 0 to 7"):
        pack(weight)


def test_a_strided_view_is_packed_like_its_copy():
    kept = torch.rand(4, 8, 4).argsort(-1) < 2
    weight = where(kept.view(4, 32), torch.randn(4, 32))
    assert raw(unpack(*pack(weight.T.contiguous().T))) == raw(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_meta_tensors_give_shapes_and_dtypes(dtype):
    weight = torch.empty(3, 12, dtype=dtype, device="meta")
    packed = pack(weight)
    assert packed.compressed.is_meta and packed.bitmask.is_meta
    assert packed.compressed.shape == (3, 6) and packed.bitmask.shape == (3, 2)
    for shape in (packed.shape, (3, 12), packed.shape.to("meta")):
        restored = unpack(packed.compressed, packed.bitmask, shape)
        assert restored.is_meta and restored.shape == (3, 12)
        assert restored.dtype == dtype


@pytest.mark.parametrize(
    ("weight", "kept", "message"),
    [
        (torch.ones(2, 6), None, "6 inputs are not divisible by 4"),
        (torch.ones(2, 8), None, "row 0 has more than two entries that"),
        (torch.ones(8), None, "expected two dimensions"),
        (torch.zeros(2, 8).double(), None, "8 bytes per entry"),
        (torch.ones(1, 4), torch.eye(4)[:1].bool(), "more or fewer than two kept"),
        (torch.ones(1, 4), torch.ones(1, 4).bool(), "more or fewer than two kept"),
        (torch.ones(1, 4), torch.ones(1, 8).bool(), r"expected torch.bool \[1, 4\]"),
        (torch.ones(1, 4), torch.ones(1, 4), "the mask is torch.float32"),
    ],
)
def test_a_weight_or_mask_that_is_not_two_of_four_is_refused(weight, kept, message):
    with pytest.raises(ValueError, match=message):
        pack(weight, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": torch.tensor([[2], [16]])}, "disagree"),
        ({"shape": torch.tensor([[3], [12]])}, "disagree"),
        ({"bitmask": torch.zeros(2, 1, dtype=torch.uint8)}, "disagree"),
        ({"compressed": torch.ones(2, 7)}, "disagree"),
        ({"compressed": torch.ones(6)}, "two dimensions"),
        ({"compressed": torch.ones(2, 6).double()}, "8 bytes"),
        ({"bitmask": torch.zeros(2, 2, dtype=torch.int8)}, "expected torch.uint8"),
        (
            {"bitmask": torch.zeros(2, 2, dtype=torch.uint8)},
            "row 0 has more or fewer than two bits",
        ),
        ({"bitmask": torch.tensor([[51, 3], [51, 7]], dtype=torch.uint8)}, "row 1 has"),
        ({"bitmask": torch.tensor([[51, 3], [51, 51]], dtype=torch.uint8)}, "beyond"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change, message):
    packed = {
        "compressed": torch.ones(2, 6),
        "bitmask": torch.tensor([[51, 3]] * 2, dtype=torch.uint8),
        "shape": torch.tensor([[2], [12]]),
    }
    assert unpack(**packed).sum() == 12
    with pytest.raises(ValueError, match=message):
        unpack(**(packed | change))
