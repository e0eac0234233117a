import math

import pytest
import torch

from llmc_attnmask.evaluation.attention_error import attention_errors
from llmc_attnmask.evaluation.perplexity import evaluate, load_model, perplexity
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.text.windows import window_length


@torch.no_grad()
def test_perplexity_is_the_exp_of_the_mean_loss_over_windows(evaluation):
    model = load_model(MODEL_DIR)
    windows = evaluation[:5]
    losses = []
    for window in windows:
        log_probabilities = model(window[None]).logits[0, :-1].log_softmax(-1)
        losses.append(-log_probabilities.gather(1, window[1:, None]).mean())
    expected = math.exp(torch.stack(losses).mean())
    assert perplexity(model, windows) == pytest.approx(expected, rel=1e-5)


def test_evaluate_states_its_conditions(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Return the sum of a list of numbers.\n" * 200)
    (result,) = evaluate([MODEL_DIR], str(text), max_length=64)
    assert result.window_length == 64 and result.tokens == result.windows * 63
    assert result.bos == "'<|endoftext|>'" and result.dtype == "float32"
    assert 1 < result.perplexity < 1000


def test_a_window_longer_than_the_models_positions_is_refused():
    config = load_model(MODEL_DIR).config
    assert window_length(config, None) == 1024
    with pytest.raises(ValueError, match="between 2 and 1024"):
        window_length(config, 4096)


@torch.no_grad()
def test_attention_error_of_equal_weights_is_zero_and_of_others_is_each_layers_own(
    evaluation,
):
    dense, other = load_model(MODEL_DIR), load_model(MODEL_DIR)
    windows = evaluation[:2]
    assert set(attention_errors(dense, other, windows).values()) == {0.0}
    other.model.layers[1].self_attn.q_proj.weight.mul_(0.5)
    errors = list(attention_errors(dense, other, windows).values())
    assert errors[1] > 0.001
    assert errors[0] == errors[2] == errors[3] == 0.0  # the same inputs for both
