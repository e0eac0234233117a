"""What this package relies on upstream: a failure here names the seam that moved."""

from importlib.metadata import version

import torch
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier, wanda_sparsify
from llmcompressor.recipe import Recipe
from transformers import AttentionInterface

import llmc_attnmask
from llmc_attnmask.attention import capture


def test_versions_are_those_the_project_was_measured_with():
    assert version("llmcompressor").startswith("0.14.")
    assert version("transformers").startswith("5.17.")


def test_importing_the_package_registers_its_modifiers_with_llm_compressor():
    for name in llmc_attnmask.__all__:
        if name.endswith("Modifier"):
            registered = ModifierFactory._registered_registry[name]
            assert registered is getattr(llmc_attnmask, name)


def test_the_python_surface_is_what_the_design_names():
    for name in llmc_attnmask.__all__:
        assert callable(getattr(llmc_attnmask, name))


def test_llm_compressor_still_drops_recipes_of_another_shape():
    """The reason for `recipe.py`; if this fails upstream says so itself."""
    content = {"modifiers": {"WandaPruningModifier": {"sparsity": 0.5}}}
    assert Recipe.from_dict(content).modifiers == []


def test_n_of_m_still_means_that_n_are_pruned():
    modifier = WandaPruningModifier(sparsity=0.25, mask_structure="1:4")
    linear = torch.nn.Linear(8, 2)
    pruned = wanda_sparsify.sparsify_weight(
        linear, {linear: torch.ones(8)}, 0.25, modifier._prune_n, modifier._prune_m
    )
    assert int((pruned == 0).sum()) == 4


def test_the_attention_interface_can_be_extended():
    assert AttentionInterface()[capture._INTERFACE] is capture._capture
