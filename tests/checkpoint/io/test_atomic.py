"""Folders are complete or absent; their earlier contents stay or go as a whole."""

from pathlib import Path

import pytest

from llmc_attnmask.checkpoint.io.atomic import PROGRESS, new_folder, updated_folder

WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (WEIGHTS, "config.json", "notes.txt"):
        (folder / name).write_text("old")
    return folder


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("new")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_are_replaced_and_weights_of_other_shards_are_removed(checkpoint):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    with updated_folder(checkpoint) as partial:
        write(partial, *shards, "config.json")
    assert contents(checkpoint) == {
        **dict.fromkeys([*shards, "config.json"], "new"),
        "notes.txt": "old",
    }


def test_weights_of_a_variant_leave_the_others_alone(checkpoint):
    with updated_folder(checkpoint) as partial:
        write(partial, "model.fp16.safetensors", "config.json")
    assert contents(checkpoint)[WEIGHTS] == "old"


def test_new_weights_never_lie_beside_the_old_config(checkpoint, monkeypatch):
    seen: list[dict[str, str]] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append(contents_of_files(checkpoint))
        return replace(self, target)

    def contents_of_files(folder: Path) -> dict[str, str]:
        return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}

    monkeypatch.setattr(Path, "replace", watched)
    with updated_folder(checkpoint) as partial:
        write(partial, WEIGHTS, "config.json", "a.json")
    assert len(seen) == 3
    assert all("config.json" not in files for files in seen)


def test_a_subfolder_is_replaced_by_the_new_one(checkpoint):
    (checkpoint / "templates").mkdir()
    write(checkpoint / "templates", "gone")
    with updated_folder(checkpoint) as partial:
        (partial / "templates").mkdir()
        write(partial / "templates", "here")
    assert list(contents(checkpoint / "templates")) == ["here"]


def test_a_failure_leaves_the_folder_as_it_was(checkpoint):
    before = contents(checkpoint)
    with pytest.raises(KeyError), updated_folder(checkpoint) as partial:
        write(partial, WEIGHTS)
        raise KeyError
    assert contents(checkpoint) == before


def test_progress_is_removed_when_the_folder_is_complete(tmp_path):
    output = tmp_path / "out"
    (output / PROGRESS).mkdir(parents=True)
    write(output / PROGRESS, "step")
    with pytest.raises(KeyError), new_folder(output):
        raise KeyError
    assert (output / PROGRESS / "step").exists()
    with new_folder(output) as partial:
        write(partial, WEIGHTS, "config.json")
    assert sorted(contents(output)) == ["config.json", WEIGHTS]
