"""Which entries a mask may prune: any share of a matrix, or N of every M inputs."""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskStructure:
    """``pruned`` of every ``group`` consecutive inputs; 0 of 0 is unstructured."""

    pruned: int
    group: int

    @classmethod
    def parse(cls, text: str) -> "MaskStructure":
        """Read llm-compressor's notation: ``"N:M"`` prunes N of every M.

        :raises ValueError: if it is not two numbers with 0 < N < M, or ``"0:0"``
        """
        match = re.fullmatch(r"(\d+):(\d+)", text)
        pruned, group = map(int, match.groups()) if match else (1, 0)
        if (pruned, group) != (0, 0) and not 0 < pruned < group:
            raise ValueError(
                f'mask_structure is {text!r}; expected "N:M" with 0 < N < M (N of '
                'every M consecutive inputs are pruned, for example "2:4"), or "0:0" '
                "for unstructured"
            )
        return cls(pruned, group)

    def __str__(self) -> str:
        return f"{self.pruned}:{self.group}"

    @property
    def unstructured(self) -> bool:
        return self.group == 0

    def check(self, sparsity: float) -> None:
        """Refuse a sparsity outside [0, 1) or one that contradicts N:M.

        :raises ValueError: with the sparsity that fits
        """
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity is {sparsity}; expected a number in [0, 1)")
        if not self.unstructured and abs(sparsity - self.pruned / self.group) > 1e-6:
            raise ValueError(
                f'sparsity {sparsity} contradicts mask_structure "{self}", which '
                f"prunes {self.pruned / self.group:g} of the entries; set sparsity to "
                f'{self.pruned / self.group:g} or mask_structure to "0:0"'
            )

    def groups(self, scores: Tensor) -> Tensor:
        """View scores [rows, columns] as groups [groups, entries] that share a quota.

        :raises ValueError: if the columns are not a multiple of M
        """
        if self.unstructured:
            return scores.reshape(1, -1)
        if scores.shape[-1] % self.group:
            raise ValueError(
                f"{scores.shape[-1]} in-features are not divisible by {self.group}, so "
                f'mask_structure "{self}" cannot be applied; ignore this layer or use '
                '"0:0"'
            )
        return scores.reshape(-1, self.group)

    def kept(self, scores: Tensor, sparsity: float) -> int:
        """Count the entries kept in each group: exact for N:M, rounded for a share."""
        if self.unstructured:
            return scores.numel() - round(sparsity * scores.numel())
        return self.group - self.pruned

    def mask(self, scores: Tensor, sparsity: float) -> Tensor:
        """Keep the highest scores; among equal scores, the first.

        :param scores: [rows, columns], any float
        :return: bool [rows, columns], True where the weight is kept
        """
        groups = self.groups(scores)
        if 0 < self.group <= _FEW:
            largest = _by_rank
        elif self.unstructured and scores.device.type == "cpu":
            largest = _by_threshold
        else:
            largest = _by_sort
        return largest(groups, self.kept(scores, sparsity)).view(scores.shape)


# Solvers choose masks hundreds of times for a weight, so it matters that sorting is not
# the fastest way to do it: 576 x 1536 float32 scores take one core 12 ms to sort in
# groups of 4, where comparing pairs takes 3.5; in one group, sorting takes 80 to 120 ms
# and finding the threshold 3. On a GPU, sorting is fast.
_FEW = 32  # entries of a group, up to which pairs are compared


def _by_sort(groups: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest entries of every group, [groups, entries]."""
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(groups, dtype=torch.bool)
    return kept.scatter_(-1, order[:, :count], True)


def _by_rank(groups: Tensor, count: int) -> Tensor:
    """Do the same by comparing pairs; NaN counts as infinity."""
    finite = groups.nan_to_num(torch.inf, torch.inf, -torch.inf)
    entries = finite.T.contiguous()
    ranks = torch.zeros_like(entries, dtype=torch.int8)
    for i in range(len(entries) - 1):
        ahead = entries[i] >= entries[i + 1 :]  # the first one of equals is ahead
        ranks[i + 1 :] += ahead
        ranks[i] += (~ahead).sum(0, dtype=torch.int8)
    return (ranks < count).T.contiguous()


def _by_threshold(groups: Tensor, count: int) -> Tensor:
    """Do the same for the only group, [1, entries]; NaN counts as infinity."""
    if count == 0:
        return torch.zeros_like(groups, dtype=torch.bool)
    # numpy has no bfloat16
    scores = groups[0].detach().to(torch.promote_types(groups.dtype, torch.float32))
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf)
    place = len(scores) - count
    least = float(np.partition(scores.numpy(), place)[place])
    kept = scores > least
    equal = (scores == least).nonzero()[:, 0]
    kept[equal[: count - int(kept.sum())]] = True
    return kept[None]
