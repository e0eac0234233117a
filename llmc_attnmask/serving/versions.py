"""Which versions of vLLM this plugin supports."""

from packaging.version import Version

SUPPORTED = Version("0.26")
LAST_NATIVE = Version("0.18.1")


def refusal(version: str) -> str | None:
    """Return why the plugin stays off in this vLLM; None if it works.

    :param version: as vLLM reports it; suffixes like ``+cpu`` and ``.dev`` are ignored
    """
    found = Version(Version(version).base_version)
    if found >= SUPPORTED or found == Version("0"):  # built without version control
        return None
    if found <= LAST_NATIVE:
        return (
            f"vLLM {version} serves packed 2:4 checkpoints natively, on GPUs of "
            "capability 9.0; dense-stored ones are served with dense kernels"
        )
    return (
        f"vLLM {version} has neither 2:4 kernels of its own (removed in 0.19) nor "
        f"the interfaces that this plugin needs (from {SUPPORTED} on); packed "
        "checkpoints are refused, and dense-stored ones are served with dense kernels"
    )
