"""Solve for the surviving weights of a block's Linears, in order, in closed form.

The surviving weights of each pruned Linear get the values that bring its output closest
to the dense Linear's output in the dense model, given its current inputs (``solve``).
So each Linear also compensates for what was pruned before it. A Linear that writes to
the residual stream compensates for the stream's own deviation, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmc_attnmask.attention.capture import AttentionReplica, UnsupportedAttentionError
from llmc_attnmask.attention.projections import (
    Role,
    attention_modules,
    find_projections,
)
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.calibration.micro_batches import MAX_MICRO_BATCH, Sums
from llmc_attnmask.distributed import gathered, owner, rank, send_from
from llmc_attnmask.recovery.block import Block, BlockPair, token_weights
from llmc_attnmask.solvers.attention_layer import AttentionLayer
from llmc_attnmask.solvers.least_squares import solve
from llmc_attnmask.solvers.matrix_objective import OUTPUT_WEIGHT, MatrixObjective

_HESSIAN = ""  # a key that no Linear has as its name


@torch.no_grad()
def refit(pair: BlockPair) -> None:
    """Overwrite the surviving weights of ``pair.pruned``; the masks stay."""
    dense, pruned = pair.dense, pair.pruned
    linears = pruned.linears()
    groups = _by_input(pruned, list(pair.kept))
    names = [name for group in groups for name in group]
    writers = gathered(_residual_writers(dense, names))[0]  # rank 0's trial counts
    sensitivities = _sensitivities(dense)
    for group in groups:
        silent = writers[writers.index(group[0]) :] if group[0] in writers else []
        hessian, targets = _normal_equations(dense, pruned, group, silent)
        for position, name in enumerate(group):
            weight, kept = linears[name].weight, pair.kept[name]
            found = weight
            if owner(position) == rank():
                known = sensitivities.get(name)
                found = solve(hessian, targets[name], weight, kept, known)
            weight.copy_(send_from(owner(position), found))


def _sensitivities(dense: Block) -> dict[str, Tensor]:
    """Return how much the outputs of q and k matter for the attention, by Linear.

    Each value has one block per head. Without them, fitting the outputs of q and k
    would undo what was gained on the attention matrix.
    """
    found: dict[str, Tensor] = {}
    for prefix, attention in attention_modules(dense.module).items():
        try:
            projections = find_projections(attention)
        except UnsupportedAttentionError:
            continue
        roles: list[Role] = [r for r in ("q", "k") if projections[r].whole]
        if not roles:
            continue  # the Linear holds rows of other projections, too
        inputs = ModuleInputs(dense.inputs.offload)
        latest: dict[str, Any] = {}
        handle = attention.register_forward_pre_hook(
            lambda _, args, kwargs, latest=latest: latest.update(
                args=args, kwargs=kwargs
            ),
            with_kwargs=True,
        )
        for _ in dense.runner(dense.micro_batches, dense):
            # not in the hook: a run that is out of memory calls it, too
            inputs.append(**latest)
        handle.remove()
        layer = AttentionLayer(AttentionReplica(attention), inputs, projections)
        objective = MatrixObjective(layer, roles, OUTPUT_WEIGHT)
        for role, (_, sensitivity) in objective.curvature().items():
            name = f"{prefix}.{projections[role].child}".removeprefix(".")
            assert sensitivity is not None
            found[name] = sensitivity
    return found


def _normal_equations(
    dense: Block, pruned: Block, group: list[str], silent: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return H and, by name, C of Linears that read the same input.

    :param silent: Linears whose outputs are replaced with zeros; if the group writes to
        the residual stream, the block's output is then the stream without them
    """
    linears = dense.linears()

    def terms(samples: list[int]) -> dict[str, Tensor] | None:
        dense_calls, dense_output = _run(dense, samples, group, silent)
        pruned_calls, output = _run(pruned, samples, group, silent)
        if group[0] not in pruned_calls:
            return None  # an expert without tokens
        x = pruned_calls[group[0]][0]
        everything = (len(samples), pruned.inputs.hidden.shape(samples[0])[1])
        rows = x.flatten(0, -2).float()
        weights = torch.ones_like(rows[:, :1])
        if dense_output is not None:
            written = dense_output + dense_calls[group[0]][1]
            weights = token_weights(written).view(-1, 1)
        weighted = rows * weights
        product = weighted.T @ rows
        found = {_HESSIAN: product}
        for name in group:
            linear = linears[name]
            if x.shape[:-1] == everything and name in dense_calls:
                target = dense_calls[name][1].float()
                if linear.bias is not None:
                    target = target - linear.bias
                if dense_output is not None and output is not None:
                    target = target + dense_output - output
                found[name] = target.flatten(0, -2).T @ weighted
            else:  # an expert may get different tokens in the two models
                found[name] = linear.weight @ product
        return found

    columns = linears[group[0]].in_features
    sums = Sums(like={name: linears[name].weight for name in group})
    sums.add(_HESSIAN, torch.zeros(columns, columns, device=pruned.device))
    for _, found in pruned.runner(pruned.micro_batches, terms):
        for key, term in (found or {}).items():
            sums.add(key, term)
    totals = sums.totals()
    return totals.pop(_HESSIAN), totals


class _Reached(BaseException):
    """Ends a run whose remainder is not needed."""


def _run(
    block: Block, samples: list[int], group: list[str], silent: list[str]
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor | None]:
    """Return (input, output) by Linear of a group, and the block's output.

    If no Linear is silent, the block stops after the group and its output is None.
    """
    with _watched(block, group, silent) as seen:
        if silent:
            return seen, block(samples)

        def stop(*_: Any) -> None:
            if seen.keys() >= set(group):
                raise _Reached

        # registered after the recording hooks, and therefore called after them
        handles = [block.linears()[n].register_forward_hook(stop) for n in group]
        try:
            block(samples)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen, None


@contextmanager
def _watched(
    block: Block, names: list[str], silent: list[str]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record (input, output) by Linear, and let the silent ones return zeros."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Any:
            if name in names:
                seen[name] = (args[0], out)
            return torch.zeros_like(out) if name in silent else None

        return record

    handles = [
        block.linears()[name].register_forward_hook(hook(name))
        for name in {*names, *silent}
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _by_input(block: Block, names: list[str]) -> list[list[str]]:
    """Group Linears by the input tensor that they read, in the order in which they run.

    Linears that the first samples do not reach are left out.
    """
    first = [
        m
        for m in block.micro_batches
        if m.index * m.size < MAX_MICRO_BATCH and m.samples
    ]
    seen = {m.index: _groups(block, names, list(m.samples)) for m in first}
    by_index: dict[int, list[list[str]]] = {}
    for share in gathered(seen):
        by_index |= share
    groups: list[list[str]] = []
    known: set[str] = set()
    for index in sorted(by_index):
        for group in by_index[index]:
            if new := [name for name in group if name not in known]:
                groups.append(new)
                known |= set(new)
    return groups


def _groups(block: Block, names: list[str], samples: list[int]) -> list[list[str]]:
    with _watched(block, names, []) as seen:
        block(samples)
    groups: list[list[str]] = []
    previous: Tensor | None = None
    for name, (x, _) in seen.items():  # in the order of their calls
        if x is previous:
            groups[-1].append(name)
        else:
            groups.append([name])
        previous = x
    return groups


def _residual_writers(block: Block, names: list[str]) -> list[str]:
    """Return the Linears whose output is added unchanged to the block's, in order."""
    width = block.inputs.hidden[0].shape[-1]
    linears = block.linears()
    writers: list[str] = []
    for name in reversed(names):
        if linears[name].out_features == width and _writes(block, name, writers):
            writers.insert(0, name)
    return writers


def _writes(block: Block, name: str, later: list[str]) -> bool:
    """Test whether a Linear writes to the residual stream, whatever the architecture.

    Its output is changed, with later writers silent.

    :return: whether the change comes out of the block unchanged
    """
    sample = [0]
    with _watched(block, [name], later) as seen:
        base = block(sample)
    if name not in seen or seen[name][1].shape != base.shape:
        return False
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(base.shape, generator=generator).to(base) * base.std()
    handle = block.linears()[name].register_forward_hook(lambda _m, _a, y: y + change)
    try:
        with _watched(block, [], later):
            moved = block(sample) - base
    finally:
        handle.remove()
    return torch.allclose(moved, change, atol=1e-3 * base.std().item())
