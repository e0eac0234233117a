"""The versions that a result depends on."""

from importlib.metadata import PackageNotFoundError, version

from llmc_attnmask.version import __version__

_PACKAGES = (
    "llmcompressor",
    "compressed-tensors",
    "transformers",
    "torch",
)


def versions() -> dict[str, str]:
    """Return the versions of this package and of those it builds on, if installed."""
    found = {"llmc-attnmask": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a serving environment has no llm-compressor
            continue
    return found
