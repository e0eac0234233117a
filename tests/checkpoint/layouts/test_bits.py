import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc_attnmask.checkpoint.layouts import bits, sparse_24_bitmask, sparse_bitmask
from llmc_attnmask.checkpoint.layouts.bits import count_flags, pack_flags, spread


@given(rows=st.integers(0, 5), columns=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_a_bitmask_has_the_bits_in_numpys_little_order(rows, columns, seed):
    flags = (
        torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    )
    bitmask = pack_flags(flags)
    expected = np.packbits(flags.numpy(), axis=-1, bitorder="little")
    assert bitmask.dtype == torch.uint8 and bitmask.shape == expected.shape
    assert (bitmask.numpy() == expected).all()
    assert torch.equal(count_flags(bitmask), flags.sum(1))
    values = torch.arange(1, 1 + int(flags.sum()), dtype=torch.int16)
    dense = torch.zeros(rows, columns, dtype=torch.int16).masked_scatter_(flags, values)
    assert torch.equal(spread(values, bitmask, columns), dense)


def test_every_byte_is_decoded():
    every = torch.arange(256, dtype=torch.uint8).view(1, -1)
    expected = np.unpackbits(every.numpy(), axis=-1, bitorder="little")
    ones = torch.ones(int(expected.sum()), dtype=torch.uint8)
    flags = spread(ones, every, 2048)
    assert (flags.numpy() == expected).all()
    assert torch.equal(pack_flags(flags.bool()), every)


@pytest.mark.parametrize("layout", [sparse_24_bitmask, sparse_bitmask])
def test_layouts_import_only_torch(layout):
    for module in (layout, bits):
        tree = ast.parse(Path(module.__file__).read_text())
        imported = {
            getattr(node, "module", None) or node.names[0].name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        standard = {"collections.abc", "dataclasses", "typing"}
        assert imported <= {*standard, "torch", bits.__name__}
