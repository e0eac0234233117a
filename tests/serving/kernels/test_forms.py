import pytest
import torch

from llmc_attnmask.serving.kernels import cusparselt, forms, fragments, packing, select
from tests.support.kernels.matrices import DTYPES, random_2of4

BOTH = select.Choice("cuda", "cusparselt", 64, "")


def library_form(weight, span, spare=0):
    """A form that cuSPARSELt may have: values by rows, then metadata, then anything."""
    values, nibbles = packing.kept(weight)
    metadata = fragments.metadata(nibbles, weight.itemsize, span)
    rest = torch.zeros(spare * len(weight), dtype=torch.uint8)
    parts = (values.view(torch.uint8).flatten(), metadata, rest)
    return torch.cat(parts).view(weight.dtype).view(len(weight), -1)


@pytest.fixture
def library(monkeypatch):
    """Stands in for cuSPARSELt, which needs a GPU; the test decides what it makes of a
    weight.
    """

    def use(compress):
        monkeypatch.setattr(cusparselt, "compress", compress)
        monkeypatch.setattr(cusparselt, "prepare", lambda *_, **__: None)

    return use


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", fragments.SPANS)
def test_one_form_serves_both_kernels_if_the_library_uses_a_known_order(
    library, dtype, span
):
    torch.manual_seed(0)
    weight = random_2of4(256, 512, dtype)
    library(lambda w: library_form(w, span, spare=16))
    made = forms.make(weight, BOTH, largest=8192)
    assert made.span == span
    inside = made.compressed.untyped_storage().data_ptr()
    assert made.values.untyped_storage().data_ptr() == inside
    assert made.indices.untyped_storage().data_ptr() == inside
    nibbles = fragments.nibbles(made.indices, 256, 512, dtype.itemsize, span)
    assert torch.equal(
        packing.expand(made.values, nibbles).view(torch.uint8), weight.view(torch.uint8)
    )


def swapped(weight):
    """Nibbles whose two indices are swapped, an order that the kernel does not know."""
    found = library_form(weight, 1).view(torch.uint8).view(-1)
    head = weight.nbytes // 2
    tail = found[head:]
    found[head:] = (tail & 0x33) << 2 | (tail & 0xCC) >> 2
    return found.view(weight.dtype).view(len(weight), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_unknown_order_costs_separate_metadata(library, dtype):
    torch.manual_seed(0)
    weight = random_2of4(128, 512, dtype)
    library(swapped)
    made = forms.make(weight, BOTH, largest=8192)
    assert made.span == 1
    assert made.values.data_ptr() == made.compressed.data_ptr()  # the values are in it
    nibbles = fragments.nibbles(made.indices, 128, 512, dtype.itemsize, 1)
    assert torch.equal(packing.expand(made.values, nibbles).float(), weight.float())


def test_values_in_another_order_are_stored_twice(library):
    torch.manual_seed(0)
    weight = random_2of4(128, 512, torch.bfloat16)
    library(lambda w: library_form(w.flip(0), 1))
    made = forms.make(weight, BOTH, largest=8192)
    assert made.values.data_ptr() != made.compressed.data_ptr()
    assert torch.equal(made.values, packing.kept(weight)[0])


@pytest.mark.parametrize(("rows", "columns"), [(64, 512), (128, 192)])
def test_shapes_that_the_kernel_pads_are_not_shared(rows, columns):
    weight = random_2of4(rows, columns, torch.bfloat16)
    compressed = torch.zeros(rows, columns, dtype=torch.bfloat16)
    assert forms.shared_span(compressed, weight) is None


def test_the_library_may_keep_other_entries_of_a_group_with_more_zeros(library):
    """Which zeros the library keeps is its own choice."""
    weight = torch.zeros(128, 512, dtype=torch.bfloat16)
    weight[:, ::4] = 1

    def compress(w):
        mask = torch.zeros_like(w, dtype=torch.bool)
        mask[:, ::4] = mask[:, 1::4] = True
        nibbles = torch.full((128, 128), 0 | 1 << 2, dtype=torch.uint8)
        values = w[mask].view(128, -1)
        parts = (values.view(torch.uint8).flatten(), fragments.metadata(nibbles, 2))
        return torch.cat(parts).view(w.dtype).view(128, -1)

    library(compress)
    assert packing.kept(weight)[1][0, 0] != 0 | 1 << 2  # this package chooses another
    assert forms.make(weight, BOTH, largest=8192).span == 1
    assert forms.shared_span(compress(weight), weight) == 1
