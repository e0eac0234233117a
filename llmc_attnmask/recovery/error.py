"""How far a pruned block's outputs are from the dense block's, as later blocks see it.

    mean over tokens t of ||y~_t - y_t||_w^2 / ||y_t||_w^2,  ||y||_w^2 = sum_d w_d y_d^2

Whatever reads the residual stream first divides each token by its own norm, so an error
counts relative to it. Otherwise the few tokens with massive activations, the first one
above all, would outweigh all others (https://arxiv.org/abs/2402.17762). Some models
have massive channels as well: after Gemma 3 270M's third block, one of 640 holds 83 %
of ||y_t||^2, on average over tokens. The gains of the norms make up for them, so beyond
a limit a channel counts less the more it holds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmc_attnmask.calibration.micro_batches import Sums, sample_count
from llmc_attnmask.distributed import all_sum_numbers
from llmc_attnmask.recovery.block import BlockPair

# times the median channel's share of the tokens' squared norms
_LARGEST_SHARE = 16.0


class OutputError:
    """The error above of ``pair.pruned``, with its current weights.

    :param pair: the blocks; all ranks must construct it together
    """

    def __init__(self, pair: BlockPair):
        self.pair = pair
        self.weights = channel_weights(self._shares())

    @torch.no_grad()
    def _shares(self) -> Tensor:
        """Return channels' shares of ||y_t||^2, summed over all ranks' tokens, [D]."""
        pruned, sums = self.pair.pruned, Sums[str]()

        def run(samples: list[int]) -> Tensor:
            squares = self._targets(samples).square()
            return (squares / _positive(squares.sum(-1)).unsqueeze(-1)).sum((0, 1))

        for _, shares in pruned.runner(pruned.micro_batches, run):
            sums.add("shares", shares)
        return sums.totals()["shares"]

    def _targets(self, samples: Sequence[int]) -> Tensor:
        targets = torch.cat([self.pair.targets[sample] for sample in samples])
        return targets.to(self.pair.pruned.device).float()

    def of(self, samples: Sequence[int]) -> Tensor:
        """Return the error of some samples of this rank, float32 [B]."""
        outputs = self.pair.pruned(samples)
        return relative_errors(outputs, self._targets(samples), self.weights)

    @torch.no_grad()
    def mean(self) -> float:
        """Return the mean over the samples of all ranks."""
        pruned = self.pair.pruned
        found = pruned.runner(
            pruned.micro_batches, lambda samples: self.of(samples).sum().item()
        )
        total = sum(error for _, error in found)
        return all_sum_numbers(total)[0] / sample_count(pruned.micro_batches)


def relative_errors(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over tokens of ||y~_t - y_t||_w^2 / ||y_t||_w^2, float32 [B].

    :param outputs: hidden states Y~ after a pruned block, float32 [B, L, D]
    :param targets: Y, the same of the dense block
    :param weights: w, of the channels, float32 [D]
    """
    errors = (outputs - targets).square() @ weights
    return (errors / _positive(targets.square() @ weights)).mean(-1)


def channel_weights(shares: Tensor) -> Tensor:
    """Return the weights w of the channels' squared errors, in (0, 1], [D].

    :param shares: of the tokens' squared norms, in any unit, [D]
    """
    present = shares[shares > 0]
    if not present.numel():
        return torch.ones_like(shares)
    return (_LARGEST_SHARE * present.median() / shares).clamp_max(1.0)


def _positive(norms: Tensor) -> Tensor:
    """Return tokens' squared norms [B, L], none of them zero.

    A token without any norm must not outweigh the others either.
    """
    least = 1e-6 * norms.mean(-1, keepdim=True)
    return norms.maximum(least.clamp_min(1e-30))
