"""The versions that a result depends on."""

from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "llmc-attnmask",
    "llmcompressor",
    "compressed-tensors",
    "transformers",
    "torch",
)


def versions() -> dict[str, str]:
    """Return the installed versions of this package and of those it builds on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a serving environment has no llm-compressor
            continue
    return found
