import pytest


@pytest.fixture
def small_blocks(monkeypatch):
    """Make small tensors take several blocks, like large ones."""
    monkeypatch.setattr("llmc_attnmask.checkpoint.io.files.BLOCK", 100)
