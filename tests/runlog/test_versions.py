import llmc_attnmask
from llmc_attnmask.runlog.versions import versions


def test_this_package_comes_first():
    assert next(iter(versions().items())) == (
        "llmc-attnmask",
        llmc_attnmask.__version__,
    )


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    packages = ("torch", "not-an-installed-package")
    monkeypatch.setattr("llmc_attnmask.runlog.versions._PACKAGES", packages)
    assert list(versions()) == ["llmc-attnmask", "torch"]
