import math

import pytest
import torch

from llmc_attnmask.evaluation.perplexity import evaluate, load_model, perplexity
from llmc_attnmask.oneshot.shipped import MODEL_DIR


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
