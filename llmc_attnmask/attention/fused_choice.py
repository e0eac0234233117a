"""Choose between the GPU kernels and plain torch for a call's attention error."""

from importlib.util import find_spec

import torch

from llmc_attnmask.attention.capture import AttentionCall

# Neither the kernels nor the plain version have been measured on a GPU yet. Until then,
# the kernels are the default where tests/attention/test_fused_compile.py shows that
# they spill no registers: for these head dimensions, which most models have, and on
# these GPUs. They also run for other dimensions.
WIDTHS = (64, 128)
CAPABILITIES = (8, 9)  # major numbers


def fusible(call: AttentionCall) -> bool:
    """Return whether the kernels of ``fused.py`` can run a call and are its default."""
    query, value = call.query, call.value
    # triton comes with torch's CUDA builds
    if not query.is_cuda or torch.version.hip or not find_spec("triton"):
        return False
    capability = torch.cuda.get_device_capability(query.device)
    widths = query.shape[-1], value.shape[-1]
    return fused_by_default(capability, query.dtype, widths)


def fused_by_default(
    capability: tuple[int, int], dtype: torch.dtype, widths: tuple[int, int]
) -> bool:
    """Apply the rule of ``fusible`` to a CUDA device.

    :param capability: of the GPU, major and minor number
    :param dtype: of the query; float64 is the reference for checks
    :param widths: head dimensions of query and value
    """
    known = capability[0] in CAPABILITIES and all(w in WIDTHS for w in widths)
    return known and dtype != torch.float64
