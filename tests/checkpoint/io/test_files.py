import json
import resource

import pytest
import torch

from llmc_attnmask.checkpoint.convert import to_packed
from llmc_attnmask.checkpoint.inspect import inspect
from llmc_attnmask.checkpoint.io.files import TensorSpec, open_checkpoint
from llmc_attnmask.checkpoint.io.writer import ShardWriter
from tests.support.checkpoints import decoder, read, write

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    return write(tmp_path / "dense", decoder(), shards=2)


def reindex(folder, changes):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder, error, message):
    """Check that every reader raises the same error and writes nothing."""
    for reader in (inspect, lambda f: to_packed(f, f.parent / "out")):
        with pytest.raises(error, match=message):
            reader(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x"]
)
def test_an_index_that_points_outside_the_folder_is_refused(sharded, name):
    (sharded.parent / "dense" / "inside.safetensors").touch()
    reindex(sharded, {"lm_head.weight": name})
    refused(sharded, ValueError, "outside the checkpoint's folder")


def test_an_index_that_names_a_missing_file_is_refused(sharded):
    reindex(sharded, {"lm_head.weight": "model-00003.safetensors"})
    refused(sharded, FileNotFoundError, r"names the file model-00003.* is missing")


def test_an_index_that_contradicts_the_files_is_refused(sharded):
    reindex(sharded, {"new.weight": "model-00001-of-00002.safetensors"})
    refused(sharded, ValueError, r"new\.weight is in model-00001.* does not have it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a mapping but list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {}, "metadata": 1}', "has metadata that is not a mapping"),
    ],
)
def test_a_broken_index_is_refused(sharded, content, message):
    (sharded / INDEX).write_text(content)
    refused(sharded, ValueError, message)


@pytest.mark.parametrize("size", [0, 5, 100, 3000, -1])
def test_a_truncated_file_is_refused(sharded, size):
    file = sharded / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(sharded, ValueError, r"model-00002.* is not a readable safetensors file")


def test_a_file_with_a_broken_header_is_refused(sharded):
    file = sharded / "model-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[12:16] = b"\xff\xff\xff\xff"
    file.write_bytes(content)
    refused(sharded, ValueError, r"model-00001.* is not a readable safetensors file")


def test_a_tensor_that_is_stored_twice_is_refused(tmp_path):
    folder = write(tmp_path / "dense", decoder())
    (folder / "copy.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()
    )
    refused(folder, ValueError, "is stored twice .* remove the stale one")


def test_a_folder_without_config_cannot_be_packed(tmp_path):
    folder = write(tmp_path / "dense", decoder())
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        to_packed(folder, tmp_path / "out")


def test_safetensors_reads_the_written_file(tmp_path):
    values = {
        "b": torch.arange(6, dtype=torch.int64).view(2, 3),
        "a": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "empty": torch.empty(0, 4),
    }
    specs = [
        TensorSpec(name, dtype, tuple(values[name].shape), values[name].nbytes)
        for name, dtype in (("a", "U8"), ("empty", "F32"), ("b", "I64"))
    ]
    file = tmp_path / "model.safetensors"
    with ShardWriter(file, specs, {"format": "pt"}) as writer:
        writer.write("a", 1, values["a"][1:])  # in any order, in parts
        writer.write("b", 0, values["b"])
        writer.write("a", 0, values["a"][:1])
        writer.write("empty", 0, values["empty"])
    assert {k: v.tolist() for k, v in read(tmp_path).items()} == {
        k: v.tolist() for k, v in values.items()
    }
    stored = open_checkpoint(tmp_path)
    assert stored.metadata["model.safetensors"] == {"format": "pt"}
    assert torch.equal(stored.tensors["b"].load(), values["b"])


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    """A limit on file sizes stands in for a full disk: writes fail the same way."""
    folder = write(tmp_path / "dense", decoder())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*model\.safetensors"):
            to_packed(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
