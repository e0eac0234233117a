"""Quantization methods of layers, made without a model."""

from llmc_attnmask.serving.linear import SparseLinearMethod
from llmc_attnmask.serving.table import KernelTable


def two_of_four(name: str) -> SparseLinearMethod:
    """Make the method of a 2:4 layer that is stored dense."""
    return SparseLinearMethod(
        None,
        name=name,
        storage="dense",
        packed_parts=0,
        structures=["2:4"],
        table=KernelTable(),
    )
