"""Folders and safetensors files that broke a reader, or could: each once."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmc_attnmask.checkpoint.convert import to_dense, to_packed
from llmc_attnmask.checkpoint.inspect import inspect
from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask
from llmc_attnmask.checkpoint.selection import CheckpointWarning
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.checkpoints import (
    Q,
    change_config,
    decoder,
    digests,
    two_of_four,
    write,
    write_header,
)

READERS = [inspect, lambda folder: to_packed(folder, folder.parent / "out")]


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_in_place_of_weights_is_refused_without_waiting(dense, reader):
    os.mkfifo(dense / "more.safetensors")
    with pytest.raises(ValueError, match=r"more\.safetensors is not a file but"):
        reader(dense)


@pytest.mark.parametrize("target", [".", "/", "nowhere", "/dev/zero"])
def test_endless_links_are_refused_and_leave_nothing_behind(dense, target):
    (dense / "link").symlink_to(target)
    with pytest.raises(ValueError, match=r"link is neither a file nor a folder"):
        to_packed(dense, dense.parent / "out")
    assert [path.name for path in dense.parent.iterdir()] == ["dense"]


def test_links_to_files_are_followed_as_in_a_hub_cache(dense, tmp_path):
    blobs = Path(shutil.move(dense, tmp_path / "blobs"))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    to_packed(snapshot, tmp_path / "packed")
    assert not [p for p in (tmp_path / "packed").iterdir() if p.is_symlink()]
    to_dense(tmp_path / "packed", tmp_path / "restored")
    assert digests(tmp_path / "restored") == digests(blobs)


@pytest.mark.parametrize("where", ["out", "sub/out"])
def test_an_output_inside_the_input_is_refused(dense, where):
    (dense / "sub").mkdir()
    for convert in (to_packed, to_dense):
        with pytest.raises(ValueError, match=r"is inside .* name a folder elsewhere"):
            convert(dense, dense / where)
    assert not list(dense.rglob("out"))


def test_a_shard_in_a_subfolder_is_written_once(tmp_path):
    tensors = decoder(layers=1)
    dense = write(tmp_path / "dense", tensors)
    (dense / "sub").mkdir()
    (dense / "model.safetensors").rename(dense / "sub" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "sub/a.safetensors")}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    to_packed(dense, tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "sub" / "a.safetensors")
    assert f"{Q}.compressed" in stored and f"{Q}.weight" not in stored


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("length", [10**18, 2**63, 2**64 - 1, 0])
def test_a_header_of_any_length_is_refused(dense, length, reader):
    write_header(dense, "{}", length=length)
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        reader(dense)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [-1, 4], "data_offsets": [0, 8]},
        {"shape": [4, 4], "data_offsets": [0, 8]},
        {"shape": [2**32, 2**33], "data_offsets": [0, 8]},
        {"shape": [2, 2], "data_offsets": [8, 16]},
        {"shape": [2, 2], "data_offsets": [8, 0]},
        {"shape": [0, 2**63], "data_offsets": [0, 0]},
        {"shape": [2, 2], "dtype": "F3", "data_offsets": [0, 8]},
        {"shape": 4, "data_offsets": [0, 8]},
        {"shape": [2, 2]},
        [],
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_an_entry_that_no_tensor_can_have_is_refused(dense, entry, reader):
    if isinstance(entry, dict):
        entry = {"dtype": "BF16", **entry}
    write_header(dense, json.dumps({"layers.0.a.weight": entry}), bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable"):
        reader(dense)


@pytest.mark.parametrize("reader", READERS)
def test_a_tensor_that_occurs_twice_in_a_header_is_refused(dense, reader):
    entry = '"a.weight":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}'
    write_header(dense, f"{{{entry},{entry}}}", bytes(8))
    with pytest.raises(ValueError, match=r"'a\.weight' occurs twice"):
        reader(dense)


def test_empty_parts_are_compared_like_any_others(tmp_path):
    folder = write(tmp_path / "dense", {"norm.weight": torch.ones(1)})
    empty = {"data_offsets": [0, 0]}
    entries = {
        f"{Q}.compressed": {"dtype": "BF16", "shape": [0, 2**62], **empty},
        f"{Q}.bitmask": {"dtype": "U8", "shape": [2**62, 0], **empty},
        f"{Q}.shape": {"dtype": "I64", "shape": [2, 1], "data_offsets": [0, 16]},
    }
    write_header(folder, json.dumps(entries), struct.pack("<2q", 0, 2**62))
    with pytest.raises(ValueError, match=r"q_proj in .*disagree"):
        inspect(folder)


def test_a_layer_in_both_storages_is_refused(tmp_path):
    weight = two_of_four(4, 8)
    parts = {
        f"{Q}.{kind}": v for kind, v in sparse_24_bitmask.pack(weight)._asdict().items()
    }
    folder = write(tmp_path / "dense", {f"{Q}.weight": weight, **parts})
    with pytest.raises(ValueError, match=r"q_proj stored both dense and packed"):
        to_packed(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_minus_zero_is_counted_as_a_zero_but_named_as_an_obstacle_to_packing(tmp_path):
    weight = torch.tensor([[1.0, -0.0, -0.0, 2.0]], dtype=torch.bfloat16)
    folder = write(tmp_path / "dense", {f"{Q}.weight": weight})
    (layer,) = inspect(folder)
    assert layer.sparsity == 0.5 and layer.two_of_four is False
    with pytest.raises(
        sparse_24_bitmask.NotTwoOfFourError, match=r"2 entries are -0\.0, as W"
    ):
        to_packed(folder, tmp_path / "out")


def test_pickled_files_are_not_copied(dense, tmp_path):
    torch.save({}, dense / "training_args.bin")
    with pytest.warns(CheckpointWarning, match=r"left out: training_args\.bin"):
        to_packed(dense, tmp_path / "out")
    assert not (tmp_path / "out" / "training_args.bin").exists()


def test_no_file_makes_a_reader_take_more_memory_than_its_contents(tmp_path):
    """In a process that may take at most a gigabyte more than its imports."""
    weights = write(tmp_path / "weights", {"norm.weight": torch.ones(1)})
    shape = [1 << 14, 20_000]
    size = 2 * shape[0] * shape[1]  # a hole of 655 MB, all in one layer
    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}
    write_header(weights, json.dumps({"layers.0.a.weight": entry}))
    with (weights / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) + size)
    model = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    change_config(model, vocab_size=10**9)
    code = f"""
import resource
from llmc_attnmask.checkpoint.inspect import inspect
from llmc_attnmask.checkpoint.load import load
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    load({str(model)!r})
except ValueError as error:
    print(type(error).__name__)
print(inspect({str(weights)!r})[0].sparsity)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["ValueError", "1.0"], done.stderr
