import json

import pytest

from llmc_attnmask.text.dataset import DatasetError, load_texts


def test_a_jsonl_file_gives_the_requested_column(tmp_path):
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
def test_bytes_that_are_not_text_are_refused_naming_the_file(name, tmp_path):
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
        ('{"text": "\\ud800"}', "is not valid Unicode"),
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
