"""Folders for the tests to damage."""

import shutil
from pathlib import Path

import pytest

from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.checkpoints import decoder, write


@pytest.fixture
def dense(tmp_path):
    return write(tmp_path / "dense", decoder(layers=1))


@pytest.fixture
def model(tmp_path):
    """A copy of the shipped model."""
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
