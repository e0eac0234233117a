import pytest
import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from llmc_attnmask.attention.capture import AttentionReplica, UnsupportedAttentionError
from llmc_attnmask.attention.projections import attention_modules, find_projections
from llmc_attnmask.evaluation.attention_error import attention_inputs
from tests.support.architectures import small_model


def test_separate_projections_are_whole_linears(random_llama):
    attention = random_llama.model.layers[0].self_attn
    found = find_projections(attention)
    rows = {role: p.rows.stop - p.rows.start for role, p in found.items()}
    assert rows == {"q": 32, "k": 16, "v": 16, "o": 32}  # GQA: fewer key-value rows
    assert found["k"].parameter == "k_proj.weight"
    assert list(attention_modules(random_llama)) == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]


@pytest.mark.parametrize(
    "family", ["phi3", "gpt2", "deepseek_v3", "gpt_neox", "gpt_bigcode"]
)
def test_rows_of_a_shared_linear_are_the_named_projection(family):
    model = small_model(family)
    inputs = attention_inputs(model, torch.randint(3, 64, (1, 9)))
    name, collected = next(iter(inputs.items()))
    replica = AttentionReplica(model.get_submodule(name))
    args, kwargs = collected.batch([0], replica.device, replica.dtype)
    dense = replica(args, kwargs)
    found = find_projections(replica.module)
    for role, changed in (("q", "query"), ("k", "key"), ("v", "value")):
        parameter = found[role].parameter
        weight = replica.module.get_parameter(parameter).detach().clone()
        before = found[role].of(weight)
        assert before.shape[-1] == found[role].columns
        found[role].put(weight, torch.zeros_like(before))
        assert not found[role].of(weight).any()
        call = replica(args, kwargs, {parameter: weight})
        for part in ("query", "key", "value"):
            same = torch.equal(getattr(call, part), getattr(dense, part))
            assert same == (part != changed)


def test_a_gate_beside_the_query_is_refused(random_llama):
    attention = random_llama.model.layers[0].self_attn
    attention.q_proj = nn.Linear(32, 64, bias=False)  # query and gate, as in Qwen3-Next
    with pytest.raises(UnsupportedAttentionError, match=r"64 rows of q.* need 32"):
        find_projections(attention)


def test_an_unknown_layout_is_refused_with_the_layers_found():
    class StrangeAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Linear(4, 8)

        def forward(self, hidden_states):
            return ALL_ATTENTION_FUNCTIONS  # noqa: F821 -- only inspected, never run

    with pytest.raises(UnsupportedAttentionError, match=r"\['both'\].*q_proj k_proj"):
        find_projections(StrangeAttention())


def test_t5_is_refused_by_its_layout():
    config = T5Config(
        vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    attention = next(iter(attention_modules(T5EncoderModel(config)).values()))
    with pytest.raises(UnsupportedAttentionError, match=r"\['k', 'o', 'q', 'v'\]"):
        find_projections(attention)
