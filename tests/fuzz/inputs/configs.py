"""Contents of config.json: how weights are stored, and tiny models."""

from typing import Any

from hypothesis import strategies as st

from tests.fuzz.inputs.json_texts import ODD_NUMBERS, json_text, values
from tests.fuzz.inputs.tensors import MODULES, STORAGES, Q

_targets = values | st.lists(
    st.sampled_from([*MODULES, "Linear", "re:.*", "re:(", "re:(.*)*x"]), max_size=2
)

_sparsity = values | st.fixed_dictionaries(
    {"format": st.sampled_from(["dense", *STORAGES]) | values},
    optional={
        "targets": _targets,
        "ignore": _targets,
        "sparsity_structure": st.just("2:4") | values,
    },
)

_note = values | st.fixed_dictionaries(
    {
        "version": st.just(1) | values,
        "sparsity": values
        | st.fixed_dictionaries({"structure": st.just("2:4"), "targets": _targets}),
    },
    optional={
        "unstructured": values | st.fixed_dictionaries({"targets": _targets}),
    },
)

quantizations = values | st.fixed_dictionaries(
    {},
    optional={
        "quant_method": st.sampled_from(["compressed-tensors", "fp8"]) | values,
        "sparsity_config": _sparsity,
        "config_groups": values,
        "llmc_attnmask": _note,
    },
)

PACKED = {
    storage: {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "sparsity_config": {"format": storage, "targets": [Q]},
        }
    }
    for storage in STORAGES
}

configs = st.one_of(
    values,
    st.fixed_dictionaries(
        {"model_type": st.just("llama") | values},
        optional={"quantization_config": quantizations, "llmc_attnmask": _note},
    ),
    st.just({}),
    st.sampled_from(list(PACKED.values())),
)

LLAMA = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}

_CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


@st.composite
def models(draw: st.DrawFn) -> str:
    """Draw the config of a tiny Llama with up to two odd fields."""
    kind = draw(st.sampled_from(["llama", "llama", "llama", "gpt2", "nonsense", None]))
    config: dict[str, Any] = {"model_type": kind, **LLAMA}
    odd = st.sampled_from([*ODD_NUMBERS, 10**7, 10**9, [], {}, "x"]) | values
    fields = [*LLAMA, "rope_parameters", "architectures", "dtype", "torch_dtype"]
    fields += ["tie_word_embeddings", "model_type", "max_position_embeddings"]
    fields += ["hidden_act", "pad_token_id", "transformers_version", "auto_map"]
    fields += ["attention_bias", "_name_or_path", "attn_implementation", "layer_types"]
    for field in draw(st.lists(st.sampled_from(fields), max_size=2)):
        config[field] = draw(odd)
    if not draw(st.integers(0, 4)):
        config["quantization_config"] = draw(quantizations)
    if not draw(st.integers(0, 9)):
        config["auto_map"] = _CODE
    return draw(json_text(st.just(config)))
