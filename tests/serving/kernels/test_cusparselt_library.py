"""Which copy of the library is loaded, and which versions are accepted."""

import pytest
import torch

from llmc_attnmask.serving.kernels import cusparselt
from llmc_attnmask.serving.kernels.cusparselt import library
from llmc_attnmask.serving.kernels.cusparselt.engine import Engine
from llmc_attnmask.serving.kernels.cusparselt.library import (
    Library,
    UnusableLibraryError,
)
from tests.support.compiler import shared_library
from tests.support.kernels.fake_cusparselt import (
    COLUMNS,
    ROWS,
    SOURCE,
    Fake,
    compressed_weight,
    multiply,
)


def test_version_0_7_has_larger_objects_and_lacks_one_function(fake_folder):
    fake = Fake(fake_folder, "-DMINOR=7")
    engine = Engine(fake.library())
    assert engine.library.version == "0.7.1"
    compressed = compressed_weight(engine, torch.float8_e4m3fn)
    engine.prepare(compressed, COLUMNS, largest=32)
    assert multiply(engine, compressed, 17).shape == (17, ROWS)
    del compressed, engine
    assert fake.live() == 0
    assert "MatmulAlgSelectionDestroy" not in fake.calls()


@pytest.mark.parametrize("version", [(0, 6, 3), (0, 5, 2), (1, 0, 0)])
def test_other_versions_are_refused(fake, version):
    fake.set_version(*version)
    with pytest.raises(UnusableLibraryError, match=r"0\.7 to below 1\.0; install"):
        fake.library()


@pytest.mark.parametrize("version", [(0, 7, 0), (0, 8, 1), (0, 10, 0)])
def test_these_versions_are_accepted(fake, version):
    fake.set_version(*version)
    assert fake.library().version == ".".join(map(str, version))


def test_a_file_that_is_not_the_library_is_refused(tmp_path):
    with pytest.raises(UnusableLibraryError, match="cannot load"):
        Library.load(tmp_path / "missing.so")


def test_only_a_copy_that_is_already_loaded_is_used(fake_folder, monkeypatch):
    name = "libfake_cusparselt.so.9"
    soname = f"-Wl,-soname,{name}"
    unloaded = shared_library(SOURCE, fake_folder, soname)
    monkeypatch.setattr(library, "SONAME", str(unloaded))
    with pytest.raises(UnusableLibraryError, match=f"torch has not loaded {unloaded}"):
        Library.of_torch()
    fake = Fake(fake_folder, soname)
    monkeypatch.setattr(library, "SONAME", name)
    assert Library.of_torch().version == "0.8.0"
    assert fake.calls() == ["GetProperty"] * 3  # in that copy


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="describes a machine without a GPU"
)
def test_a_machine_without_a_gpu_says_so():
    assert not cusparselt.available()
    assert cusparselt.version() is None
    assert cusparselt.why_not() == "torch sees no CUDA GPU"
