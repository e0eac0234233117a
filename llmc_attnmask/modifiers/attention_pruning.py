"""``AttentionMatrixPruningModifier``: llm-compressor's life cycle around the solver."""

from typing import Any, cast

import torch
from compressed_tensors.offload import get_execution_device
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from llmc_attnmask.attention.capture import AttentionReplica, UnsupportedAttentionError
from llmc_attnmask.attention.output_path import check_output_path
from llmc_attnmask.attention.projections import (
    Projection,
    Role,
    attention_modules,
    find_projections,
)
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.calibration.samples import Offload
from llmc_attnmask.distributed import check_shares, reached, write_parameter
from llmc_attnmask.masks.record import set_mask
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.modifiers.attention_measurements import joined, measurements
from llmc_attnmask.modifiers.base import StoredModifier
from llmc_attnmask.modifiers.fields import (
    MaskStructureField,
    Names,
    check_finite,
)
from llmc_attnmask.runlog.context import run_of
from llmc_attnmask.runlog.layer_log import LayerLog
from llmc_attnmask.runlog.layer_work import layer_work
from llmc_attnmask.runlog.wording import listed
from llmc_attnmask.solvers.attention_layer import AttentionLayer
from llmc_attnmask.solvers.matrix_objective import OUTPUT_WEIGHT
from llmc_attnmask.solvers.settings import SolverSettings
from llmc_attnmask.solvers.solver import learn_masks
from llmc_attnmask.upstream.baselines import baselines

_STEPS = {False: 200, True: 25}  # by update_weights, which starts from more
_MAPPED = 6  # attention modules whose matrices the report shows


class AttentionMatrixPruningModifier(StoredModifier):
    """
    Prunes the projections of attention modules with masks that are learned on the error
    of the attention matrix itself (https://arxiv.org/abs/2410.11261), not on a linear
    proxy of it.

    Sample yaml:

    ```yaml
    prune_stage:
      attention_modifiers:
        AttentionMatrixPruningModifier:
          sparsity: 0.5
          mask_structure: "2:4"
    ```

    Lifecycle:

    - on_initialize
        - find attention modules and their projections, check fields and weights
    - on_calibration_start
        - register_hook(attention, collect inputs, "forward_pre")
    - on_sequential_epoch_end
        - learn_masks, write the pruned weights
    - on_calibration_end
        - remove_hooks()

    :param sparsity: share of each projection's entries to prune, in [0, 1); or a list
        with one share per targeted attention module, in the model's order
    :param mask_structure: "N:M" prunes N of every M consecutive inputs of a row; "0:0"
        prunes a share of the whole matrix. Defaults to "0:0"
    :param projections: which projections to prune, of q, k, v and o. Defaults to q and
        k. v and o are pruned on the attention output, given the pruned attention matrix
    :param update_weights: false, light mode: survivors keep their original bits; true,
        accuracy mode: masks and survivors are solved for to second order, then the
        survivors are moved by gradient steps
    :param output_weight: share of the error that is weighed by what reaches the
        attention output, ||(A - A~) V W_o||, in [0, 1]; 0 is the paper's objective
    :param targets: attention modules to prune, by name, "re:" pattern or class.
        Defaults to all attention modules
    :param ignore: attention modules to leave alone, likewise
    :param l2_penalty: the paper's lambda, on the mean square of the relaxed mask
    :param steps: optimisation steps per attention module; 0 keeps the start: Wanda's
        mask, or the second-order solution if survivors are updated. Defaults to 200,
        or 25 if survivors are updated
    :param learning_rate: Adam's, of the mask's scores, whose mean starts at 1; light
        mode only
    :param batch_size: calibration samples per step, of any length. Padding counts as
        text
    :param seed: order of the calibration samples; same seed and machine, same bytes
    :param offload_activations: where calibration activations are kept: "cpu", in
        memory, or "disk", in TMPDIR or /var/tmp. Results are the same
    :param storage: how 2:4 layers are saved: "dense" or "sparse-24-bitmask". Defaults
        to what another modifier of the recipe asks for, or dense
    """

    requires_calibration_data: bool = True

    sparsity: float | list[float]
    mask_structure: MaskStructureField = "0:0"
    projections: list[Role] = Field(default=["q", "k"])
    update_weights: bool = False
    output_weight: float = Field(default=OUTPUT_WEIGHT, ge=0, le=1)
    targets: Names | None = None
    ignore: Names = Field(default_factory=list)
    l2_penalty: float = Field(default=0.0, ge=0)
    steps: int | None = Field(default=None, ge=0)
    learning_rate: float = Field(default=0.1, gt=0)
    batch_size: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    offload_activations: Offload = "cpu"

    _structure: MaskStructure = PrivateAttr()
    _layers: dict[str, "_Target"] = PrivateAttr(default_factory=dict)
    _with_maps: set[str] = PrivateAttr(default_factory=set)

    @model_validator(mode="after")
    def _check_fields(self) -> "AttentionMatrixPruningModifier":
        self._structure = MaskStructure.parse(self.mask_structure)
        for sparsity in _as_list(self.sparsity):
            self._structure.check(sparsity)
        if not self.projections or len(set(self.projections)) < len(self.projections):
            raise ValueError(
                f"projections is {self.projections}; expected some of q, k, v, o, each "
                "once"
            )
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        check_finite(state.model)
        found = attention_modules(state.model)
        names = self._select(state.model, found)
        sparsities = _as_list(self.sparsity)
        if isinstance(self.sparsity, list) and len(sparsities) != len(names):
            raise ValueError(
                f"sparsity lists {len(sparsities)} values for {len(names)} attention "
                f"modules: {listed(names)}"
            )
        if not isinstance(self.sparsity, list):
            sparsities *= len(names)
        for name, sparsity in zip(names, sparsities, strict=True):
            self._layers[name] = self._checked_layer(name, found[name], sparsity)
        run_of(self).expect(self, len(names))
        self._with_maps = _spread(names, _MAPPED)
        return True

    def linears_to_prune(self) -> list[nn.Module]:
        return [
            _linear(layer.attention, layer.projections[role])
            for layer in self._layers.values()
            for role in self.projections
            if layer.sparsity
        ]

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        run_of(self).start_clock()
        for layer in self._layers.values():
            self.register_hook(
                layer.attention, layer.collect, "forward_pre", with_kwargs=True
            )

    def on_sequential_epoch_end(
        self,
        state: State,
        event: Event,
        modules: list[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            collected = [n for n, layer in self._layers.items() if len(layer.inputs)]
            for name in reached(collected):
                layer = self._layers[name]
                if not self.done:
                    check_shares(layer.inputs.hidden)
                with layer_work(state.model, self, name) as work:
                    if not work.restored:
                        work.changed = self._prune(state.model, name, layer)
                layer.inputs.clear()
        except BaseException:
            self.remove_hooks()  # the model outlives a run that failed
            self._layers = {}
            raise

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()
        if missed := [name for name in self._layers if name not in self.done]:
            raise ValueError(
                f"no calibration sample reached {listed(missed)}; put these modules "
                "under `ignore` or calibrate with data that uses them"
            )
        self._layers = {}

    def _select(self, model: nn.Module, found: dict[str, nn.Module]) -> list[str]:
        """Names of the attention modules that targets and ignore leave."""
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no attention module with Linear layers"
            )
        targets = list(found) if self.targets is None else self.targets
        for target in targets:
            matched = [name for name, _ in match_named_modules(model, [target])]
            if not found.keys() & set(matched):
                raise ValueError(
                    f"target {target!r} matches no attention module (it matches "
                    f"{listed(matched)}); the model has {listed(list(found))}"
                )
        matched = [name for name, _ in match_named_modules(model, targets, self.ignore)]
        names = [name for name in matched if name in found]
        if not names:
            raise ValueError(
                f"ignore {self.ignore} leaves no attention module to prune; the model "
                f"has {listed(list(found))}"
            )
        return names

    def _checked_layer(
        self, name: str, attention: nn.Module, sparsity: float
    ) -> "_Target":
        try:
            projections = find_projections(attention)
        except UnsupportedAttentionError as error:
            raise UnsupportedAttentionError(
                f"{name}: {error}; put it under `ignore` or use SparseGPTModifier"
            ) from None
        for role in self.projections:
            if role not in projections:
                raise UnsupportedAttentionError(
                    f"{name}: {type(attention).__name__} has no {role} within; prune "
                    f"{list(projections)} here, and {role} with SparseGPTModifier"
                )
            projection = projections[role]
            weight = attention.get_parameter(projection.parameter)
            try:
                self._structure.groups(projection.of(weight))
            except ValueError as error:
                raise ValueError(f"{name}.{projection.child}: {error}") from None
        return _Target(attention, projections, sparsity, self.offload_activations)

    def _prune(self, model: nn.Module, name: str, layer: "_Target") -> list[nn.Module]:
        """Prune one attention module; returns its Linears that have changed."""
        work = LayerLog(model, self, name)
        replica = AttentionReplica(
            layer.attention, device=get_execution_device(layer.attention)
        )
        self._check_output_path(name, layer, replica)
        solutions = learn_masks(
            AttentionLayer(replica, layer.inputs, layer.projections),
            self.projections,
            self._settings(layer.sparsity),
            baselines(self._structure, layer.sparsity),
        )
        masks: dict[Role, Tensor] = {}
        weights: dict[Role, Tensor] = {}
        for solution in solutions:
            masks |= solution.masks
            weights |= solution.weights
        changed = self._write(layer, masks, weights)
        work.done(
            replica.device,
            {joined(s.masks): [s.start_error, s.error] for s in solutions},
            fallback="; ".join(s.fallback for s in solutions if s.fallback) or None,
            **measurements(
                replica,
                layer.inputs,
                layer.projections,
                solutions,
                with_maps=name in self._with_maps,
            ),
        )
        return changed

    def _check_output_path(
        self, name: str, layer: "_Target", replica: AttentionReplica
    ) -> None:
        needed = self.output_weight or {"v", "o"} & set(self.projections)
        if not needed or "o" not in layer.projections:
            return
        args, kwargs = layer.inputs.batch([0], replica.device, replica.dtype)
        try:
            check_output_path(replica, args, kwargs, layer.projections["o"].child)
        except UnsupportedAttentionError as error:
            raise UnsupportedAttentionError(f"{name}: {error}") from None

    @torch.no_grad()
    def _write(
        self,
        layer: "_Target",
        masks: dict[Role, Tensor],
        weights: dict[Role, Tensor],
    ) -> list[nn.Module]:
        by_child: dict[str, list[Projection]] = {}
        for role in self.projections:
            projection = layer.projections[role]
            by_child.setdefault(projection.child, []).append(projection)
        changed: list[nn.Module] = []
        for projections in by_child.values():
            linear = _linear(layer.attention, projections[0])
            weight = linear.weight.detach().clone()
            kept = torch.ones_like(weight, dtype=torch.bool)
            for projection in projections:
                projection.put(kept, masks[projection.role])
                if self.update_weights:
                    values = weights[projection.role].to(weight.dtype)
                    projection.put(weight, values)
            # masked_fill, not a product: a product leaves -0.0
            write_parameter(linear, "weight", weight.masked_fill(~kept, 0.0))
            set_mask(linear, kept)
            changed.append(linear)
        return changed

    def _settings(self, sparsity: float) -> SolverSettings:
        return SolverSettings(
            structure=self._structure,
            sparsity=sparsity,
            steps=_STEPS[self.update_weights] if self.steps is None else self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            l2_penalty=self.l2_penalty,
            output_weight=self.output_weight,
            seed=self.seed,
            update_weights=self.update_weights,
        )


class _Target:
    """An attention module in work."""

    def __init__(
        self,
        attention: nn.Module,
        projections: dict[Role, Projection],
        sparsity: float,
        offload: Offload,
    ):
        self.attention = attention
        self.projections = projections
        self.sparsity = sparsity
        self.inputs = ModuleInputs(offload)

    def collect(self, *hook: Any) -> None:
        """Forward pre-hook: called with (module, args, kwargs)."""
        _, args, kwargs = hook
        self.inputs.append(args, kwargs)


def _linear(attention: nn.Module, projection: Projection) -> nn.Linear:
    return cast(nn.Linear, attention.get_submodule(projection.child))


def _spread(names: list[str], most: int) -> set[str]:
    """The first, the last and some at equal spacing between them."""
    if len(names) <= most:
        return set(names)
    return {names[i * (len(names) - 1) // (most - 1)] for i in range(most)}


def _as_list(sparsity: float | list[float]) -> list[float]:
    return list(sparsity) if isinstance(sparsity, list) else [sparsity]
