"""``ActivationSmoothingModifier``: smoothing in llm-compressor's life cycle."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import torch
from compressed_tensors.offload import align_module_device, get_execution_device
from llmcompressor.core import Event, State, active_session
from llmcompressor.modeling.offset_norm import NormCalibrationModule
from loguru import logger
from pydantic import PrivateAttr
from torch import Tensor, nn

from llmc_attnmask.attention.capture import isolated_copy
from llmc_attnmask.attention.projections import attention_modules, decoder_blocks
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.distributed import (
    all_sum,
    check_shares,
    gathered,
    reached,
    write_parameter,
)
from llmc_attnmask.modifiers.base import StoredModifier
from llmc_attnmask.modifiers.fields import check_before_quantization
from llmc_attnmask.runlog.context import run_of
from llmc_attnmask.runlog.layer_work import layer_work
from llmc_attnmask.runlog.wording import listed
from llmc_attnmask.solvers.smoothing import (
    Place,
    by_output,
    linear_input,
    outputs_of,
    places,
    smoothing_scales,
)


class ActivationSmoothingModifier(StoredModifier):
    """
    Moves the range of large activation channels into the weights, so that quantized
    activations lose less, as ``SmoothQuantModifier`` does. It needs no mappings: for
    each block, it finds out on a sample which norms and Linears can be scaled without
    changing what is computed, and leaves the others alone.

    Put it after the pruning and recovery modifiers and before the quantization. Zeros
    stay zeros.

    Sample yaml:

    ```yaml
    quant_stage:
      quant_modifiers:
        ActivationSmoothingModifier: {}
        MaskedGPTQModifier:
          scheme: W8A8
          targets: [Linear]
          ignore: ["re:.*lm_head"]
    ```

    Lifecycle:

    - on_calibration_start
        - register_hook(block, keep the first inputs, "forward_pre")
        - register_hook(Linear, sum up the inputs' squares, "forward_pre")
    - on_sequential_epoch_end
        - find the places of each block, scale weights
    - on_calibration_end
        - remove_hooks()

    :param storage: how sparse layers are saved: "dense", "sparse-24-bitmask" or
        "sparse-bitmask". Defaults to the storage that another modifier of the recipe
        names, or else to "dense"
    """

    requires_calibration_data: bool = True

    _blocks: dict[str, nn.Module] = PrivateAttr(default_factory=dict)
    _shared: set[nn.Module] = PrivateAttr(default_factory=set)
    _inputs: dict[str, ModuleInputs] = PrivateAttr(default_factory=dict)
    # sum over tokens of x_j^2 of every Linear that samples reached, float64 [D]
    _squares: dict[nn.Module, Tensor] = PrivateAttr(default_factory=dict)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._blocks = decoder_blocks(state.model)
        self._shared = _shared(state.model, self._blocks.values())
        check_before_quantization(self)
        run_of(self).expect(self, len(self._blocks))
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._check_pass()
        run_of(self).start_clock()
        for name, block in self._blocks.items():
            self._inputs[name] = ModuleInputs()
            self.register_hook(
                block, self._first(name), "forward_pre", with_kwargs=True
            )
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    self.register_hook(
                        module, self._observer(), "forward_pre", with_kwargs=True
                    )

    def _check_pass(self) -> None:
        """Refuse to share a pass with a modifier that sees unsmoothed inputs."""
        together = active_session().lifecycle.recipe.modifiers
        later = together[together.index(self) + 1 :]
        if later:
            raise ValueError(
                f"{type(self).__name__} runs in the same pass as "
                f"{listed([type(m).__name__ for m in later])}, which would be "
                "calibrated on inputs before smoothing; leave out `pipeline`, or set "
                "it to independent"
            )

    def _first(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not len(self._inputs[name]):
                self._inputs[name].append(args, kwargs)

        return hook

    def _observer(self) -> Any:
        def hook(linear: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = linear_input(args, kwargs).detach().float()
            squares = inputs.square().reshape(-1, inputs.shape[-1])
            found = squares.sum(0, dtype=torch.float64)
            self._squares[linear] = found + self._squares.get(linear, 0)

        return hook

    @torch.no_grad()
    def on_sequential_epoch_end(
        self,
        state: State,
        event: Event,
        modules: list[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            for name in reached(n for n, x in self._inputs.items() if len(x)):
                if not self.done:
                    check_shares(self._inputs[name].hidden)
                with layer_work(state.model, self, name) as work:
                    if not work.restored:
                        work.changed = self._smooth(name)
                        run_of(self).layer_done(self)
                self._inputs[name].clear()
        except BaseException:
            self._close()  # the model outlives a run that failed
            raise

    def _smooth(self, name: str) -> list[nn.Module]:
        """Smooth one block; returns the modules that have changed."""
        block = self._blocks[name]
        found = gathered(self._places(block, self._inputs[name]))[0]
        changed: dict[nn.Module, None] = {}
        with align_module_device(block):
            for place in found:
                source = block.get_submodule(place.source)
                readers = [block.get_submodule(reader) for reader in place.readers]
                self._scale(source, readers)
                changed |= dict.fromkeys([source, *readers])
        sources = [place.source for place in found]
        logger.info(f"{name}: smoothed after {listed(sources)}")
        return list(changed)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._close()
        if not any(self.done.values()):
            logger.warning(
                f"no activations of {type(state.model).__name__} can be smoothed; "
                "quantization will lose as much as without "
                f"{type(self).__name__}"
            )

    def _close(self) -> None:
        self.remove_hooks()
        self._inputs, self._squares = {}, {}

    def _places(self, block: nn.Module, inputs: ModuleInputs) -> list[Place]:
        device = get_execution_device(block)
        with align_module_device(block):
            copy = isolated_copy(block, torch.float32, device)

        def run() -> Any:
            args, kwargs = inputs.batch([0], device, torch.float32)
            return copy(*args, **kwargs)

        found = places(copy, run, without=attention_modules(copy))
        return [
            place
            for place in found
            if not any(
                block.get_submodule(name) in self._shared
                for name in (place.source, *place.readers)
            )
        ]

    def _scale(self, source: nn.Module, readers: list[nn.Module]) -> None:
        weights = [cast(Tensor, reader.weight) for reader in readers]
        silent = weights[0].new_zeros(weights[0].shape[1], dtype=torch.float64)
        squares = self._squares.get(readers[0], silent)
        scales = smoothing_scales(all_sum([squares])[0], weights)
        scales = _divide(source, scales)
        for reader, weight in zip(readers, weights, strict=True):
            scaled = weight.float() * scales
            write_parameter(reader, "weight", scaled.to(weight.dtype))


def _shared(model: nn.Module, blocks: Iterable[nn.Module]) -> set[nn.Module]:
    """Return modules that, or whose parameters, belong to more than one block."""
    blocks = dict.fromkeys(blocks)  # one block may be run several times
    owned = {block: set(block.modules()) for block in blocks}
    rest = set(model.modules()).difference(*owned.values())
    counts = Counter(
        part
        for modules in (*owned.values(), rest)
        for part in {id(part) for m in modules for part in (m, *_parameters(m))}
    )
    return {
        module
        for modules in owned.values()
        for module in modules
        if any(counts[id(part)] > 1 for part in (module, *_parameters(module)))
    }


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own parameters; none if they are offloaded.

    Whatever reads offloaded ones gets a new copy each time.
    """
    own = module._parameters
    return [p for p in own.values() if p is not None] if type(own) is dict else []


def _divide(source: nn.Module, scales: Tensor) -> Tensor:
    """Divide the output channels of a norm or Linear by ``scales``.

    :return: what rounding has made of a norm's scales, [D]
    """
    weight = cast(Tensor, source.weight)
    scales = scales.to(weight.device)
    if weight.ndim == 1:
        kept = (weight.float() / scales).to(weight.dtype).float()
        if isinstance(source, NormCalibrationModule):
            # after calibration, llm-compressor keeps this gain as an offset from 1
            kept = (kept - 1).to(weight.dtype).float() + 1
        rounded = weight.float() / kept
        scales = torch.where(rounded.isfinite() & (rounded > 0), rounded, 1.0)
    for name, parameter in outputs_of(source).items():
        divided = parameter.float() / by_output(scales, parameter)
        write_parameter(source, name, divided.to(parameter.dtype))
    return scales
