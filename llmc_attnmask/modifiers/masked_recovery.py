"""``MaskedRecoveryModifier``: block recovery in llm-compressor's life cycle."""

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from compressed_tensors.offload import align_module_device, get_execution_device
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State
from pydantic import Field, PrivateAttr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmc_attnmask.attention.capture import (
    UnsupportedAttentionError,
    uses_attention_interface,
)
from llmc_attnmask.attention.projections import attention_modules, decoder_blocks
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.calibration.samples import Offload, SampleTensors
from llmc_attnmask.calibration.scratch import scratch
from llmc_attnmask.checkpoint.io.writer import disk_errors
from llmc_attnmask.distributed import (
    check_shares,
    gathered,
    is_source,
    reached,
    write_parameter,
)
from llmc_attnmask.modifiers.base import StoredModifier
from llmc_attnmask.modifiers.fields import (
    Names,
    check_before_quantization,
    check_finite,
)
from llmc_attnmask.recovery.block import Block, BlockPair, masks_of
from llmc_attnmask.recovery.refine import RefineSettings, refine
from llmc_attnmask.runlog.context import run_of
from llmc_attnmask.runlog.layer_log import LayerLog
from llmc_attnmask.runlog.layer_work import layer_work
from llmc_attnmask.runlog.wording import listed


class MaskedRecoveryModifier(StoredModifier):
    """
    Recovers accuracy that pruning lost: refines the surviving weights of each decoder
    block so that its output comes close to that of the dense block in the dense model.
    The masks of the pruning modifiers before it in the recipe stay as they are.

    All survivors of a block move together, by gradient steps on the error of the
    block's output. Each token's error counts relative to the token's own norm, and
    massive channels count less, about as the next norm sees them.

    Sample yaml:

    ```yaml
    prune_stage:
      pruning_modifiers:
        SparseGPTModifier:
          sparsity: 0.5
          mask_structure: "2:4"
          targets: [Linear]
          ignore: ["re:.*lm_head"]
      recovery_modifiers:
        MaskedRecoveryModifier: {}
    ```

    Lifecycle:

    - on_initialize
        - write the dense blocks to a temporary folder, one rank for all
    - on_calibration_start
        - register_hook(block, collect inputs, "forward_pre")
    - on_sequential_epoch_end
        - recover, write the survivors
    - on_calibration_end
        - remove_hooks(), remove the temporary folder

    :param steps: gradient steps per block
    :param learning_rate: of Adam, in standard deviations of each Linear's dense weight.
        Larger ones gain little on text like the calibration's and lose on other text
    :param batch_size: calibration samples per step, of any length. Many small steps do
        better than few large ones. Samples that have up to 2048 tokens together are
        evaluated by one process, so several processes need larger steps to be faster
    :param attention_weight: weight of the relative error of the attention matrices,
        compared with that of the block's output
    :param targets: decoder blocks to refine, by name, "re:" pattern or class. Defaults
        to all blocks with attention
    :param ignore: blocks to leave alone, in the same notation
    :param seed: sets the order of the calibration samples; the same seed on the same
        machine gives the same bytes
    :param offload_activations: where calibration activations are kept: "cpu", in
        memory, or "disk", in TMPDIR or /var/tmp. The result is the same
    :param storage: how sparse layers are saved: "dense", "sparse-24-bitmask" or
        "sparse-bitmask". Defaults to the storage that another modifier of the recipe
        names, or else to "dense"
    """

    requires_calibration_data: bool = True

    steps: int = Field(default=150, ge=1)
    learning_rate: float = Field(default=0.01, gt=0)
    batch_size: int = Field(default=2, ge=1)
    attention_weight: float = Field(default=0.0, ge=0)
    targets: Names | None = None
    ignore: Names = Field(default_factory=list)
    seed: int = Field(default=0, ge=0, lt=2**63)
    offload_activations: Offload = "cpu"

    _blocks: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _refined: set[str] = PrivateAttr(default_factory=set)
    _inputs: dict[str, ModuleInputs] = PrivateAttr(default_factory=dict)
    _dense: tempfile.TemporaryDirectory | None = PrivateAttr(default=None)
    _folder: str = PrivateAttr()  # of the dense blocks, written by one rank for all
    # the dense model's hidden states before the next block, by the blocks' container
    _streams: dict[str, SampleTensors] = PrivateAttr(default_factory=dict)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        check_finite(state.model)
        self._blocks = decoder_blocks(state.model)
        self._refined = self._select(state.model)
        check_before_quantization(self)
        self._check_attention()
        run_of(self).expect(self, len(self._refined))
        if is_source():
            self._dense = tempfile.TemporaryDirectory(
                prefix="dense-blocks-", dir=scratch()
            )
        self._folder = gathered(self._dense.name if self._dense else "")[0]
        for name, block in self._blocks.items():
            with align_module_device(block):
                weights = {k: v.detach().cpu() for k, v in block.state_dict().items()}
                zeros = _zeros(block)
            if name in self._refined and zeros > 0.2:
                raise ValueError(
                    f"{zeros:.0%} of the weights of {name} are zero before any "
                    "modifier has run; recovery needs the dense model, so put this "
                    "modifier into the recipe that prunes it"
                )
            if is_source():
                copies = {k: v.clone().contiguous() for k, v in weights.items()}
                with disk_errors(self._file(name)):
                    save_file(copies, self._file(name))
        return True

    def _check_attention(self) -> None:
        """Refuse ``attention_weight`` if an attention matrix cannot be seen."""
        if not self.attention_weight:
            return
        for name in sorted(self._refined):
            for child, attention in attention_modules(self._blocks[name]).items():
                if not uses_attention_interface(attention):
                    raise UnsupportedAttentionError(
                        f"{name}.{child}: {type(attention).__name__} computes its "
                        "softmax itself, so its attention matrix cannot be seen; set "
                        "attention_weight to 0"
                    )

    def _file(self, name: str) -> Path:
        return Path(self._folder) / f"{name}.safetensors"

    def _select(self, model: nn.Module) -> set[str]:
        found = list(self._blocks)
        if not found:
            raise ValueError(f"{type(model).__name__} has no block with attention")
        targets = found if self.targets is None else self.targets
        matched = [n for n, _ in match_named_modules(model, targets, self.ignore)]
        if not (chosen := set(found) & set(matched)):
            raise ValueError(
                f"targets {self.targets} without {self.ignore} match no decoder block "
                f"(they match {listed(matched)}); the model has {listed(found)}"
            )
        return chosen

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        run_of(self).start_clock()
        for name, block in self._blocks.items():
            self._inputs[name] = ModuleInputs(self.offload_activations)
            self.register_hook(
                block, self._collector(name), "forward_pre", with_kwargs=True
            )

    def _collector(self, name: str) -> Any:
        return lambda _, args, kwargs: self._inputs[name].append(args, kwargs)

    def on_sequential_epoch_end(
        self,
        state: State,
        event: Event,
        modules: list[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            for name in reached(n for n, x in self._inputs.items() if len(x)):
                inputs = self._inputs[name]
                if not self._streams:
                    check_shares(inputs.hidden)
                self._recover(state.model, name, inputs)
                inputs.clear()
        except BaseException:
            self._close()  # the model outlives a run that failed
            raise

    @torch.no_grad()
    def _recover(self, model: nn.Module, name: str, inputs: ModuleInputs) -> None:
        block = self._blocks[name]
        container = name.rpartition(".")[0]
        stream = self._streams.get(container, inputs.hidden)
        device = get_execution_device(block)
        dense = Block(block, inputs, device, stream, load_file(self._file(name)))
        targets = self._streams[container] = dense.outputs()
        if name not in self._refined:
            return
        with layer_work(model, self, name) as work:
            if work.restored:
                return
            log = LayerLog(model, self, name)
            with align_module_device(block):
                pruned = Block(block, inputs, device)
            if kept := masks_of(dense, pruned):
                pair = BlockPair(dense, pruned, targets, kept)
                work.changed = self._refine(log, block, pair)

    def _refine(
        self, log: LayerLog, block: nn.Module, pair: BlockPair
    ) -> list[nn.Module]:
        """Refine one block; returns its Linears that have changed."""
        found = refine(pair, self._settings(), log.name)
        linears, kept = pair.pruned.linears(), pair.kept
        for child, mask in kept.items():
            linear = block.get_submodule(child)
            dtype = cast(Tensor, linear.weight).dtype
            weight = linears[child].weight.to(dtype).masked_fill(~mask, 0.0)
            write_parameter(linear, "weight", weight)
        log.done(
            pair.dense.device,
            {"block output": found.errors},
            zeros=sum(int((~mask).sum()) for mask in kept.values()),
            entries=sum(mask.numel() for mask in kept.values()),
            fallback=found.fallback,
        )
        return [block.get_submodule(child) for child in kept]

    def _settings(self) -> RefineSettings:
        return RefineSettings(
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            attention_weight=self.attention_weight,
            seed=self.seed,
        )

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._close()
        if not any(self.done.values()):
            raise ValueError(
                f"none of {listed(sorted(self._refined))} has pruned weights to "
                "recover; put a pruning modifier before MaskedRecoveryModifier in the "
                "recipe"
            )

    def _close(self) -> None:
        self.remove_hooks()
        self._inputs, self._streams = {}, {}
        if self._dense is not None:
            self._dense.cleanup()


def _zeros(block: nn.Module) -> float:
    """Return the share of exact zeros in a block's Linears."""
    weights = [m.weight for m in block.modules() if isinstance(m, nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in weights)
    return zeros / max(1, sum(w.numel() for w in weights))
