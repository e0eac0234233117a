"""What the kernels read is what was given, and nothing else is accepted."""

from pathlib import Path

import pytest
import torch

from llmc_attnmask.checkpoint.layouts.sparse_24_bitmask import NotTwoOfFourError
from llmc_attnmask.serving.kernels.cpu import library, weights

pytestmark = pytest.mark.skipif(
    library.missing() is not None, reason="built without CPU kernels"
)


def test_bytes_are_as_promised() -> None:
    weight = torch.randn(256, 512).bfloat16()
    weight[torch.rand(256, 512) < 0.6] = 0
    density = float((weight != 0).float().mean())
    form = weights.any_mask(weight)
    assert form.nbytes / weight.nbytes == pytest.approx(density + 1 / 16, abs=0.002)
    groups = weight.view(-1, 4)
    groups[:, :2] = 0
    assert weights.two_of_four(weight).nbytes / weight.nbytes == 0.5625
    eight = weight.view(torch.int16).to(torch.int8)
    groups = eight.view(-1, 4)
    groups[:, :2] = 0
    assert weights.two_of_four(eight).nbytes / eight.nbytes == 0.625


def test_a_crowded_group_is_refused() -> None:
    weight = torch.zeros(64, 64).bfloat16()
    weight[40, 13:16] = 1
    with pytest.raises(NotTwoOfFourError, match="more than two of four"):
        weights.two_of_four(weight)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(8, 8),
        torch.zeros(8).bfloat16(),
        torch.zeros(8, 8).bfloat16().T[:, ::2],
    ],
)
def test_other_tensors_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a contiguous matrix"):
        weights.any_mask(weight)


def test_int8_rows_whose_sums_could_overflow_are_refused() -> None:
    weight = torch.zeros(1, weights.LARGEST_COLUMNS + 4, dtype=torch.int8)
    with pytest.raises(ValueError, match="at most 65536 in int8"):
        weights.any_mask(weight)


def test_a_library_of_other_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "kernel.cpp").write_text("// changed since")
    copy = tmp_path / library.PATH.name
    copy.write_bytes(library.PATH.read_bytes())
    monkeypatch.setattr(library, "PATH", copy)
    library.load.cache_clear()
    try:
        assert "compiled from other sources; install" in str(library.missing())
    finally:
        library.load.cache_clear()
