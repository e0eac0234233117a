import pytest


@pytest.fixture
def small_blocks(monkeypatch):
    """Tensors take several blocks, as large ones do."""
    monkeypatch.setattr("llmc_attnmask.checkpoint.io.files.BLOCK", 100)
