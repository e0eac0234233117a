"""Which vLLM this plugin works with."""

from packaging.version import Version

SUPPORTED = Version("0.26")
LAST_NATIVE = Version("0.18.1")


def refusal(version: str) -> str | None:
    """Why the plugin does nothing in this vLLM; None if it works.

    :param version: as vLLM gives it; ``+cpu`` and ``.dev`` endings do not matter
    """
    found = Version(Version(version).base_version)
    if found >= SUPPORTED or found == Version("0"):  # built without version control
        return None
    if found <= LAST_NATIVE:
        return (
            f"vLLM {version} serves packed 2:4 checkpoints by itself, on GPUs of "
            "capability 9.0; dense-stored ones are served with dense kernels"
        )
    return (
        f"vLLM {version} has neither 2:4 kernels of its own (they left with 0.19) nor "
        f"the interfaces this plugin was written for (from {SUPPORTED} on); packed "
        "checkpoints are refused, dense-stored ones served with dense kernels"
    )
