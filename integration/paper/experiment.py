"""The paper's synthetic experiment: `python integration/paper/experiment.py OUT`.

For several n and d, light- and heavy-tailed inputs and sparsities from 0.3 to 0.9, it
measures the relative attention error ||A(W') - A(W)||_F^2 / ||A(W)||_F^2 of magnitude,
Wanda, SparseGPT (llm-compressor's own functions) and the paper's method, all
unstructured on the same fused weight. For each case, the paper's lambda is the one of
``L2_PENALTIES`` with the lowest error on the same inputs, which every method sees.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llmc_attnmask.paper.algorithm import Descent, projected_gradient_descent, threshold
from llmc_attnmask.paper.problem import FusedProblem, causal_attention

SIZES = ((64, 32), (128, 64), (256, 64))  # n tokens, d features
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TAILS = ("light", "heavy")  # normal; Student's t with 3 degrees of freedom
L2_PENALTIES = (1e-4, 1e-3, 1e-2)
SEEDS = (0, 1, 2)
STEPS = 500
CONVERGENCE_STEPS = 4000  # the last loss of a run this long serves as L*


@dataclass(frozen=True)
class Row:
    """One measured point."""

    n: int
    d: int
    tail: str
    seed: int
    sparsity: float
    method: str
    error: float  # relative


def synthetic(n: int, d: int, tail: str, seed: int) -> tuple[Tensor, Tensor]:
    """Draw X [n, d] of unit variance, and W [d, d] for logits of deviation 2."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if tail == "heavy":
        normals = torch.randn(n, d, 3, generator=generator, dtype=torch.float64)
        inputs = inputs / normals.square().mean(-1).sqrt()
        inputs = inputs / inputs.std()
    weight = torch.randn(d, d, generator=generator, dtype=torch.float64) * (2 / d)
    return inputs, weight


def magnitude(inputs: Tensor, weight: Tensor, sparsity: float) -> Tensor:
    return weight * threshold(weight.abs(), sparsity)


def wanda(inputs: Tensor, weight: Tensor, sparsity: float) -> Tensor:
    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify as upstream

    linear = _as_linear(weight)
    scalars: dict[nn.Module, Tensor] = {linear: inputs.float().square().sum(0)}
    return upstream.sparsify_weight(linear, scalars, sparsity, 0, 0).T.to(weight.dtype)


def sparsegpt(inputs: Tensor, weight: Tensor, sparsity: float) -> Tensor:
    from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify as upstream

    linear = _as_linear(weight)
    hessians: dict[nn.Module, Tensor] = {linear: 2 * inputs.float().T @ inputs.float()}
    _, pruned = upstream.sparsify_weight(
        linear, hessians, sparsity, 0, 0, 128, 0.01, preserve_sparsity_mask=False
    )
    return pruned.T.to(weight.dtype)


BASELINES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
}


def measure(n: int, d: int, tail: str, seed: int) -> Iterator[Row]:
    """Measure all methods and sparsities on one instance."""
    inputs, weight = synthetic(n, d, tail, seed)
    norm = causal_attention(inputs, weight).square().sum()
    problems = [FusedProblem(inputs, weight, penalty) for penalty in L2_PENALTIES]
    relaxed = [projected_gradient_descent(problem, STEPS).mask for problem in problems]

    def relative(pruned: Tensor) -> float:
        return (problems[0].attention_error(pruned) / norm).item()

    for sparsity in SPARSITIES:
        for name, baseline in BASELINES.items():
            error = relative(baseline(inputs, weight, sparsity))
            yield Row(n, d, tail, seed, sparsity, name, error)
        ours = min(relative(weight * threshold(mask, sparsity)) for mask in relaxed)
        yield Row(n, d, tail, seed, sparsity, "attention matrix", ours)


def converge(n: int = 128, d: int = 64, l2_penalty: float = 1e-3) -> Descent:
    """Run for long on one light-tailed instance."""
    inputs, weight = synthetic(n, d, "light", seed=0)
    problem = FusedProblem(inputs, weight, l2_penalty)
    return projected_gradient_descent(problem, CONVERGENCE_STEPS)


def _as_linear(weight: Tensor) -> nn.Linear:
    """Make the Linear layer of X W, whose weight W^T upstream's functions prune."""
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False)
    linear.weight.data = weight.T.float().contiguous()
    return linear


def _write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _plot_errors(path: Path, rows: list[Row]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(SIZES), 6), layout="constrained")
    axes = figure.subplots(len(TAILS), len(SIZES), sharex=True, squeeze=False)
    for i, tail in enumerate(TAILS):
        for j, (n, d) in enumerate(SIZES):
            errors: dict[str, dict[float, list[float]]] = defaultdict(
                lambda: defaultdict(list)
            )
            for row in rows:
                if (row.n, row.d, row.tail) == (n, d, tail):
                    errors[row.method][row.sparsity].append(row.error)
            for method, points in errors.items():
                means = [sum(v) / len(v) for v in points.values()]
                axes[i][j].plot(list(points), means, marker="o", label=method)
            axes[i][j].set(title=f"n = {n}, d = {d}, {tail} tails", yscale="log")
    axes[0][0].legend()
    figure.supxlabel("sparsity")
    figure.supylabel("relative attention error")
    figure.savefig(path, dpi=120)


def _plot_convergence(path: Path, descent: Descent) -> None:
    from matplotlib.figure import Figure

    minimum = descent.losses[-1]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, ratio = figure.subplots(1, 2)
    loss.plot([value - minimum for value in descent.losses[:-1]])
    loss.set(xlabel="step", ylabel="L - L*", xscale="log", yscale="log")
    ratio.plot(descent.pl_ratios(minimum))
    ratio.set(
        xlabel="step",
        ylabel="||gradient||$^2$ / (2 (L - L*))",
        xscale="log",
        yscale="log",
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the CSV files and plots")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)

    cases = [(n, d, t, s) for n, d in SIZES for t in TAILS for s in SEEDS]
    rows = [row for case in tqdm(cases, desc="cases") for row in measure(*case)]
    _write_csv(output / "errors.csv", [asdict(row) for row in rows])
    _plot_errors(output / "errors.png", rows)

    descent = converge()
    minimum = descent.losses[-1]
    _write_csv(
        output / "convergence.csv",
        [
            {"step": step, "loss": loss, "squared_gradient": squared}
            for step, (loss, squared) in enumerate(
                zip(descent.losses, descent.squared_gradients, strict=True)
            )
        ],
    )
    _plot_convergence(output / "convergence.png", descent)
    ratios = descent.pl_ratios(minimum)
    print(
        f"loss {descent.losses[0]:.6f} -> {minimum:.6f} in {len(descent.losses)} "
        f"steps; PL ratio between {min(ratios):.2e} and {max(ratios):.2e}"
    )
    won: dict[float, int] = defaultdict(int)
    for case in cases:
        for sparsity in SPARSITIES:
            errors = {
                r.method: r.error
                for r in rows
                if (r.n, r.d, r.tail, r.seed, r.sparsity) == (*case, sparsity)
            }
            won[sparsity] += min(errors, key=errors.__getitem__) == "attention matrix"
    for sparsity, count in won.items():
        print(f"sparsity {sparsity}: lowest error in {count} of {len(cases)} cases")
    print(f"wrote {output}/errors.csv, errors.png, convergence.csv, convergence.png")


if __name__ == "__main__":
    main()
