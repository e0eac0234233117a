"""Which entries a mask may prune: any share of a matrix, or N of every M inputs."""

import re
from dataclasses import dataclass

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
        groups = self.groups(scores).nan_to_num(torch.inf, torch.inf, -torch.inf)
        largest = _by_threshold if self.unstructured else _by_rank
        return largest(groups, self.kept(scores, sparsity)).view(scores.shape)


# Solvers choose masks hundreds of times for a weight, and sorting takes 3 to 12 times
# as long: for 576 x 1536 scores on one core 12 ms in groups of 4 and 118 ms as one.


def _by_threshold(groups: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest entries of the only group, [1, entries]."""
    scores = groups[0]
    if count == 0:
        return torch.zeros_like(groups, dtype=torch.bool)
    least = scores.kthvalue(len(scores) - count + 1).values
    kept = scores > least
    equal = (scores == least).nonzero()[:, 0]
    kept[equal[: count - int(kept.sum())]] = True
    return kept[None]


def _by_rank(groups: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest entries of every group, [groups, entries]."""
    entries = groups.T.contiguous()
    ranks = torch.zeros_like(entries, dtype=torch.int16)
    for i in range(len(entries) - 1):
        ahead = entries[i] >= entries[i + 1 :]  # the first one of equals is ahead
        ranks[i + 1 :] += ahead
        ranks[i] += (~ahead).sum(0, dtype=torch.int16)
    return (ranks < count).T.contiguous()
