"""Even out a block's activations, so that they lose less when they are quantized.

All activations of a token share one scale, so a few channels with large ones leave the
others few steps. Channel j is divided by s_j where it is made, and what reads it is
multiplied by s_j, as in SmoothQuant (https://arxiv.org/abs/2211.10438), but with

    s_j^2 = rms(x_j) / rms(w_j)

instead of a ratio of largest values. If a token's scale grows with its norm, rounding
adds about sum_j x_tj^2 / s_j^2 * sum_j s_j^2 ||w_j||^2 to the squared error of a
Linear's outputs; this s is where its sum over the tokens is least.

Whether scaling leaves a model as it is depends on its architecture: on what else reads
a channel, and on what happens to it on the way. Names do not tell: the norm before the
MLP of one architecture comes after the attention in another. So places are found by
trying.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_SEED = 0
# Scales that are tried are powers of two, which in float32 change nothing at all where
# scaling is possible. They go far, so that a clamp or a router shows itself.
_TRIED = [2.0**power for power in range(-6, 7)]
_TOLERANCE = 1e-3  # of the change that the readers alone would make
_LEAST_ACTIVATION = 0.1  # times the median channel's root mean square


@dataclass(frozen=True)
class Place:
    """Where channels can be scaled without changing what the block computes."""

    source: str  # norm or Linear; dividing its outputs ...
    readers: tuple[str, ...]  # ... and multiplying these Linears' inputs cancel out


def smoothing_scales(squares: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return s, scaled to a geometric mean of 1, float32 [D].

    A channel that is almost silent counts as a tenth of the median channel: other text
    may use it. One that nothing reads is scaled as if it were read as little as any
    other, so that its activations do not matter either.

    :param squares: sum over tokens of x_j^2, [D]
    :param weights: of the Linears that read x, [rows, D] each
    """
    columns = [weight.detach().float().square().sum(0) for weight in weights]
    read = torch.stack(columns).sum(0)
    read = read.maximum(read.masked_fill(read == 0, torch.inf).min())
    made = squares.float().maximum(_LEAST_ACTIVATION**2 * squares.float().median())
    logarithms = (made / read).log() / 4
    known = logarithms.isfinite()
    centered = logarithms - logarithms[known].mean()
    return torch.where(known, centered.exp(), 1.0)


@torch.no_grad()
def places(
    block: nn.Module, run: Callable[[], Any], without: Collection[str] = ()
) -> list[Place]:
    """Find where a block's channels can be scaled, by scaling them.

    Tried are norms together with the Linears that read their outputs as they are, and
    pairs of Linears of one module, such as an MLP's up and down projections.

    :param block: a copy in float32, whose weights are changed for each trial
    :param run: runs the block on a sample and returns its output
    :param without: modules whose Linears are not paired with each other
    """
    found = []
    watched = _Watched(block)
    output = watched.during(run)
    for name, readers in watched.norms().items():
        place = Place(name, tuple(readers))
        if _cancels_out(block, run, output, place):
            found.append(place)
    read = {reader for place in found for reader in place.readers}
    for parent, call in watched.calls.items():
        if parent in without:
            continue
        # the module alone, because a block of many experts takes long
        again = _repeated(block.get_submodule(parent), *call)
        output = again()
        for reader, sources in _pairs(block.get_submodule(parent), parent):
            if reader in read:
                continue
            pairs = (Place(source, (reader,)) for source in sources)
            for place in pairs:
                if _cancels_out(block, again, output, place):
                    found.append(place)
                    break
    return found


class _Watched:
    """What a block's modules get and return while it runs."""

    def __init__(self, block: nn.Module):
        self.block = block
        self.calls: dict[str, tuple[Any, Any]] = {}  # of modules that have Linears
        self._read: dict[str, Any] = {}  # by Linears
        self._made: dict[str, Any] = {}  # by norms

    def during(self, run: Callable[[], Any]) -> Any:
        handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, module in self.block.named_modules()
        ]
        try:
            return run()
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(module, nn.Linear):
                self._read[name] = linear_input(args, kwargs)
            elif any(isinstance(child, nn.Linear) for child in module.children()):
                self.calls[name] = (args, kwargs)
            elif _is_norm(module):
                self._made[name] = output

        return hook

    def norms(self) -> dict[str, list[str]]:
        """Map norms to the Linears that read their outputs as they are."""
        readers = {
            name: [r for r, tensor in self._read.items() if _same(tensor, made)]
            for name, made in self._made.items()
        }
        return {name: found for name, found in readers.items() if found}


def linear_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a Linear from the arguments of its call."""
    return args[0] if args else kwargs["input"]


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module ends in a product with one weight per channel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def _same(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return first.data_ptr() == second.data_ptr() and first.numel() == second.numel()


def _repeated(module: nn.Module, args: Any, kwargs: Any) -> Callable[[], Any]:
    return lambda: module(*args, **kwargs)


def _pairs(module: nn.Module, name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield Linears with the siblings that have as many outputs as they have inputs.

    The last sibling comes first: an MLP's up projection is after its gate.
    """
    prefix = f"{name}." if name else ""
    linears = {
        prefix + child: linear
        for child, linear in module.named_children()
        if isinstance(linear, nn.Linear)
    }
    for reader, linear in linears.items():
        yield (
            reader,
            [
                source
                for source, other in reversed(linears.items())
                if source != reader and other.out_features == linear.in_features
            ],
        )


def _cancels_out(
    block: nn.Module, run: Callable[[], Any], output: Any, place: Place
) -> bool:
    """Return whether scaling at a place leaves an output as it was, for every token."""
    reader = cast(nn.Linear, block.get_submodule(place.readers[0]))
    generator = torch.Generator().manual_seed(_SEED)
    chosen = torch.randint(len(_TRIED), (reader.in_features,), generator=generator)
    scales = torch.tensor(_TRIED)[chosen].to(reader.weight.device)
    read = [cast(Tensor, block.get_submodule(r).weight) for r in place.readers]
    made = outputs_of(block.get_submodule(place.source)).values()
    with _multiplied([(weight, scales) for weight in read]):
        effects = _changes(run(), output)
        with _multiplied([(p, by_output(1 / scales, p)) for p in made]):
            rests = _changes(run(), output)
    # without an effect, the sample says nothing
    return any(bool(effect.any()) for effect in effects) and all(
        bool((rest <= _TOLERANCE * effect).all())
        for effect, rest in zip(effects, rests, strict=True)
    )


def _changes(found: Any, output: Any) -> list[Tensor]:
    """Return the norms of the differences of two outputs' tensors, token by token."""
    return [
        (after - before).norm(dim=-1)
        for after, before in zip(tree_leaves(found), tree_leaves(output), strict=True)
        if isinstance(before, Tensor) and before.is_floating_point() and before.ndim
    ]


@contextmanager
def _multiplied(factors: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Multiply parameters by powers of two within the block."""
    for parameter, factor in factors:
        parameter.mul_(factor)
    yield
    for parameter, factor in factors:
        parameter.div_(factor)


def outputs_of(source: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a norm or Linear that its outputs are products of.

    A quantizer later in the recipe may have added others already.
    """
    found = {name: getattr(source, name, None) for name in ("weight", "bias")}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def by_output(scales: Tensor, parameter: Tensor) -> Tensor:
    """Shape scales of output channels so that they broadcast to a weight or bias."""
    return scales.view(-1, *[1] * (parameter.ndim - 1))
