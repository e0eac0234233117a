"""The settings of the solver."""

from dataclasses import dataclass

from torch import Tensor

from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.solvers.descent import DescentSettings


@dataclass(frozen=True)
class SolverSettings(DescentSettings):
    """How the masks of a layer are learned; the modifier documents the fields."""

    structure: MaskStructure
    sparsity: float  # share of each projection's entries to prune
    learning_rate: float
    l2_penalty: float
    output_weight: float
    update_weights: bool  # accuracy mode, or else light mode

    def mask(self, scores: Tensor) -> Tensor:
        """Return the mask of the highest scores, bool [rows, columns]."""
        return self.structure.mask(scores, self.sparsity)
