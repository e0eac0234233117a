"""Select the attention modules that a modifier prunes, and write their weights."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from compressed_tensors.utils import match_named_modules
from torch import Tensor, nn

from llmc_attnmask.attention.capture import UnsupportedAttentionError
from llmc_attnmask.attention.projections import (
    Projection,
    Role,
    attention_modules,
    find_projections,
)
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.calibration.samples import Offload
from llmc_attnmask.distributed import write_parameter
from llmc_attnmask.masks.record import set_mask
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.runlog.wording import listed


class AttentionTarget:
    """One attention module to prune, with its calibration inputs.

    :param roles: the projections to prune
    :param sparsity: share of each projection's entries to prune
    :param offload: where the inputs are kept
    :raises UnsupportedAttentionError: if the projections cannot be told apart, or the
        softmax cannot be seen
    """

    def __init__(
        self,
        name: str,
        attention: nn.Module,
        roles: Sequence[Role],
        sparsity: float,
        offload: Offload,
    ):
        self.name, self.attention = name, attention
        self.roles, self.sparsity = list(roles), sparsity
        self.projections = _projections(name, attention)
        self.inputs = ModuleInputs(offload)

    def check(self, structure: MaskStructure) -> None:
        """Refuse projections that are missing or do not fit the mask structure.

        :raises UnsupportedAttentionError: if the module contains no such projection
        :raises ValueError: if one does not fit; the message names the Linear
        """
        for role in self.roles:
            if role not in self.projections:
                raise UnsupportedAttentionError(
                    f"{self.name}: {type(self.attention).__name__} contains no {role}; "
                    f"prune {list(self.projections)} here, and {role} with "
                    "SparseGPTModifier"
                )
            projection = self.projections[role]
            weight = self.attention.get_parameter(projection.parameter)
            try:
                structure.groups(projection.of(weight))
            except ValueError as error:
                raise ValueError(f"{self.name}.{projection.child}: {error}") from None

    def collect(self, *hook: Any) -> None:
        """Keep the arguments of a call; a forward pre-hook (module, args, kwargs)."""
        _, args, kwargs = hook
        self.inputs.append(args, kwargs)

    def linears(self) -> list[nn.Linear]:
        """Return the Linears that are pruned, wholly or in part."""
        return [self._linear(child) for child in self._by_child()]

    def _by_child(self) -> dict[str, list[Projection]]:
        """Group the projections to prune by their Linear."""
        by_child: dict[str, list[Projection]] = {}
        for role in self.roles:
            projection = self.projections[role]
            by_child.setdefault(projection.child, []).append(projection)
        return by_child

    def _linear(self, child: str) -> nn.Linear:
        return cast(nn.Linear, self.attention.get_submodule(child))

    @torch.no_grad()
    def write(
        self, masks: Mapping[Role, Tensor], weights: Mapping[Role, Tensor] | None
    ) -> list[nn.Module]:
        """Write the pruned weights, and remember their masks.

        :param masks: bool [rows, columns] of each projection
        :param weights: [rows, columns] of each projection; None if survivors keep their
            values
        :return: the Linears that have changed
        """
        changed: list[nn.Module] = []
        for child, projections in self._by_child().items():
            linear = self._linear(child)
            weight = linear.weight.detach().clone()
            kept = torch.ones_like(weight, dtype=torch.bool)
            for projection in projections:
                projection.put(kept, masks[projection.role])
                if weights is not None:
                    values = weights[projection.role].to(weight.dtype)
                    projection.put(weight, values)
            # masked_fill, not a product: a product leaves -0.0
            write_parameter(linear, "weight", weight.masked_fill(~kept, 0.0))
            set_mask(linear, kept)
            changed.append(linear)
        return changed


def _projections(name: str, attention: nn.Module) -> dict[Role, Projection]:
    try:
        found = find_projections(attention)
    except UnsupportedAttentionError as error:
        raise UnsupportedAttentionError(
            f"{name}: {error}; put it under `ignore` or use SparseGPTModifier"
        ) from None
    return found


def select_attention(
    model: nn.Module, targets: list[str] | None, ignore: list[str]
) -> dict[str, nn.Module]:
    """Return the attention modules that are targeted and not ignored, in model order.

    :param targets: names, "re:" patterns or classes; None means all
    :raises ValueError: if there are none, or a target matches none
    """
    found = attention_modules(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention module with Linear layers"
        )
    targets = list(found) if targets is None else targets
    for target in targets:
        matched = [name for name, _ in match_named_modules(model, [target])]
        if not found.keys() & set(matched):
            raise ValueError(
                f"target {target!r} matches no attention module (it matches "
                f"{listed(matched)}); the model has {listed(list(found))}"
            )
    matched = [name for name, _ in match_named_modules(model, targets, ignore)]
    selected = {name: found[name] for name in matched if name in found}
    if not selected:
        raise ValueError(
            f"ignore {ignore} leaves no attention module to prune; the model has "
            f"{listed(list(found))}"
        )
    return selected
