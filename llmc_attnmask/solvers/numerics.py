"""Results of a descent that are no numbers."""

import math
from collections.abc import Iterable

from torch import Tensor


def non_finite(loss: float, gradients: Iterable[Tensor]) -> str | None:
    """Says what of a loss and its gradient is no finite number; None if all is."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if bad := sum(int((~gradient.isfinite()).sum()) for gradient in gradients):
        return f"{bad} entries of the gradient are no finite numbers"
    return None
