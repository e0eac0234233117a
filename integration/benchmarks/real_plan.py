"""Which rows ``real.py`` measures, in which order, and how long they will take."""

from dataclasses import dataclass
from typing import Any

from integration.benchmarks.methods import METHODS, QUANTIZED, recipe_of, split_recipe
from llmc_attnmask.oneshot.recipe import load_recipe
from llmc_attnmask.oneshot.shipped import recipes
from llmc_attnmask.runlog.wording import duration

Row = dict[str, Any]
SPARSITIES = ("50 %", "60 %", "70 %", "40 %")
DENSE_SHARES = (0.25, 0.125, 0.5)
LOSS = 0.05
UNIFORM = (0.25, 0.3)


@dataclass(frozen=True)
class Plan:
    """A row to measure; a recipe's structure is written in the recipe."""

    method: str
    scope: str  # "q/k" or "block"
    structure: str  # "2:4", "50 %" or "unstructured"

    @property
    def name(self) -> str:
        return f"{self.scope} {self.structure} {self.method}"


def plans() -> list[Plan]:
    """Return every row, the most important and cheapest first."""
    shipped = [_planned(name) for name in recipes() if name.startswith("block_")]
    floats = [plan for plan in shipped if not quantizes(plan.method)]
    return [
        Plan("SparseGPT", "block", "2:4"),
        *sorted(floats, key=lambda plan: plan.method),  # the default one is first
        *(
            Plan(f"block_2of4, {kind} {share:g}", "block", "2:4")
            for share in DENSE_SHARES
            for kind in ("dense_share", "ends")
            if kind == "dense_share" or share == DENSE_SHARES[0]
        ),
        Plan(f"block_2of4_quick, dense_share {DENSE_SHARES[0]:g}", "block", "2:4"),
        Plan(f"block_2of4, loss {LOSS}", "block", "2:4"),
        Plan(f"block_unstructured_60, loss {LOSS}", "block", "unstructured"),
        # without a plan, what is expected to lose about as much
        *(
            Plan(f"block_unstructured_60, uniform {share:g}", "block", _percent(share))
            for share in UNIFORM
        ),
        *(
            Plan(method, "q/k", "2:4")
            for method in (
                *("magnitude", "Wanda", "SparseGPT"),
                *("ours accuracy", "ours light"),
            )
        ),
        *(Plan(method, "block", "2:4") for method in ("magnitude", "Wanda", "ALPS")),
        *(plan for plan in shipped if plan not in floats),
        *(
            Plan(method, scope, sparsity)
            for sparsity in SPARSITIES
            for scope, method in (
                *(("q/k", m) for m in ("Wanda", "SparseGPT", "ours accuracy")),
                *(("block", m) for m in ("Wanda", "SparseGPT")),
                # at 60 %, this is the shipped recipe
                *[("block", f"block_unstructured_60, uniform {_share(sparsity):g}")][
                    : sparsity != "60 %"
                ],
                ("block", f"block_unstructured_60, sparsity {_share(sparsity):g}"),
            )
        ),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _share(sparsity: str) -> float:
    return float(sparsity.removesuffix("%")) / 100


def _planned(recipe: str) -> Plan:
    pruning: Any = next(
        m for m in load_recipe(recipe).modifiers if hasattr(m, "mask_structure")
    )
    structure = pruning.mask_structure
    if structure == "0:0":
        structure = _percent(pruning.sparsity)
    return Plan(recipe, "block", structure)


def quantizes(method: str) -> bool:
    if method in METHODS:
        return method in QUANTIZED
    recipe, *_ = recipe_of(method)
    return bool(split_recipe(load_recipe(recipe).modifiers)[1])


def expected(plans: list[Plan], rows: list[Row]) -> float | None:
    """Return the seconds that rows will take, from those of earlier ones.

    The closest earlier rows count: of the same method, else of the same scope.

    :return: None if there is no earlier row but the dense one's
    """
    rows = [row for row in rows if row["method"] != "dense"]
    if not rows:
        return None

    def seconds(plan: Plan) -> float:
        same_scope = [row for row in rows if row["scope"] == plan.scope]
        same = [row for row in same_scope if row["method"] == plan.method]
        found = [row["total_seconds"] for row in same or same_scope or rows]
        return sum(found) / len(found)

    return sum(map(seconds, plans))


def left(plans: list[Plan], rows: list[Row]) -> str:
    """Write how many rows are left and how long they will take."""
    if not plans:
        return "all rows are measured"
    count = "1 row is" if len(plans) == 1 else f"{len(plans)} rows are"
    if (seconds := expected(plans, rows)) is None:
        return f"{count} left; how long they take is known after the first ones"
    return f"{count} left, about {duration(seconds)}"
