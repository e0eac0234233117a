import pytest

from llmc_attnmask.serving.versions import refusal


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1.dev3", "1.0"])
def test_supported_versions_are_accepted(version):
    assert refusal(version) is None


@pytest.mark.parametrize("version", ["0.19.0", "0.25.1"])
def test_versions_in_between_are_refused_with_the_reason(version):
    assert "removed in 0.19" in refusal(version)


@pytest.mark.parametrize("version", ["0.10.2", "0.18.1"])
def test_old_versions_serve_without_the_plugin(version):
    assert "natively" in refusal(version)
