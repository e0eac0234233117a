import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc_attnmask.calibration.samples import SampleTensors


@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.bfloat16, torch.float32, torch.int64, torch.bool]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_tensors_written_in_any_order_are_read_back_to_the_bit(specs, random):
    tensors = [(torch.randn(shape) * 9).to(dtype) for dtype, shape in specs]
    order = list(range(len(tensors)))
    random.shuffle(order)
    stored = SampleTensors("disk")
    for index in order:
        stored[index] = tensors[index]
    assert len(stored) == len(tensors)
    for index, (read, tensor) in enumerate(zip(stored, tensors, strict=True)):
        assert torch.equal(read, tensor)
        assert read.dtype == tensor.dtype
        assert stored.shape(index) == tensor.shape


def test_views_of_a_batch_are_written_as_they_appear():
    batch = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)
    stored = SampleTensors("disk")
    for sample in batch.split(1):
        stored.append(sample)
    assert torch.equal(torch.cat(stored[:]), batch)


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_nothing_remains_in_the_temporary_folder_not_even_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = open_files()
    stored = SampleTensors("disk")
    stored.append(torch.ones(1000))
    assert stored[0].sum() == 1000
    assert not list(tmp_path.iterdir())
    assert open_files() != before
    del stored
    assert open_files() == before


def test_a_full_disk_is_reported_with_the_folder_and_what_to_do(monkeypatch):
    full = Path("/dev/full")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full.open("r+b", 0))
    stored = SampleTensors("disk")
    with pytest.raises(OSError, match=r"do not fit into .*TMPDIR") as failure:
        stored.append(torch.ones(1000))
    assert failure.value.errno == 28


def test_an_index_beyond_the_end_is_an_error():
    with pytest.raises(IndexError, match="sample 0 of 0"):
        SampleTensors()[0]
