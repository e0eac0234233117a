"""``AttentionMatrixPruningModifier``: the solver in llm-compressor's life cycle."""

from typing import Any

from compressed_tensors.offload import get_execution_device
from llmcompressor.core import Event, State
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from llmc_attnmask.attention.capture import AttentionReplica, UnsupportedAttentionError
from llmc_attnmask.attention.output_path import check_output_path
from llmc_attnmask.attention.projections import Role
from llmc_attnmask.calibration.samples import Offload
from llmc_attnmask.distributed import check_shares, reached
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.modifiers.attention_measurements import joined, measurements
from llmc_attnmask.modifiers.attention_targets import AttentionTarget, select_attention
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
from llmc_attnmask.solvers.solver import combined, learn_masks
from llmc_attnmask.upstream.baselines import baselines

# by update_weights, which has the better start
_STEPS = {False: 200, True: 50}
_BATCH_SIZE = {False: 8, True: 4}
_MAPPED = 6  # attention modules whose attention maps the report shows


class AttentionMatrixPruningModifier(StoredModifier):
    """
    Prunes the projections of attention modules. Masks minimize the error of the
    attention matrix itself (https://arxiv.org/abs/2410.11261), not that of a linear
    proxy.

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
        k. v and o are pruned by the error of the attention output, given the pruned
        attention matrix
    :param update_weights: true, accuracy mode: masks and survivors are solved for to
        second order, then the survivors are refined by gradient steps; false, light
        mode: masks only, every survivor keeps its bits. Defaults to true
    :param output_weight: share of the error that is measured by its effect on the
        attention output, ||(A - A~) V W_o||, in [0, 1]; 0 is the paper's objective
    :param targets: attention modules to prune, by name, "re:" pattern or class.
        Defaults to all attention modules
    :param ignore: attention modules to leave alone, in the same notation
    :param l2_penalty: the paper's lambda, on the mean square of the relaxed mask; light
        mode only
    :param steps: optimization steps per attention module; 0 keeps what they start from:
        the second-order solution, or Wanda's mask in light mode. Defaults to 50, or to
        200 in light mode
    :param learning_rate: of Adam, for the mask's scores, whose mean starts at 1; light
        mode only
    :param batch_size: calibration samples per step, of any length. Padding is treated
        as text. Defaults to 4, or to 8 in light mode
    :param seed: sets the order of the calibration samples; the same seed on the same
        machine gives the same bytes
    :param offload_activations: where calibration activations are kept: "cpu", in
        memory, or "disk", in TMPDIR or /var/tmp. The result is the same
    :param storage: how sparse layers are saved: "dense", "sparse-24-bitmask" or
        "sparse-bitmask". Defaults to the storage that another modifier of the recipe
        names, or else to "dense"
    """

    requires_calibration_data: bool = True

    sparsity: float | list[float]
    mask_structure: MaskStructureField = "0:0"
    projections: list[Role] = Field(default=["q", "k"])
    update_weights: bool = True
    output_weight: float = Field(default=OUTPUT_WEIGHT, ge=0, le=1)
    targets: Names | None = None
    ignore: Names = Field(default_factory=list)
    l2_penalty: float = Field(default=0.0, ge=0)
    steps: int | None = Field(default=None, ge=0)
    learning_rate: float = Field(default=0.1, gt=0)
    batch_size: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    offload_activations: Offload = "cpu"

    _structure: MaskStructure = PrivateAttr()
    _attention: dict[str, AttentionTarget] = PrivateAttr(default_factory=dict)
    _mapped: set[str] = PrivateAttr(default_factory=set)

    @model_validator(mode="after")
    def _check_fields(self) -> "AttentionMatrixPruningModifier":
        self._structure = MaskStructure.parse(self.mask_structure)
        given = self.sparsity
        for sparsity in given if isinstance(given, list) else [given]:
            self._structure.check(sparsity)
        if not self.projections or len(set(self.projections)) < len(self.projections):
            raise ValueError(
                f"projections is {self.projections}; expected some of q, k, v, o, each "
                "once"
            )
        # resolved here, so that a recipe, report or card records what was used
        if self.steps is None:
            self.steps = _STEPS[self.update_weights]
        if self.batch_size is None:
            self.batch_size = _BATCH_SIZE[self.update_weights]
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        check_finite(state.model)
        selected = select_attention(state.model, self.targets, self.ignore)
        for (name, attention), sparsity in zip(
            selected.items(), self._sparsities(list(selected)), strict=True
        ):
            target = AttentionTarget(
                name, attention, self.projections, sparsity, self.offload_activations
            )
            target.check(self._structure)
            self._attention[name] = target
        run_of(self).expect(self, len(selected))
        self._mapped = _spread(list(selected), _MAPPED)
        return True

    def _sparsities(self, names: list[str]) -> list[float]:
        """Return the sparsity of each attention module."""
        if not isinstance(self.sparsity, list):
            return [self.sparsity] * len(names)
        if len(self.sparsity) != len(names):
            raise ValueError(
                f"sparsity lists {len(self.sparsity)} values for {len(names)} "
                f"attention modules: {listed(names)}"
            )
        return self.sparsity

    def linears_to_prune(self) -> list[nn.Module]:
        return [
            linear
            for target in self._attention.values()
            if target.sparsity
            for linear in target.linears()
        ]

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        run_of(self).start_clock()
        for target in self._attention.values():
            self.register_hook(
                target.attention, target.collect, "forward_pre", with_kwargs=True
            )

    def on_sequential_epoch_end(
        self,
        state: State,
        event: Event,
        modules: list[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            collected = [n for n, target in self._attention.items() if target.inputs]
            for name in reached(collected):
                target = self._attention[name]
                if not self.done:
                    check_shares(target.inputs.hidden)
                with layer_work(state.model, self, name) as work:
                    if not work.restored:
                        work.changed = self._prune(state.model, target)
                target.inputs.clear()
        except BaseException:
            self.remove_hooks()  # the model outlives a run that failed
            self._attention = {}
            raise

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()
        if missed := [name for name in self._attention if name not in self.done]:
            raise ValueError(
                f"no calibration sample reached {listed(missed)}; put these modules "
                "under `ignore` or calibrate with data that uses them"
            )
        self._attention = {}

    def _prune(self, model: nn.Module, target: AttentionTarget) -> list[nn.Module]:
        """Prune one attention module; returns its Linears that have changed."""
        log = LayerLog(model, self, target.name)
        replica = AttentionReplica(
            target.attention, device=get_execution_device(target.attention)
        )
        self._check_output_path(target, replica)
        layer = AttentionLayer(replica, target.inputs, target.projections)
        solutions = learn_masks(
            layer,
            self.projections,
            self._settings(target.sparsity),
            baselines(self._structure, target.sparsity),
        )
        masks, weights = combined(solutions)
        changed = target.write(masks, weights if self.update_weights else None)
        log.done(
            replica.device,
            {joined(s.masks): [s.start_error, s.error] for s in solutions},
            fallback="; ".join(s.fallback for s in solutions if s.fallback) or None,
            **measurements(layer, solutions, target.name in self._mapped),
        )
        return changed

    def _check_output_path(
        self, target: AttentionTarget, replica: AttentionReplica
    ) -> None:
        needed = self.output_weight or {"v", "o"} & set(self.projections)
        if not needed or "o" not in target.projections:
            return
        args, kwargs = target.inputs.batch([0], replica.device, replica.dtype)
        try:
            check_output_path(replica, args, kwargs, target.projections["o"].child)
        except UnsupportedAttentionError as error:
            raise UnsupportedAttentionError(f"{target.name}: {error}") from None

    def _settings(self, sparsity: float) -> SolverSettings:
        assert self.steps is not None and self.batch_size is not None
        return SolverSettings(
            structure=self._structure,
            sparsity=sparsity,
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            l2_penalty=self.l2_penalty,
            output_weight=self.output_weight,
            seed=self.seed,
            update_weights=self.update_weights,
        )


def _spread(names: list[str], most: int) -> set[str]:
    """Return the first and last name, and some at equal spacing between them."""
    if len(names) <= most:
        return set(names)
    return {names[i * (len(names) - 1) // (most - 1)] for i in range(most)}
