"""Even out a block's activations, so that they lose less when they are quantized.

All activations of a token share one scale, so a few channels with large ones leave the
others few steps. Channel j is divided by s_j where it is made, and multiplied by s_j
where it is read, as in SmoothQuant (https://arxiv.org/abs/2211.10438), but with

    s_j^2 = rms(x_j) / rms(w_j)

instead of a ratio of largest values. A token's scale grows with its activations, so
rounding adds about sum_j x_tj^2 / s_j^2 * sum_j s_j^2 ||w_j||^2 to the squared error of
a Linear's outputs, and this s is where its sum over the tokens is least. What the few
tokens with massive activations need does not count more than what all others do.

Whether scaling leaves a model as it is depends on its architecture: on what else reads
a channel, and on what happens to it on the way. Names do not tell: the norm before the
MLP of one architecture comes after the attention in another. So places are found by
trying.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

_SEED = 0
# of the change that the readers alone would make; in float32, scales that are powers of
# two change nothing at all where scaling is possible
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Place:
    """Where channels can be scaled without changing what the block computes."""

    source: str  # norm or Linear; dividing its outputs ...
    readers: tuple[str, ...]  # ... and multiplying these Linears' inputs cancel out


def smoothing_scales(squares: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return s, scaled to a geometric mean of 1, float32 [D].

    A silent channel keeps its scale. One that nothing reads is scaled as if it were
    read as little as any other, so that its activations do not matter either.

    :param squares: sum over tokens of x_j^2, [D]
    :param weights: of the Linears that read x, [rows, D] each
    """
    columns = [weight.detach().float().square().sum(0) for weight in weights]
    read = torch.stack(columns).sum(0)
    least = read.masked_fill(read == 0, torch.inf).min()
    logarithms = (squares.float() / read.maximum(least)).log() / 4
    known = logarithms.isfinite()
    centered = logarithms - logarithms[known].mean()
    return torch.where(known, centered.exp(), 1.0)


@torch.no_grad()
def places(
    block: nn.Module, run: Callable[[], Tensor], without: Collection[str] = ()
) -> list[Place]:
    """Find where a block's channels can be scaled, by scaling them.

    Tried are norms together with the Linears that read their outputs as they are, and
    pairs of Linears of one module, such as an MLP's up and down projections.

    :param block: in float32; its weights are changed and restored
    :param run: runs the block on a sample and returns what later blocks see of it
    :param without: modules whose Linears are not paired with each other
    """
    found = []
    output, norms = _watched(block, run)
    for name, readers in norms.items():
        place = Place(name, tuple(readers))
        if _cancels_out(block, run, output, place):
            found.append(place)
    for name, sources in _pairs(block, without, {r for p in found for r in p.readers}):
        pairs = (Place(source, (name,)) for source in sources)
        found += [p for p in pairs if _cancels_out(block, run, output, p)][:1]
    return found


def _watched(
    block: nn.Module, run: Callable[[], Tensor]
) -> tuple[Tensor, dict[str, list[str]]]:
    """Run a block; return its output, and norms with the Linears that read them."""
    made: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    handles = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: read.__setitem__(name, args[0])
                )
            )
        elif _is_norm(module):
            handles.append(
                module.register_forward_hook(
                    lambda _, args, out, name=name: made.__setitem__(name, out)
                )
            )
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    readers = {
        name: [reader for reader, tensor in read.items() if _same(tensor, out)]
        for name, out in made.items()
    }
    return output, {name: found for name, found in readers.items() if found}


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module ends in a product with one weight per channel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def _same(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.numel() == second.numel()


def _pairs(
    block: nn.Module, without: Collection[str], read: Collection[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield Linears with the siblings that have as many outputs as they have inputs.

    :param read: Linears that are left out
    """
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        parent = name.rpartition(".")[0]
        if name in read or parent in without:
            continue
        siblings = [
            other
            for other, source in linears.items()
            if other != name
            and other.rpartition(".")[0] == parent
            and source.out_features == linear.in_features
        ]
        yield name, siblings


def _cancels_out(
    block: nn.Module, run: Callable[[], Tensor], output: Tensor, place: Place
) -> bool:
    """Return whether scaling at a place leaves the block's output as it was."""
    width = cast(nn.Linear, block.get_submodule(place.readers[0])).in_features
    generator = torch.Generator().manual_seed(_SEED)
    powers = torch.randint(-1, 2, (width,), generator=generator)
    scales = powers.float().exp2().to(output.device)
    with _scaled(block, place.readers, scales):
        effect = (run() - output).norm()
        with _divided(block, place.source, scales):
            rest = (run() - output).norm()
    # without an effect, the sample says nothing
    return bool(effect > 0 and rest <= _TOLERANCE * effect)


@contextmanager
def _scaled(block: nn.Module, readers: Sequence[str], scales: Tensor) -> Iterator[None]:
    weights = [cast(Tensor, block.get_submodule(r).weight) for r in readers]
    for weight in weights:
        weight.mul_(scales)
    yield
    for weight in weights:
        weight.div_(scales)


@contextmanager
def _divided(block: nn.Module, source: str, scales: Tensor) -> Iterator[None]:
    parameters = outputs_of(block.get_submodule(source)).values()
    for parameter in parameters:
        parameter.div_(by_output(scales, parameter))
    yield
    for parameter in parameters:
        parameter.mul_(by_output(scales, parameter))


def outputs_of(source: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a norm or Linear that its outputs are products of.

    A quantizer later in the recipe may have added others already.
    """
    found = {name: getattr(source, name, None) for name in ("weight", "bias")}
    return {name: value for name, value in found.items() if value is not None}


def by_output(scales: Tensor, parameter: Tensor) -> Tensor:
    """Shape scales of output channels so that they broadcast to a weight or bias."""
    return scales.view(-1, *[1] * (parameter.ndim - 1))
