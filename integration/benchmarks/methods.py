"""The methods that the benchmarks compare, and how one of them is run.

A method is a name of ``METHODS``, or that of a recipe that the package ships, or such a
name with a budget that it is planned for ("block_2of4, dense_share 0.25"), or with
another allocation of ``allocations.py`` ("block_2of4, ends 0.25").
Every run has its own process, so that its peak memory is its own.
"""

import hashlib
import json
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationMixin
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from integration.benchmarks.allocations import ALLOCATIONS
from integration.benchmarks.real_data import windows_digest
from llmc_attnmask import (
    ActivationSmoothingModifier,
    ALPSPruningModifier,
    AttentionMatrixPruningModifier,
    MaskedRecoveryModifier,
)
from llmc_attnmask.checkpoint.io.atomic import PROGRESS
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.methods import (
    Method,
    Scope,
    prune_by_magnitude,
    q_and_k_names,
)
from llmc_attnmask.oneshot.pilot import pilot_key, pilot_sparsity, run_pilot
from llmc_attnmask.oneshot.plan import entries_of, plan_on, split
from llmc_attnmask.oneshot.planned_recipe import PlannedRecipe, plan_of
from llmc_attnmask.oneshot.prune import save
from llmc_attnmask.oneshot.recipe import find_recipe, load_recipe
from llmc_attnmask.oneshot.trade_off import Budget, TradeOff
from llmc_attnmask.runlog.context import described
from llmc_attnmask.runlog.progress import Progress

REST = ["re:.*(v|o|gate|up|down)_proj$"]

METHODS = {  # name -> whether it has randomness
    "dense": False,
    "magnitude": False,
    "Wanda": False,
    "SparseGPT": False,
    "ALPS": False,
    "SparseGPT + recovery": True,
    "ALPS + recovery": True,
    "ours light": True,
    "ours light, output_weight 0": True,
    "ours accuracy": True,
    "ours + recovery": True,
    "W8A8": False,
    "FP8": False,
    "W4A16": False,
}
QUANTIZED = {  # method -> the recipe whose quantization it is, without the pruning
    "W8A8": "block_2of4_w8a8_int8",
    "FP8": "block_2of4_fp8",
    "W4A16": "block_2of4_w4a16_gptq",
}


@dataclass(frozen=True)
class Case:
    """What is done to which model."""

    model: str
    method: str  # a recipe brings its own scope and structure
    scope: str  # "q/k" or "block"
    structure: str
    sparsity: float
    seed: int
    calibration: Tensor  # int64 [windows, length]
    # where models before quantization, and costs of plans, stay for other rows
    kept: Path | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Pruned:
    """A model after its method has run, and what that took."""

    model: PreTrainedModel  # float32, eager attention, on the GPU if there is one
    seconds: float
    peak_gb: float  # resident memory of the process until pruning ended
    plan: dict[str, Any] | None = None  # what a planned recipe says about itself


def shape(label: str) -> tuple[str, float]:
    """Return mask structure and sparsity of a label such as "2:4" or "50 %".

    Those of "unstructured", where a budget says how much is pruned, are 0:0 and 0.
    """
    if label == "unstructured":
        return "0:0", 0.0
    if label.endswith("%"):
        return "0:0", float(label.removesuffix("%")) / 100
    pruned, _, group = label.partition(":")
    return label, int(pruned) / int(group)


def modifiers(case: Case, model: PreTrainedModel) -> list[Any]:
    """Return the recipe of a method; none for dense and magnitude.

    :param model: of the same architecture as the case's; its weights are not read
    """
    if case.method not in METHODS:
        return _seeded(recipe_of(case.method)[0], case.seed)
    if case.method in QUANTIZED:
        return split_recipe(_seeded(QUANTIZED[case.method], case.seed))[1]
    fields: dict[str, Any] = {
        "sparsity": case.sparsity,
        "mask_structure": case.structure,
    }
    whole = case.scope == "block"
    linears = ["re:.*_proj$"] if whole else q_and_k_names(model)
    masks_only = {**fields, "update_weights": False}
    light = AttentionMatrixPruningModifier(**masks_only, seed=case.seed)
    paper = AttentionMatrixPruningModifier(
        **masks_only, output_weight=0, seed=case.seed
    )
    accuracy = AttentionMatrixPruningModifier(**fields, seed=case.seed)
    recovery = MaskedRecoveryModifier(seed=case.seed)
    rest = [ALPSPruningModifier(**fields, targets=REST)] if whole else []
    stock = [SparseGPTModifier(**fields, targets=REST)] if whole else []
    recipes: dict[str, list[Any]] = {
        "dense": [],
        "magnitude": [],
        "Wanda": [WandaPruningModifier(**fields, targets=linears)],
        "SparseGPT": [SparseGPTModifier(**fields, targets=linears)],
        "ALPS": [ALPSPruningModifier(**fields, targets=linears)],
        "SparseGPT + recovery": [
            SparseGPTModifier(**fields, targets=linears),
            recovery,
        ],
        "ALPS + recovery": [
            ALPSPruningModifier(**fields, targets=linears),
            recovery,
        ],
        "ours light": [light, *stock],
        "ours light, output_weight 0": [paper, *stock],
        "ours accuracy": [accuracy, *rest],
        "ours + recovery": [accuracy, *rest, recovery],
    }
    return recipes[case.method]


def _seeded(recipe: str | Path, seed: int) -> list[Any]:
    found: list[Any] = load_recipe(recipe).modifiers
    for modifier in found:
        if hasattr(modifier, "seed"):
            modifier.seed = seed
    return found


def recipe_of(method: str) -> tuple[str, str, float]:
    """Split the name of a method: recipe, kind of budget or "", and its value."""
    recipe, _, budget = method.partition(", ")
    kind, _, value = budget.partition(" ")
    return recipe, kind, float(value or 0)


def planned(case: Case, output: Path) -> tuple[dict[str, Any], float]:
    """Write a planned recipe.

    :return: what it says about the plan, and the seconds that it took; if the costs are
        those that an earlier row has measured, what they took then
    """
    recipe, kind, value = recipe_of(case.method)
    template = PlannedRecipe(find_recipe(recipe))
    model = load(case.model)
    start = time.perf_counter()
    if kind in ALLOCATIONS:
        linearize_moe(model)  # as a plan does
        groups = template.groups(model)
        sparsities = ALLOCATIONS[kind](model, groups, value, case.calibration)
        template.write(output, model, groups, sparsities, {})
        trade_off = TradeOff(entries_of(model, groups), template.structure)
        plan = {"size": trade_off.size(sparsities)}
        return plan, time.perf_counter() - start
    costs = None
    if case.kept:
        groups = template.groups(model)
        identity = [windows_digest(case.calibration), str(template.structure), groups]
        folder = case.kept / f"costs-{_digest(case, identity)}"
        costs = Progress(folder / PROGRESS, {}, [])
    budget = Budget(kind, value)  # type: ignore[arg-type]
    level = pilot_sparsity(template.structure, budget)
    key, pilot, spent = pilot_key(template, level), None, {}
    if costs is None or costs.read_data(key) is None:
        tokenizer = AutoTokenizer.from_pretrained(case.model)
        others, _ = split(case.calibration)
        copy = load(case.model, dtype="auto")
        pilot = run_pilot(copy, tokenizer, template, others, level, case.seed)
        spent[key] = time.perf_counter() - start
    start = time.perf_counter()
    plan_on(model, template, output, case.calibration, budget, pilot, progress=costs)
    spent["costs"] = time.perf_counter() - start
    if costs is not None:
        known = costs.read_data("seconds") or {}
        # the first row has measured everything, and others have read some of it
        spent = {name: known.get(name, spent.get(name, 0.0)) for name in (key, "costs")}
        costs.save_data("seconds", known | spent)
        costs.close()
    return plan_of(output) or {}, sum(spent.values())


def pruned(case: Case) -> Pruned:
    """Run a method in this process."""
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype="auto")
    recipe, plan, planning = modifiers(case, model), None, 0.0
    if case.method not in METHODS and recipe_of(case.method)[1]:
        with tempfile.TemporaryDirectory() as folder:
            plan, planning = planned(case, output := Path(folder) / "plan.yaml")
            recipe = _seeded(output, case.seed)
            if case.kept:
                name = re.sub(r"[^\w.]+", "_", case.method)
                shutil.copy(output, case.kept / f"plan-{name}.yaml")
    start = time.perf_counter()
    if case.method == "magnitude":
        scope: Scope = "whole block" if case.scope == "block" else "q and k"
        method = Method("magnitude", scope, case.structure, case.sparsity)
        prune_by_magnitude(model, method)
    elif case.kept and split_recipe(recipe)[0]:
        return _kept(case, model, recipe, plan, planning)
    elif recipe:
        compress(model, tokenizer, recipe, case.calibration)
    seconds = planning + time.perf_counter() - start
    return _found(model, seconds, _peak_gb(), plan)


def _found(
    model: PreTrainedModel, seconds: float, peak: float, plan: dict[str, Any] | None
) -> Pruned:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.float().eval().to(torch.device(device))
    model.set_attn_implementation("eager")
    return Pruned(model, seconds, peak, plan)


def _kept(
    case: Case,
    model: PreTrainedModel,
    recipe: list[Any],
    plan: dict[str, Any] | None,
    seconds: float,
) -> Pruned:
    """Prune, or take what an earlier row has pruned in the same way; then quantize.

    :param model: the dense one
    :param seconds: that the plan took; those of the earlier row are added
    """
    assert case.kept
    pruning, quantization = split_recipe(recipe)
    identity = [windows_digest(case.calibration), described(pruning)]
    folder = case.kept / _digest(case, identity)
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    cost = folder / "cost.json"
    if not cost.exists():
        start = time.perf_counter()
        compress(model, tokenizer, pruning, case.calibration)
        spent = {"seconds": time.perf_counter() - start, "peak_gb": _peak_gb()}
        save(model, tokenizer, folder)
        cost.write_text(json.dumps(spent))
    spent = json.loads(cost.read_text())
    model = load(folder, dtype="auto")
    start = time.perf_counter()
    if quantization:
        compress(model, tokenizer, quantization, case.calibration)
    seconds += spent["seconds"] + time.perf_counter() - start
    return _found(model, seconds, max(spent["peak_gb"], _peak_gb()), plan)


def split_recipe(recipe: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return what prunes, and what quantizes afterwards, with what prepares it."""
    kinds = (ActivationSmoothingModifier, QuantizationMixin)
    first = [i for i, m in enumerate(recipe) if isinstance(m, kinds)]
    where = first[0] if first else len(recipe)
    return recipe[:where], recipe[where:]


def _digest(case: Case, identity: Any) -> str:
    content = json.dumps([case.model, identity], sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


AnyCase = TypeVar("AnyCase", bound=Case)
Found = TypeVar("Found")


def in_own_process(function: Callable[[AnyCase], Found], case: AnyCase) -> Found:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, case).result()
