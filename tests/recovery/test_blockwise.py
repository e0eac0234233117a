import pytest
import torch

from llmc_attnmask.recovery.blockwise import BlockwiseModel
from tests.support.architectures import FAMILIES, small_model

CPU = torch.device("cpu")
CAUSAL = [n for n, f in FAMILIES.items() if f.head == "AutoModelForCausalLM"]


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_a_model_run_block_by_block_gives_its_own_logits(family):
    model = small_model(family)
    tokens = torch.randint(5, 2000, (2, 32))
    expected = model(tokens, use_cache=False).logits
    blockwise = BlockwiseModel(model, tokens, CPU)
    states = blockwise.embedded
    for position in range(len(blockwise.names)):
        block = blockwise.block(position, states)
        block.autocast = False
        states = block.outputs()
    for window in range(len(tokens)):
        found = blockwise.logits(window, states[window])
        assert (found - expected[window]).abs().max() <= 1e-5
    # and the model is as it was
    assert torch.equal(model(tokens, use_cache=False).logits, expected)


def test_modules_around_the_blocks_become_float32_and_ties_stay(random_llama):
    model = random_llama.bfloat16()
    model.lm_head.weight = model.model.embed_tokens.weight
    BlockwiseModel(model, torch.randint(1, 64, (1, 8)), CPU)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no blocks"):
        BlockwiseModel(torch.nn.Linear(2, 2), torch.zeros(1, 2), CPU)
