import json

import pytest
import torch

from llmc_attnmask.text import pydoc
from llmc_attnmask.text.dataset import DatasetError, load_texts
from llmc_attnmask.text.windows import calibration_windows, evaluation_windows


def test_a_jsonl_file_gives_the_column_asked_for(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"text": "a", "other": "x"}, {"text": " ", "other": "y"}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert list(load_texts(path)) == ["a"]
    assert list(load_texts(path, "other")) == ["x", "y"]


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text("one\n\ntwo\n")
    assert list(load_texts(path)) == ["one\n\ntwo\n"]


@pytest.mark.parametrize("name", ["d.txt", "d.jsonl"])
def test_bytes_that_are_no_text_are_refused_by_file(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=f"{name} is not UTF-8"):
        list(load_texts(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "a"}', r"d\.jsonl:1 has no text in column 'text' \(found: \['body'"),
        ("not json", r"d\.jsonl:1 is not JSON"),
        ('{"text": 3}', "has no text in column"),
        ("[1]", "has no text in column"),
        ('{"text": "\\ud800"}', "is no valid Unicode"),
    ],
)
def test_a_row_without_text_is_named(content, message, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(DatasetError, match=message):
        list(load_texts(path))


def test_a_missing_file_is_not_looked_up_on_the_hub():
    with pytest.raises(DatasetError, match="does not exist"):
        list(load_texts("./none.jsonl"))


def test_windows_that_overlap_are_warned_about(tokenizer):
    with pytest.warns(UserWarning, match="they overlap; give more text"):
        calibration_windows(["some words " * 20], tokenizer, 8, 16)


def test_too_little_text_is_refused_with_its_length(tokenizer):
    with pytest.raises(DatasetError, match="0 tokens, fewer than one window of 16"):
        calibration_windows([], tokenizer, 2, 16)
    with pytest.raises(DatasetError, match="fewer than one window of 64"):
        evaluation_windows(["short"], tokenizer, 64)


def test_windows_follow_the_protocol(tokenizer):
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


def test_builtin_splits_share_no_document_and_are_stable():
    calibration = pydoc.documents("calibration")
    evaluation = pydoc.documents("evaluation")
    assert len(calibration) > 200 and len(evaluation) > 20
    assert not set(calibration) & set(evaluation)
    pydoc.documents.cache_clear()
    assert pydoc.documents("evaluation") == evaluation
