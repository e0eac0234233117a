"""``ALPSPruningModifier``: layer-wise pruning in llm-compressor's life cycle."""

from typing import Any

import torch
from compressed_tensors.utils import match_named_modules, match_targets
from llmcompressor.core import Event, State
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from llmc_attnmask.distributed import (
    check_shares,
    gathered,
    world_size,
    write_parameter,
)
from llmc_attnmask.masks.record import set_mask
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.modifiers.base import StoredModifier
from llmc_attnmask.modifiers.fields import (
    MaskStructureField,
    Names,
    check_finite,
)
from llmc_attnmask.runlog.context import run_of
from llmc_attnmask.runlog.layer_log import LayerLog
from llmc_attnmask.runlog.layer_work import layer_work, restorable
from llmc_attnmask.runlog.wording import listed
from llmc_attnmask.solvers.alps import LinearProblem, LinearSolution, prune_linears


class ALPSPruningModifier(StoredModifier):
    """
    Prunes Linear layers by the error of their own output, as SparseGPT does. Masks come
    from ADMM, and survivors are solved for by conjugate gradients
    (https://arxiv.org/abs/2406.07831).

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
        - prune_linears, write the pruned weights
    - on_calibration_end
        - remove_hooks()

    :param sparsity: share of each Linear's entries to prune, in [0, 1); or a mapping
        from names, "re:" patterns or classes to shares, which names each Linear once
    :param mask_structure: "N:M" prunes N of every M consecutive inputs of a row; "0:0"
        prunes a share of the whole matrix. Defaults to "0:0"
    :param targets: Linears to prune, by name, "re:" pattern or class
    :param ignore: Linears to leave dense, in the same notation. Defaults to the output
        layer
    :param storage: how sparse layers are saved: "dense", "sparse-24-bitmask" or
        "sparse-bitmask". Defaults to the storage that another modifier of the recipe
        names, or else to "dense"
    """

    requires_calibration_data: bool = True

    sparsity: float | dict[str, float]
    mask_structure: MaskStructureField = "0:0"
    targets: Names = Field(default_factory=lambda: ["Linear"])
    ignore: Names = Field(default_factory=lambda: ["re:.*lm_head"])

    _structure: MaskStructure = PrivateAttr()
    _linears: dict[str, nn.Linear] = PrivateAttr(default_factory=dict)
    _sparsities: dict[str, float] = PrivateAttr(default_factory=dict)
    _problems: dict[str, LinearProblem] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_fields(self) -> "ALPSPruningModifier":
        self._structure = MaskStructure.parse(self.mask_structure)
        given = self.sparsity
        for sparsity in given.values() if isinstance(given, dict) else [given]:
            self._structure.check(sparsity)
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
            self._sparsities[name] = self._sparsity_of(name, linear)
        run_of(self).expect(self, len(self._linears))
        return True

    def _sparsity_of(self, name: str, linear: nn.Linear) -> float:
        if not isinstance(self.sparsity, dict):
            return self.sparsity
        keys = [key for key in self.sparsity if match_targets(name, linear, [key])]
        if len(keys) != 1:
            raise ValueError(
                f"sparsity names {name} {len(keys)} times"
                f"{f' ({listed(keys)})' if keys else ''}; expected once, or put it "
                "under `ignore`"
            )
        return self.sparsity[keys[0]]

    def linears_to_prune(self) -> list[nn.Module]:
        return [
            self._linears[name] for name, share in self._sparsities.items() if share
        ]

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        run_of(self).start_clock()
        for name, linear in self._linears.items():
            self.register_hook(linear, self._accumulate(name), "forward_pre")

    def _accumulate(self, name: str) -> Any:
        def hook(linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
            self._problem(name).add(args[0])

        return hook

    def _problem(self, name: str) -> LinearProblem:
        if name not in self._problems:
            self._problems[name] = LinearProblem(name, self._linears[name])
        return self._problems[name]

    def on_sequential_epoch_end(
        self,
        state: State,
        event: Event,
        modules: list[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            self._prune_reached(state.model)
        except BaseException:
            self.remove_hooks()  # the model outlives a run that failed
            self._problems = {}
            raise

    def _prune_reached(self, model: nn.Module) -> None:
        if self._problems and not self.done:
            first = next(iter(self._problems.values()))
            check_shares([first.own_diagonal()])
        # experts may have had tokens on only some ranks
        reached = set().union(*gathered(set(self._problems)))
        names = [name for name in self._linears if name in reached]
        at_once = world_size()
        for start in range(0, len(names), at_once):
            few = names[start : start + at_once]
            layers = {name: LayerLog(model, self, name) for name in few}
            unsolved = [name for name in few if not restorable(self, name)]
            problems = [self._problem(name) for name in unsolved]
            sparsities = [self._sparsities[name] for name in unsolved]
            found = prune_linears(problems, self._structure, sparsities)
            solutions = dict(zip(unsolved, found, strict=True))
            for name in few:
                self._problems.pop(name, None)
                linear = self._linears[name]
                with layer_work(model, self, name) as work:
                    if not work.restored:
                        self._write(layers[name], linear, solutions[name])
                        work.changed = [linear]

    @torch.no_grad()
    def _write(
        self, layer: LayerLog, linear: nn.Linear, solution: LinearSolution
    ) -> None:
        pruned = solution.weight.to(linear.weight.dtype)
        write_parameter(linear, "weight", pruned.masked_fill(~solution.kept, 0.0))
        set_mask(linear, solution.kept)
        layer.done(
            solution.weight.device,
            {"output": [solution.error]},
            zeros=int((~solution.kept).sum()),
            entries=solution.kept.numel(),
            fallback=solution.fallback,
        )

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()
        if missed := [name for name in self._linears if name not in self.done]:
            logger.warning(
                f"no calibration sample reached {listed(missed)}, which stay dense; "
                "put them under `ignore` or calibrate with data that uses them"
            )
