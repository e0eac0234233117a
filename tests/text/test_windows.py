import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from llmc_attnmask.evaluation.perplexity import load_model
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.text.dataset import DatasetError
from llmc_attnmask.text.windows import (
    calibration_windows,
    evaluation_windows,
    window_length,
)


def test_overlapping_windows_cause_a_warning(tokenizer):
    with pytest.warns(UserWarning, match="they overlap; give more text"):
        calibration_windows(["some words " * 20], tokenizer, 8, 16)


def test_too_little_text_is_refused_naming_its_length(tokenizer):
    with pytest.raises(DatasetError, match="0 tokens, fewer than one window of 16"):
        calibration_windows([], tokenizer, 2, 16)
    with pytest.raises(DatasetError, match="fewer than one window of 64"):
        evaluation_windows(["short"], tokenizer, 64)


def test_windows_follow_the_documented_protocol(tokenizer):
    texts = ["first document here", "a second one, longer than the first"] * 9
    stream = []
    for text in texts:
        stream += [tokenizer.bos_token_id, *tokenizer.encode(text)]
    evaluation = evaluation_windows(texts, tokenizer, 16)
    assert evaluation.flatten().tolist() == stream[: len(stream) // 16 * 16]
    calibration = calibration_windows(texts, tokenizer, 3, 16)
    assert calibration.shape == (3, 16) and calibration.dtype == torch.int64
    middle = (len(stream) - 16) // 2
    assert calibration[0].tolist() == stream[:16]
    assert calibration[1].tolist() == stream[middle : middle + 16]
    assert calibration[2].tolist() == stream[-16:]


def test_every_window_begins_with_bos_if_every_text_does(tokenizer):
    bos = tokenizer.bos_token_id
    plain = evaluation_windows(["some words " * 20], tokenizer, 8)
    assert plain[1, 0] != bos
    begins = copy.deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, bos)]
    )
    windows = evaluation_windows(["some words " * 20], begins, 8)
    assert (windows[:, 0] == bos).all()
    assert torch.equal(windows[:, 1:], plain[:, 1:])
    calibration = calibration_windows(["some words " * 20], begins, 2, 8)
    assert (calibration[:, 0] == bos).all()
    assert calibration[1, 1:].tolist() == tokenizer.encode("some words " * 20)[-7:]


def test_a_window_longer_than_the_models_number_of_positions_is_refused():
    config = load_model(MODEL_DIR).config
    assert window_length(config, None) == 1024
    with pytest.raises(ValueError, match="between 2 and 1024"):
        window_length(config, 4096)
