"""Run a model block by block, one block at a time on the accelerator.

What a model does around its blocks (embedding, masks, rotary tables, norms, output
layer) is its own code: it runs with other functions in the blocks' places, which note
what a block is called with, or hand on hidden states that were computed before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.offload import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmc_attnmask.attention.projections import decoder_blocks
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.calibration.samples import Offload, SampleTensors
from llmc_attnmask.recovery.block import Block

Forward = Callable[..., Any]


class _Reached(BaseException):
    """Ends a model's forward at a block; what comes after it is not needed."""


class BlockwiseModel:
    """A causal language model as a sequence of blocks that are run one at a time.

    Modules outside the blocks are moved to the device, in float32, in place. The blocks
    stay where they are; ``block`` makes a copy of one.

    :param windows: int64 [windows, length], the samples that it is run on
    :param device: where to compute
    :param offload: where hidden states are kept
    :raises ValueError: if the model has no blocks, or several lists of them
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        device: torch.device,
        offload: Offload = "cpu",
    ):
        self.model, self.windows = model, windows
        self.device, self.offload = device, offload
        self.names = block_names(model)
        self._blocks = [model.get_submodule(name) for name in self.names]
        _move_others(model, set(self._blocks), device)
        self.embedded = SampleTensors(offload)
        """Hidden states before the first block, float32 [1, L, D] of each window."""
        self._extras: tuple[Any, ...] | None = None  # what blocks return beside them
        self._inputs = [ModuleInputs(offload) for _ in self._blocks]
        self._note_inputs()

    @torch.no_grad()
    def _note_inputs(self) -> None:
        first = ModuleInputs("cpu")

        def reach(*args: Any, **kwargs: Any) -> None:
            first.append(args, kwargs)
            raise _Reached

        self._run(self.windows[0], [reach])
        returned = self._copy(0, first).returned([0])
        self._extras = returned[1:] if isinstance(returned, tuple) else None
        for window in self.windows:
            notes = [self._noting(position) for position in range(len(self._blocks))]
            self._run(window, notes)

    def _noting(self, position: int) -> Forward:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if position == 0:
                self.embedded.append(hidden.float())
            # without channels, because every block is given hidden states later
            self._inputs[position].append((hidden[..., :0], *args), kwargs)
            return self._returned(hidden)

        return forward

    def _returned(self, hidden: Tensor) -> Any:
        return hidden if self._extras is None else (hidden, *self._extras)

    def _copy(
        self,
        position: int,
        inputs: ModuleInputs,
        hidden: Sequence[Tensor] | None = None,
    ) -> Block:
        module = self._blocks[position]
        with align_module_device(module):
            return Block(module, inputs, self.device, hidden)

    def block(self, position: int, hidden: Sequence[Tensor]) -> Block:
        """Return a copy of a block.

        :param hidden: hidden states before it, [1, L, D] of each window
        """
        return self._copy(position, self._inputs[position], hidden)

    @torch.no_grad()
    def logits(self, window: int, hidden: Tensor) -> Tensor:
        """Return the logits of some tokens of a window, float32 [tokens, vocabulary].

        :param hidden: after the last block, [1, tokens, D]
        """
        hidden = hidden.to(self.device).float()
        skip = [lambda own, *_, **__: self._returned(own)] * (len(self._blocks) - 1)
        last = lambda *_, **__: self._returned(hidden)  # noqa: E731
        # as many words as hidden states, because some models reshape by their number
        ids = self.windows[window, : hidden.shape[1]]
        output = self._run(ids, [*skip, last])
        return output.logits[0].float()

    def _run(self, window: Tensor, stand_ins: Sequence[Forward]) -> Any:
        """Run the model on a window, with stand-ins for its first blocks.

        :return: its output; None if a stand-in has ended the run
        """
        ids = window[None].to(self.device)
        with _replaced(self._blocks[: len(stand_ins)], stand_ins):
            try:
                return self.model(input_ids=ids, use_cache=False)
            except _Reached:
                return None


@contextmanager
def _replaced(
    blocks: Sequence[nn.Module], forwards: Sequence[Forward]
) -> Iterator[None]:
    """Let blocks call other functions within the ``with`` block."""
    before = [block.__dict__.get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = _named(forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


def _named(forward: Forward) -> Forward:
    """Let a function with the hidden states first take them by name as well."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        return forward(*args, **kwargs)

    return call


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the decoder's blocks, in their order.

    :raises ValueError: if the model has no blocks, or several lists of them
    """
    found = list(dict.fromkeys(n.rpartition(".")[0] for n in decoder_blocks(model)))
    if len(found) != 1:
        kind = type(model).__name__
        what = f"several lists of blocks: {', '.join(found)}" if found else "no blocks"
        raise ValueError(
            f"{kind} has {what}; expected a model with one list of decoder blocks with "
            "attention"
        )
    blocks = model.get_submodule(found[0])
    return [f"{found[0]}.{name}" for name, _ in blocks.named_children()]


def _move_others(
    model: nn.Module, blocks: set[nn.Module], device: torch.device
) -> None:
    """Move modules outside the blocks to the device, in float32; ties stay ties."""
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module in inside:
            continue
        for tensor in (
            *module.parameters(recurse=False),
            *module.buffers(recurse=False),
        ):
            kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensor.data = tensor.data.to(device=device, dtype=kind)
