"""Ways to give every group its sparsity that plans are compared with.

Each takes a model, its groups, a number and the calibration windows, and returns the
sparsity of every group.
"""

import random
import re
from collections.abc import Callable, Sequence
from itertools import permutations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.plan import entries_of, split
from llmc_attnmask.oneshot.sensitivity import Groups, Sensitivity
from llmc_attnmask.oneshot.trade_off import Sparsities, sparsities_of

Allocation = Callable[[PreTrainedModel, Groups, float, Tensor], Sparsities]

_OUTLIER, _RANGE = 5.0, 0.08  # of OWL, as in its paper
# of EvoPress: what a switch changes, and how long the search is
_STEP, _GENERATIONS, _OFFSPRING = 0.05, 24, 16


def uniform(
    model: PreTrainedModel, groups: Groups, sparsity: float, windows: Tensor
) -> Sparsities:
    """Give every group the same sparsity."""
    return dict.fromkeys(groups, sparsity)


def ends(
    model: PreTrainedModel, groups: Groups, share: float, windows: Tensor
) -> Sparsities:
    """Leave layers dense from both ends on, up to a share; the others are 2:4."""
    sizes, layer = entries_of(model, groups), _layers(groups)
    last = max(layer.values())
    room = share * sum(sizes.values())
    sparsities = dict.fromkeys(groups, 0.5)
    for group in sorted(groups, key=lambda g: min(layer[g], last - layer[g])):
        if sizes[group] <= room:
            sparsities[group] = 0.0
            room -= sizes[group]
    return sparsities


@torch.no_grad()
def owl(
    model: PreTrainedModel, groups: Groups, sparsity: float, windows: Tensor
) -> Sparsities:
    """Prune layers with more outliers less (Yin et al., arXiv 2310.05175).

    An outlier is a weight whose product with the norm of its input is above 5 times
    the layer's mean. Layers have one sparsity each, and these span 2 x 0.08; they are
    expected to be of one size, and to differ in their outliers.
    """
    layers = _layers(groups)
    linears = {name: layers[group] for group in groups for name in groups[group]}
    norms = _input_norms(model, list(linears), windows)
    products: dict[int, list[Tensor]] = {}
    for name, layer in linears.items():
        weight = model.get_parameter(f"{name}.weight").float().abs()
        products.setdefault(layer, []).append((weight * norms[name]).flatten())
    shares = {}
    for layer, found in products.items():
        all_of_it = torch.cat(found)
        outliers = all_of_it > _OUTLIER * all_of_it.mean()
        shares[layer] = outliers.float().mean().item()
    low, high = min(shares.values()), max(shares.values())
    scaled = {i: 2 * _RANGE * (s - low) / (high - low) for i, s in shares.items()}
    mean = sum(scaled.values()) / len(scaled)
    return {group: sparsity + mean - scaled[i] for group, i in layers.items()}


def evopress(
    model: PreTrainedModel, groups: Groups, sparsity: float, windows: Tensor
) -> Sparsities:
    """Search by mutation and selection (Sieberling et al., arXiv 2410.14649).

    A mutation makes one group denser and another one of the same size sparser, up to
    three times, within what a plan chooses from. The loss is what a plan measures, the
    KL divergence with all groups pruned together by SparseGPT. The best of each
    generation survives; the paper's selection in several steps, on more and more text,
    is left out.
    """
    structure = MaskStructure.parse("0:0")
    sizes = entries_of(model, groups)
    low, *_, high = sparsities_of(structure)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sensitivity = Sensitivity(model, *split(windows), groups, structure, device)
    chance = random.Random(0)

    def mutated(parent: Sparsities) -> Sparsities:
        child = dict(parent)
        for _ in range(min(chance.randint(1, 3), chance.randint(1, 3))):
            switches = [
                (denser, sparser)
                for denser, sparser in permutations(groups, 2)
                if sizes[denser] == sizes[sparser]
                and child[denser] > low
                and child[sparser] < high
            ]
            if switches:
                denser, sparser = chance.choice(switches)
                child[denser] = round(child[denser] - _STEP, 4)
                child[sparser] = round(child[sparser] + _STEP, 4)
        return child

    best: Sparsities = dict.fromkeys(groups, sparsity)
    for _ in range(_GENERATIONS):
        family = [best, *(mutated(best) for _ in range(_OFFSPRING))]
        losses = [loss.kl for loss in sensitivity.together(family)]
        best = family[losses.index(min(losses))]
    return best


ALLOCATIONS: dict[str, Allocation] = {
    f.__name__: f for f in (uniform, ends, owl, evopress)
}


def _layers(groups: Groups) -> dict[str, int]:
    return {group: int(re.findall(r"\.(\d+)\.", group)[0]) for group in groups}


def _input_norms(
    model: PreTrainedModel, names: Sequence[str], windows: Tensor
) -> dict[str, Tensor]:
    """Return the root mean square of every input of some Linears, float32 [columns]."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares = args[0].float().flatten(0, -2).square().mean(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return add

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name))
        for name in names
    ]
    for window in windows:
        model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return {name: (total / len(windows)).sqrt() for name, total in sums.items()}
