"""A decoder block on its own, to be run on collected inputs or other hidden states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmc_attnmask.attention.capture import isolated_copy
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.calibration.memory import MicroBatchRunner
from llmc_attnmask.calibration.micro_batches import micro_batches_of
from llmc_attnmask.calibration.samples import SampleTensors


class Block:
    """A private copy of a decoder block in float32, which may be changed freely.

    Where bfloat16 is fast, it computes in it as autocast does, with parameters in
    float32.

    :param block: module that maps hidden states [B, L, D] to hidden states
    :param inputs: the arguments that reached the block, by sample
    :param hidden: hidden states [1, L, D] of each sample, instead of the collected ones
    :param state: parameters and buffers to load into the copy
    :param device: where to compute
    """

    def __init__(
        self,
        block: nn.Module,
        inputs: ModuleInputs,
        device: torch.device,
        hidden: Sequence[Tensor] | None = None,
        state: dict[str, Tensor] | None = None,
    ):
        self.module = isolated_copy(block, torch.float32, device)
        if state is not None:
            # not strict: a quantizer later in the recipe has added scales since, which
            # the copy's forward does not use
            self.module.load_state_dict(state, strict=False)
        self.device = device
        self.autocast = _fast_bfloat16(device)
        self.inputs = inputs
        self.hidden = hidden
        self.micro_batches = micro_batches_of(inputs)
        self.runner = MicroBatchRunner()

    def __call__(self, samples: Sequence[int]) -> Tensor:
        """Return some samples' hidden states after the block, float32 [B, L, D]."""
        output = self.returned(samples)
        return (output[0] if isinstance(output, tuple) else output).float()

    def returned(self, samples: Sequence[int]) -> Any:
        """Return all that the block returns."""
        args, kwargs = self.inputs.batch(
            samples, self.device, torch.float32, self.hidden
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def outputs(self) -> SampleTensors:
        """Return the hidden states after the block, of all samples of this rank.

        They are stored where the inputs are, in memory or on disk.
        """
        inputs = self.inputs.hidden if self.hidden is None else self.hidden
        dtype = inputs[0].dtype
        found = SampleTensors(self.inputs.offload)
        for samples, outputs in self.runner(self.micro_batches, self):
            for sample, output in zip(samples, outputs.split(1), strict=True):
                found[sample] = output.to("cpu", dtype)
        return found

    def linears(self) -> dict[str, nn.Linear]:
        """Return the block's Linears by name."""
        return {
            name: child
            for name, child in self.module.named_modules()
            if isinstance(child, nn.Linear)
        }


@dataclass(frozen=True)
class BlockPair:
    """A dense block and its pruned counterpart, which recovery brings close to it."""

    dense: Block  # on the dense model's hidden states
    pruned: Block  # on the pruned model's hidden states
    targets: Sequence[Tensor]  # Y, after the dense block, [1, L, D] of each sample
    kept: Mapping[str, Tensor]  # name of a pruned Linear -> bool [rows, columns]

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the pruned Linears' weights, to ``restore`` them."""
        linears = self.pruned.linears()
        return {name: linears[name].weight.detach().clone() for name in self.kept}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Write weights back that ``weights`` has copied."""
        linears = self.pruned.linears()
        for name, weight in weights.items():
            linears[name].weight.copy_(weight)


def masks_of(dense: Block, pruned: Block) -> dict[str, Tensor]:
    """Return the kept entries of every pruned Linear: name -> bool [rows, columns]."""
    masks = {}
    for name, linear in pruned.linears().items():
        kept = linear.weight != 0
        if (~kept).sum() > (dense.linears()[name].weight == 0).sum():
            masks[name] = kept
    return masks


def _fast_bfloat16(device: torch.device) -> bool:
    """Return whether products in bfloat16 are faster than in float32, by hardware."""
    if device.type != "cpu":
        return device.type == "cuda"
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
