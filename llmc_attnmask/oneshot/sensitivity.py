"""Measure what pruning costs, group by group, on text that nothing else uses.

The cost of a group is the KL divergence between the next-token probabilities of the
dense model and those of the model with this group pruned by SparseGPT and all others
dense, in nats per token. Such costs nearly add up: on SmolLM2-135M at 2:4, those of all
groups have a sum of 1.43, and pruned together they cost 1.56. (The opposite, to put
groups of a pruned model back, measures little: its other groups have adapted.)
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmc_attnmask.calibration.samples import Offload, SampleTensors
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.trade_off import Sparsities
from llmc_attnmask.recovery.block import Block
from llmc_attnmask.recovery.blockwise import BlockwiseModel
from llmc_attnmask.solvers.alps import LinearProblem
from llmc_attnmask.upstream.baselines import baselines

Groups = Mapping[str, Sequence[str]]  # name -> names of its Linears, all of one block
Weights = dict[str, Tensor]  # name of a Linear within its block -> [rows, columns]
Problems = dict[str, tuple[Tensor, Tensor]]  # the same -> dense weight, and X^T X

# the loss counts one of so many tokens; the output layer of a small model with many
# words would otherwise take most of the time
_EVERY = 2

BlockCosts = dict[str, dict[float, float]]  # group -> sparsity -> nats per token


@dataclass(frozen=True)
class Loss:
    """What a model has lost, in nats per token."""

    kl: float  # divergence from the dense model's probabilities to its own
    rise: float  # of the log loss on the text


class Sensitivity:
    """A model with some of its groups pruned, and what that costs.

    One block at a time is on the device. Groups are pruned on the dense model's
    activations. Modules outside the blocks are left in float32, on the device.

    :param calibration: int64 [windows, length], which groups are pruned on
    :param held_out: int64 [windows, length], which losses are measured on
    :param offload: where activations are kept
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Tensor,
        held_out: Tensor,
        groups: Groups,
        structure: MaskStructure,
        device: torch.device,
        offload: Offload = "cpu",
    ):
        self.structure, self.held_out = structure, held_out
        self._calibrated = BlockwiseModel(model, calibration, device, offload)
        self._measured = BlockwiseModel(model, held_out, device, offload)
        self.blocks = self._measured.names
        self.groups = {name: _of(name, groups) for name in self.blocks}
        """Block -> its groups -> their Linears' names within it."""
        self._reference = self._measured.embedded
        for position in range(len(self.blocks)):
            self._reference = self._measured.block(position, self._reference).outputs()

    def costs(
        self, levels: Sequence[float], known: Mapping[str, BlockCosts]
    ) -> Iterator[tuple[str, BlockCosts]]:
        """Yield the name of each block, and what pruning its groups one by one costs.

        :param levels: sparsities
        :param known: blocks that were measured before, which are not measured again
        """
        states = self._measured.embedded
        for position, problems in self._pass(known):
            name = self.blocks[position]
            groups = self.groups[name]
            dense = self._measured.block(position, states)
            if name in known or not groups:
                yield name, known.get(name, {})
            else:
                variants = [(g, level) for g in groups for level in levels]
                streams = [
                    _outputs(dense, states, self._pruned(problems, groups[g], level))
                    for g, level in variants
                ]
                costs: BlockCosts = {group: {} for group in groups}
                for (g, level), loss in zip(
                    variants, self._losses(position + 1, streams), strict=True
                ):
                    costs[g][level] = loss.kl
                yield name, costs
            states = _outputs(dense, states)

    def together(self, choices: Sequence[Sparsities]) -> list[Loss]:
        """Return what each choice costs, with all of its groups pruned together."""
        streams: list[SampleTensors] = [self._measured.embedded] * len(choices)
        for position, problems in self._pass():
            groups = self.groups[self.blocks[position]]
            block = self._measured.block(position, streams[0])
            solved: dict[tuple[str, float], Weights] = {}
            for i, choice in enumerate(choices):
                weights: Weights = {}
                for group, linears in groups.items():
                    if level := choice[group]:
                        if (group, level) not in solved:
                            found = self._pruned(problems, linears, level)
                            solved[group, level] = found
                        weights |= solved[group, level]
                streams[i] = _outputs(block, streams[i], weights)
        return self._losses(len(self.blocks), streams)

    def of_weights(self, weights: Mapping[str, Tensor]) -> Loss:
        """Return what the model loses with other weights of some Linears.

        :param weights: name of a Linear -> [rows, columns]
        """
        states = self._measured.embedded
        for position, name in enumerate(self.blocks):
            prefix = f"{name}."
            own = {
                linear.removeprefix(prefix): weight
                for linear, weight in weights.items()
                if linear.startswith(prefix)
            }
            states = _outputs(self._measured.block(position, states), states, own)
        (loss,) = self._losses(len(self.blocks), [states])
        return loss

    def _pass(self, known: Collection[str] = ()) -> Iterator[tuple[int, Problems]]:
        """Run the dense model; yield each block's position and problems.

        :param known: blocks that need no problems
        """
        states = self._calibrated.embedded
        for position, name in enumerate(self.blocks):
            block = self._calibrated.block(position, states)
            linears = block.linears()
            groups = {} if name in known else self.groups[name]
            problems = {
                linear: LinearProblem(f"{name}.{linear}", linears[linear])
                for members in groups.values()
                for linear in members
            }
            handles = [
                linears[linear].register_forward_pre_hook(_accumulate(problem))
                for linear, problem in problems.items()
            ]
            states = block.outputs()
            for handle in handles:
                handle.remove()
            yield (
                position,
                {
                    linear: (problem.weight(block.device), problem.hessian())
                    for linear, problem in problems.items()
                },
            )

    def _pruned(
        self, problems: Problems, linears: Sequence[str], level: float
    ) -> Weights:
        prune = baselines(self.structure, level)
        found = {}
        for name in linears:
            try:
                found[name] = prune["SparseGPT"](*problems[name])
            except torch.linalg.LinAlgError:
                logger.warning(f"{name}: SparseGPT has failed, Wanda takes its place")
                found[name] = prune["Wanda"](*problems[name])
        return found

    def _losses(self, first: int, streams: list[SampleTensors]) -> list[Loss]:
        """Return the losses of hidden states before a block, the others being dense."""
        for position in range(first, len(self.blocks)):
            block = self._measured.block(position, streams[0])
            streams = [_outputs(block, states) for states in streams]
        return self._divergences(streams)

    @torch.no_grad()
    def _divergences(self, streams: Sequence[SampleTensors]) -> list[Loss]:
        """Return the mean loss of hidden states after the last block."""
        count = len(self.held_out)
        divergences, rises = [0.0] * len(streams), [0.0] * len(streams)

        def predicted(window: int, states: Sequence[Tensor]) -> Tensor:
            logits = self._measured.logits(window, states[window][:, ::_EVERY])
            return logits.log_softmax(-1)

        for window in range(count):
            dense = predicted(window, self._reference)
            words = self.held_out[window, 1::_EVERY, None].to(dense.device)
            for i, states in enumerate(streams):
                difference = dense - predicted(window, states)
                # a divergence is positive, but its rounding error need not be
                kl = (dense.exp() * difference).sum(-1).mean().clamp_min(0.0)
                divergences[i] += kl.item() / count
                rise = difference[: len(words)].gather(-1, words).mean()
                rises[i] += rise.item() / count
        return list(map(Loss, divergences, rises))


def _of(block: str, groups: Groups) -> dict[str, list[str]]:
    """Return the groups of a block, with their Linears' names within it."""
    prefix = f"{block}."
    return {
        group: [name.removeprefix(prefix) for name in members]
        for group, members in groups.items()
        if members[0].startswith(prefix)
    }


def _accumulate(problem: LinearProblem) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        with torch.autocast(args[0].device.type, enabled=False):
            problem.add(args[0])

    return hook


@torch.no_grad()
def _outputs(
    block: Block, states: Sequence[Tensor], weights: Weights | None = None
) -> SampleTensors:
    """Run a block on other hidden states, with other weights of some Linears."""
    linears: Any = block.linears()
    own = {name: linears[name].weight.data for name in weights or {}}
    for name, weight in (weights or {}).items():
        own_weight = linears[name].weight
        own_weight.data = weight.to(own_weight)
    block.hidden = states
    try:
        return block.outputs()
    finally:
        for name, weight in own.items():
            linears[name].weight.data = weight
