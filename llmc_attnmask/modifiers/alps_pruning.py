"""``ALPSPruningModifier``: layer-wise pruning whose masks come from ADMM."""

from typing import Any

import torch
from compressed_tensors.offload import get_execution_device, update_offload_parameter
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from llmc_attnmask.masks.least_squares import choose_mask, solve
from llmc_attnmask.masks.record import remember
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.modifiers.fields import MaskStructureField, Names, check_finite
from llmc_attnmask.modifiers.layers import Layer
from llmc_attnmask.modifiers.progress import step
from llmc_attnmask.modifiers.run import run_of
from llmc_attnmask.modifiers.storage import StoredModifier


class ALPSPruningModifier(StoredModifier):
    """
    Prunes Linear layers on the error of their own output, as SparseGPT does, with masks
    from ADMM and survivors solved to the optimum (https://arxiv.org/abs/2406.07831).

    Sample yaml:

    ```yaml
    prune_stage:
      rest_modifiers:
        ALPSPruningModifier:
          sparsity: 0.5
          mask_structure: "2:4"
          targets: ["re:.*(v|o|gate|up|down)_proj$"]
    ```

    Lifecycle:

    - on_calibration_start
        - register_hook(linear, accumulate X^T X, "forward_pre")
    - on_sequential_epoch_end
        - choose_mask, solve, write the pruned weights
    - on_calibration_end
        - remove_hooks()

    :param sparsity: share of each Linear's entries to prune, in [0, 1)
    :param mask_structure: "N:M" prunes N of every M consecutive inputs of a row; "0:0"
        prunes a share of the whole matrix. Defaults to "0:0"
    :param targets: Linears to prune, by name, "re:" pattern or class
    :param ignore: Linears to leave alone, likewise. Defaults to the output layer
    :param storage: how 2:4 layers are saved: "dense" or "sparse-24-bitmask". Defaults
        to what another modifier of the recipe asks for, or dense
    """

    requires_calibration_data: bool = True

    sparsity: float
    mask_structure: MaskStructureField = "0:0"
    targets: Names = Field(default_factory=lambda: ["Linear"])
    ignore: Names = Field(default_factory=lambda: ["re:.*lm_head"])

    _structure: MaskStructure = PrivateAttr()
    _linears: dict[str, nn.Linear] = PrivateAttr(default_factory=dict)
    _hessians: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_fields(self) -> "ALPSPruningModifier":
        self._structure = MaskStructure.parse(self.mask_structure)
        self._structure.check(self.sparsity)
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        check_finite(state.model)
        found = match_named_modules(state.model, self.targets, self.ignore)
        self._linears = {n: m for n, m in found if isinstance(m, nn.Linear)}
        if not self._linears:
            raise ValueError(
                f"targets {self.targets} without {self.ignore} match no Linear layer"
            )
        for name, linear in self._linears.items():
            try:
                self._structure.groups(linear.weight)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        run_of(self).expect(self, len(self._linears))
        return True

    def linears_to_prune(self) -> list[nn.Module]:
        return list(self._linears.values()) if self.sparsity else []

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        run_of(self).start_clock()
        for name, linear in self._linears.items():
            self.register_hook(linear, self._accumulate(name), "forward_pre")

    def _accumulate(self, name: str) -> Any:
        def hook(linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()
            product = x.T @ x
            seen = self._hessians.get(name)
            self._hessians[name] = product if seen is None else seen.add_(product)

        return hook

    def on_sequential_epoch_end(
        self,
        state: State,
        event: Event,
        modules: list[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in list(self._hessians):
            linear, hessian = self._linears[name], self._hessians.pop(name)
            with step(state.model, self, name) as work:
                if not work.restored:
                    self._prune(state.model, name, linear, hessian)
                    work.changed = [linear]

    @torch.no_grad()
    def _prune(
        self, model: nn.Module, name: str, linear: nn.Linear, hessian: Tensor
    ) -> None:
        work = Layer(model, self, name)
        device = get_execution_device(linear)
        weight = linear.weight.detach().to(device, torch.float32)
        if not hessian.isfinite().all():
            raise ValueError(
                f"the inputs of {name} overflow or are no numbers on the calibration "
                "data; repair the checkpoint or the data first"
            )
        target = weight @ hessian
        kept, start = choose_mask(
            hessian, target, weight, self._structure, self.sparsity
        )
        pruned = solve(hessian, target, start, kept)
        error = _output(pruned - weight, hessian) / _output(weight, hessian)
        pruned = pruned.to(linear.weight.dtype).masked_fill(~kept, 0.0)
        update_offload_parameter(linear, "weight", pruned)
        remember(linear, kept)
        zeros = int((~kept).sum())
        work.done(device, {"output": [error]}, zeros=zeros, entries=kept.numel())

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()


def _output(weight: Tensor, hessian: Tensor) -> float:
    """||X W^T||_F^2"""
    return float(((weight @ hessian) * weight).sum().clamp_min(1e-30))
