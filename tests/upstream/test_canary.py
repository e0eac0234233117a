"""What this package relies on upstream; a failure here names the seam that moved."""

import inspect
from importlib.metadata import version

import pytest
import torch
from llmcompressor.core import EventType
from llmcompressor.core.lifecycle import CompressionLifecycle
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.gptq import GPTQModifier, gptq_quantize
from llmcompressor.modifiers.gptq import base as gptq_base
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier, wanda_sparsify
from llmcompressor.pipelines.independent.pipeline import IndependentPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from llmcompressor.recipe import Recipe
from llmcompressor.transformers.compression.compressed_tensors_utils import (
    modify_save_pretrained,
)
from transformers import AttentionInterface

import llmc_attnmask
from llmc_attnmask.attention import capture
from llmc_attnmask.solvers import gptq


def test_versions_are_those_the_project_was_measured_with():
    assert version("llmcompressor").startswith("0.14.")
    assert version("transformers").startswith("5.17.")


def test_importing_the_package_registers_its_modifiers_with_llm_compressor():
    for name in llmc_attnmask.__all__:
        if name.endswith("Modifier"):
            registered = ModifierFactory._registered_registry[name]
            assert registered is getattr(llmc_attnmask, name)


def test_every_public_name_is_callable():
    for name in llmc_attnmask.__all__:
        assert callable(getattr(llmc_attnmask, name))


def test_llm_compressor_still_drops_recipes_of_another_shape():
    """This is why `recipe.py` checks the shape; if it fails, upstream now says so."""
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


def test_gptq_still_looks_up_its_function_where_the_package_replaces_it():
    assert gptq_base.quantize_weight is gptq_quantize.quantize_weight
    source = inspect.getsource(GPTQModifier.compress_module_list)
    assert "quantize_weight(\n" in source and "weights=weights" in source
    ours, theirs = (
        list(inspect.signature(function).parameters)
        for function in (gptq.quantize_weight, gptq_quantize.quantize_weight)
    )
    assert ours == theirs


@pytest.mark.parametrize("method", ["initialize", "update_event", "finalize"])
def test_every_modifier_still_passes_through_the_methods_that_the_guard_wraps(method):
    assert getattr(Modifier, method).guarded
    for modifier in [*ModifierFactory._main_registry.values(), GPTQModifier]:
        assert getattr(modifier, method) is getattr(Modifier, method)
    assert f"mod.{method}(" in inspect.getsource(CompressionLifecycle)


def test_the_guard_is_still_told_which_modules_an_epoch_covered():
    from llmcompressor.core import LifecycleCallbacks

    source = inspect.getsource(LifecycleCallbacks.sequential_epoch_end)
    assert "modules=modules" in source
    assert {"CALIBRATION_START", "SEQUENTIAL_EPOCH_END"} <= {e.name for e in EventType}


def test_stock_pruners_still_choose_their_linears_as_the_guard_does():
    source = inspect.getsource(SparsityModifierBase.on_calibration_start)
    assert "match_named_modules(layer, PRUNABLE_LAYER_TYPES)" in source
    assert 'f"{layer_name}.{name}"' in source
    assert {"_target_layers"} <= SparsityModifierBase.__private_attributes__.keys()
    for stock in (GPTQModifier, SparsityModifierBase):
        assert {"_module_names"} <= stock.__private_attributes__.keys()


def test_gptq_still_keeps_its_hessians_where_a_resumed_run_drops_them():
    private = GPTQModifier.__private_attributes__.keys()
    assert {"_module_names", "_hessians", "_num_samples"} <= private
    assert "self._hessians.pop(" in inspect.getsource(GPTQModifier)


def test_every_modifier_still_runs_in_its_own_pipeline():
    source = inspect.getsource(IndependentPipeline)
    assert "session.lifecycle.recipe.modifiers = [modifier]" in source
    assert "pipeline(model, dataloader, dataset_args)" in source
    assert isinstance(SequentialPipeline.__dict__["__call__"], staticmethod)


def test_saving_is_still_wrapped_only_once_and_marked_as_wrapped():
    source = inspect.getsource(modify_save_pretrained)
    assert "save_pretrained_wrapper._overridden = True" in source
    assert 'if not getattr(model.save_pretrained, "_overridden", False)' in source
