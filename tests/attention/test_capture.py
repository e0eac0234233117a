import copy

import pytest
import torch
import transformers

from llmc_attnmask.attention.capture import (
    AttentionReplica,
    UnsupportedAttentionError,
    uses_attention_interface,
)
from llmc_attnmask.attention.projections import attention_modules
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.evaluation.attention_error import attention_inputs
from tests.support.attention import probabilities


def test_other_weights_take_effect_and_the_module_stays_unchanged(random_llama):
    before = copy.deepcopy(random_llama.state_dict())
    (name, collected), *_ = attention_inputs(
        random_llama, torch.arange(9).view(1, 9)
    ).items()
    module = random_llama.get_submodule(name)
    fired = []
    module.q_proj.register_forward_hook(lambda *_: fired.append(1))
    replica = AttentionReplica(module)
    args, kwargs = collected.batch([0], replica.device, replica.dtype)
    weight = module.q_proj.weight.detach() * 0
    call = replica(args, kwargs, {"q_proj.weight": weight})
    assert not call.query.any() and call.key.any()
    assert replica(args, kwargs).query.any()
    assert not fired
    for key, value in random_llama.state_dict().items():
        assert torch.equal(value, before[key])
    assert random_llama.config._attn_implementation == "eager"


def test_a_half_precision_module_is_replayed_in_float32(random_llama):
    tokens = torch.arange(9).view(1, 9)
    model = random_llama.bfloat16()
    (name, collected), *_ = attention_inputs(model, tokens).items()
    replica = AttentionReplica(model.get_submodule(name))
    call = replica(*collected.batch([0], replica.device, replica.dtype))
    assert call.query.dtype == call.value.dtype == torch.float32
    assert call.mask.dtype == torch.bfloat16  # [L, L]: never copied as a whole


def test_an_offloaded_module_is_replayed(random_llama):
    from compressed_tensors.offload import offload_module

    tokens = torch.arange(9).view(1, 9)
    (name, collected), *_ = attention_inputs(random_llama, tokens).items()
    module = random_llama.get_submodule(name)
    args, kwargs = collected.batch([0], torch.device("cpu"), torch.float32)
    expected = AttentionReplica(module)(args, kwargs)
    for child in module.modules():
        offload_module(child, "cpu", "cpu")
    found = AttentionReplica(module)(args, kwargs)
    assert torch.equal(found.query, expected.query)


def test_a_module_that_computes_its_own_softmax_is_refused():
    config = transformers.GPTJConfig(n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    model = transformers.GPTJForCausalLM(config)
    attention = next(iter(attention_modules(model).values()))
    assert not uses_attention_interface(attention)
    replica = AttentionReplica(attention)
    kwargs = {"position_ids": torch.arange(3).view(1, 3)}
    with pytest.raises(UnsupportedAttentionError, match="computes its softmax itself"):
        replica([torch.zeros(1, 3, 16)], kwargs)


def test_a_relative_position_bias_is_part_of_the_logits():
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    model = transformers.T5EncoderModel(config).eval()
    model.set_attn_implementation("eager")
    tokens = torch.arange(9).view(1, 9)
    expected = model(tokens, output_attentions=True).attentions[0]
    (name, _), *_ = attention_modules(model).items()
    attention = model.get_submodule(name)
    inputs = ModuleInputs()
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(args, kwargs), with_kwargs=True
    )
    model(tokens)
    replica = AttentionReplica(attention)
    call = replica(*inputs.batch([0], replica.device, replica.dtype))
    assert (probabilities(call) - expected).abs().max() <= 1e-6


def test_a_module_without_config_is_refused():
    with pytest.raises(UnsupportedAttentionError, match="no transformers config"):
        AttentionReplica(torch.nn.Linear(2, 2))


def test_a_causal_module_without_a_mask_is_refused(random_llama):
    attention = random_llama.model.layers[0].self_attn
    hidden = torch.randn(1, 5, 32)
    angles = random_llama.model.rotary_emb(hidden, torch.arange(5)[None])
    replica = AttentionReplica(attention)
    arguments = {"position_embeddings": angles, "attention_mask": None}
    with pytest.raises(UnsupportedAttentionError, match="no mask that hides future"):
        replica([hidden], arguments)
    assert replica([hidden], arguments | {"is_causal": False}).mask is None
