from pathlib import Path

from llmc_attnmask.calibration.scratch import scratch


def test_large_files_go_where_tmpdir_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert scratch() == tmp_path


def test_without_tmpdir_large_files_go_to_a_disk(monkeypatch):
    monkeypatch.delenv("TMPDIR", raising=False)
    assert scratch() == Path("/var/tmp")


def test_a_folder_that_does_not_exist_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    assert scratch() == Path("/var/tmp")
