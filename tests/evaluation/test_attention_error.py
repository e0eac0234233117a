import torch

from llmc_attnmask.evaluation.attention_error import attention_errors
from llmc_attnmask.evaluation.perplexity import load_model
from llmc_attnmask.oneshot.shipped import MODEL_DIR


@torch.no_grad()
def test_only_layers_with_changed_weights_have_an_attention_error(
    evaluation,
):
    dense, other = load_model(MODEL_DIR), load_model(MODEL_DIR)
    windows = evaluation[:2]
    assert set(attention_errors(dense, other, windows).values()) == {0.0}
    other.model.layers[1].self_attn.q_proj.weight.mul_(0.5)
    errors = list(attention_errors(dense, other, windows).values())
    assert errors[1] > 0.001
    assert errors[0] == errors[2] == errors[3] == 0.0  # both models get the same inputs
