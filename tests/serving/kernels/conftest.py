"""The stand-in for cuSPARSELt, for tests that count its calls and objects."""

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.support.kernels.fake_cusparselt import Fake


@pytest.fixture(scope="session")
def fake_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fake")


@pytest.fixture
def fake(fake_folder) -> Iterator[Fake]:
    torch.manual_seed(0)
    made = Fake(fake_folder)
    yield made
    if made.live():
        gc.collect()  # an exception that a test inspected keeps its frames alive
    assert made.live() == 0, "the test left objects of the library"
