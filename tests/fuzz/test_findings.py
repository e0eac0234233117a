"""What fuzzing found, and what one thinks of before: each input once."""

import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llmc_attnmask.checkpoint import layout
from llmc_attnmask.checkpoint.convert import CheckpointWarning, pack, unpack
from llmc_attnmask.checkpoint.inspect import inspect
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.checkpoint.source import read_tokenizer
from llmc_attnmask.cli import app
from llmc_attnmask.evaluation.perplexity import evaluate
from llmc_attnmask.oneshot.prune import prune
from llmc_attnmask.oneshot.recipe import RecipeError, load_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.serving.recognise import annotate, recognise
from llmc_attnmask.text.dataset import DatasetError, load_texts
from llmc_attnmask.text.windows import calibration_windows
from tests.support.checkpoints import decoder, digests, two_of_four, write

ROOT = Path(__file__).parents[2]
READERS = [inspect, lambda folder: pack(folder, folder.parent / "out")]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def dense(tmp_path):
    return write(tmp_path / "dense", decoder(layers=1))


@pytest.fixture
def model(tmp_path):
    """A copy of the shipped model."""
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))


def change(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def header(folder: Path, text: str, data: bytes = b"", length: int | None = None):
    content = text.encode()
    size = struct.pack("<Q", len(content) if length is None else length)
    (folder / "model.safetensors").write_bytes(size + content + data)


# Files that are none


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_in_place_of_weights_is_refused_and_not_waited_for(dense, reader):
    os.mkfifo(dense / "more.safetensors")
    with pytest.raises(ValueError, match=r"more\.safetensors is not a file but"):
        reader(dense)


@pytest.mark.parametrize("target", [".", "/", "nowhere", "/dev/zero"])
def test_links_without_an_end_are_refused_and_nothing_is_left(dense, target):
    (dense / "link").symlink_to(target)
    with pytest.raises(ValueError, match=r"link is neither a file nor a folder"):
        pack(dense, dense.parent / "out")
    assert [path.name for path in dense.parent.iterdir()] == ["dense"]


def test_links_to_files_are_read_as_a_hub_cache_has_them(dense, tmp_path):
    blobs = Path(shutil.move(dense, tmp_path / "blobs"))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    pack(snapshot, tmp_path / "packed")
    assert not [p for p in (tmp_path / "packed").iterdir() if p.is_symlink()]
    unpack(tmp_path / "packed", tmp_path / "restored")
    assert digests(tmp_path / "restored") == digests(blobs)


@pytest.mark.parametrize("where", ["out", "sub/out"])
def test_an_output_within_the_input_is_refused(dense, where):
    (dense / "sub").mkdir()
    for convert in (pack, unpack):
        with pytest.raises(ValueError, match=r"is within .* name a folder elsewhere"):
            convert(dense, dense / where)
    assert not list(dense.rglob("out"))


def test_a_shard_in_a_subfolder_is_written_once(tmp_path):
    tensors = decoder(layers=1)
    dense = write(tmp_path / "dense", tensors)
    (dense / "sub").mkdir()
    (dense / "model.safetensors").rename(dense / "sub" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "sub/a.safetensors")}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    pack(dense, tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "sub" / "a.safetensors")
    assert f"{Q}.compressed" in stored and f"{Q}.weight" not in stored


# Headers that lie


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("length", [10**18, 2**63, 2**64 - 1, 0])
def test_a_header_of_any_length_is_refused(dense, length, reader):
    header(dense, "{}", length=length)
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
    header(dense, json.dumps({"layers.0.a.weight": entry}), bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable"):
        reader(dense)


@pytest.mark.parametrize("reader", READERS)
def test_a_tensor_that_stands_twice_in_a_header_is_refused(dense, reader):
    entry = '"a.weight":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}'
    header(dense, f"{{{entry},{entry}}}", bytes(8))
    with pytest.raises(ValueError, match=r"'a\.weight' stands twice"):
        reader(dense)


def test_parts_without_a_byte_are_compared_as_others_are(tmp_path):
    folder = write(tmp_path / "dense", {"norm.weight": torch.ones(1)})
    empty = {"data_offsets": [0, 0]}
    entries = {
        f"{Q}.compressed": {"dtype": "BF16", "shape": [0, 2**62], **empty},
        f"{Q}.bitmask": {"dtype": "U8", "shape": [2**62, 0], **empty},
        f"{Q}.shape": {"dtype": "I64", "shape": [2, 1], "data_offsets": [0, 16]},
    }
    header(folder, json.dumps(entries), struct.pack("<2q", 0, 2**62))
    with pytest.raises(ValueError, match=r"q_proj in .*disagree"):
        inspect(folder)


def test_a_layer_in_both_storages_is_refused(tmp_path):
    weight = two_of_four(4, 8)
    parts = {f"{Q}.{kind}": v for kind, v in layout.pack(weight)._asdict().items()}
    folder = write(tmp_path / "dense", {f"{Q}.weight": weight, **parts})
    with pytest.raises(ValueError, match=r"q_proj stored dense and packed at once"):
        pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_are_counted_as_they_are_packed_and_minus_zero_is_named(tmp_path):
    weight = torch.tensor([[1.0, -0.0, -0.0, 2.0]], dtype=torch.bfloat16)
    folder = write(tmp_path / "dense", {f"{Q}.weight": weight})
    (layer,) = inspect(folder)
    assert layer.sparsity == 0.5 and layer.two_of_four is False
    with pytest.raises(layout.NotTwoOfFourError, match=r"2 entries are -0\.0, as W"):
        pack(folder, tmp_path / "out")


# JSON


DEEP = ["[" * 100_000, '{"a":' * 400 + "1" + "}" * 400]


@pytest.mark.parametrize("content", [*DEEP, "9" * 5000, "\ufeff{}", "nul", ""])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_cannot_be_worked_with_is_refused(dense, name, content):
    (dense / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        pack(dense, dense.parent / "out")


@pytest.mark.parametrize("line", [*DEEP, "9" * 5000])
def test_lines_that_cannot_be_worked_with_are_named(tmp_path, line):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    with pytest.raises(DatasetError, match=r"d\.jsonl:2 is not JSON"):
        list(load_texts(path))


@pytest.mark.parametrize("names", [5, True, "Linear", {"a": 1}, [1], [None], ["re:("]])
@pytest.mark.parametrize("key", ["targets", "ignore"])
def test_targets_that_name_nothing_are_refused_by_the_server(names, key):
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    config = {"quant_method": "compressed-tensors"}
    with pytest.raises(ValueError, match=f"sparsity_config with {key}"):
        recognise(config | {"sparsity_config": sparsity | {key: names}})


def test_a_pattern_that_takes_for_ever_is_an_error():
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    config = {"quant_method": "compressed-tensors"}
    evil = {"sparsity_config": sparsity | {"targets": ["re:(a|a)*$"]}}
    found = recognise(config | evil)
    with pytest.raises(ValueError, match="takes more than 1 s"):
        found.is_packed("a" * 60 + "!")


@pytest.mark.parametrize("quantization", [5, "x", [1], [["a", "b", "c"]]])
def test_a_quantization_config_that_is_none_is_refused(dense, quantization):
    note = {"version": 1, "sparsity": {"structure": "2:4", "targets": ["a"]}}
    config = {"quantization_config": quantization, "llmc_attnmask": note}
    with pytest.raises(ValueError, match="quantization_config that is no mapping"):
        annotate(dict(config))
    change(dense, **config)
    with pytest.raises(ValueError, match="quantization_config that is no mapping"):
        pack(dense, dense.parent / "out")


# Models


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "nonsense"}, "model cannot be read"),
        ({"model_type": None, "architectures": None}, "model cannot be read"),
        ({"hidden_size": -1}, "model cannot be read"),
        ({"quantization_config": [1]}, "model cannot be read"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers 1000000000, but there are"),
        ({"vocab_size": 10**9}, r"model of \d+ weights, but the files"),
        ({"intermediate_size": 10**9}, r"model of \d+ weights, but the files"),
    ],
)
def test_a_config_that_its_weights_contradict_is_refused(model, fields, message):
    change(model, **fields)
    with pytest.raises(ValueError, match=message):
        load(model)


def test_weights_that_are_missing_are_an_error_and_not_random(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no model\.norm\.weight"):
        load(model)


def test_a_tokenizer_that_cannot_be_read_names_the_model(model):
    (model / "tokenizer.json").write_text('{"model": {"type": "Nonsense"}}')
    with pytest.raises(ValueError, match="model cannot be read: KeyError"):
        read_tokenizer(model)


CODE = "open({sign!r}, 'w').close()\nclass Config: ...\nclass Model: ...\n"


@pytest.mark.parametrize("kind", ["config", "tokenizer"])
def test_code_of_a_model_is_never_run(model, tmp_path, kind, monkeypatch):
    """Nor is it asked about: somebody may answer yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    sign = tmp_path / "has run"
    (model / "code.py").write_text(CODE.format(sign=str(sign)))
    if kind == "config":
        auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        change(model, model_type="their_own", auto_map=auto)
    else:
        config = json.loads((model / "tokenizer_config.json").read_text())
        config |= {"auto_map": {"AutoTokenizer": ["code.Config", None]}}
        config["tokenizer_class"] = "TheirTokenizer"
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    calls = [
        lambda: prune(model, "attention_2of4", tmp_path / "out", num_samples=2),
        lambda: evaluate([model]),
    ]
    if kind == "config":
        calls.append(lambda: load(model))
    for call in calls:
        with pytest.raises(
            ValueError, match=r"needs code of its own.*which is not run"
        ):
            call()
    assert not sign.exists() and not (tmp_path / "out").exists()


def test_weights_that_are_pickled_are_not_read(model, tmp_path):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    for reader in (*READERS, load):
        with pytest.raises(OSError, match=r"pytorch_model\.bin, which is pickled"):
            reader(model)


def test_what_is_pickled_is_not_copied(dense, tmp_path):
    torch.save({}, dense / "training_args.bin")
    with pytest.warns(CheckpointWarning, match=r"left out: training_args\.bin"):
        pack(dense, tmp_path / "out")
    assert not (tmp_path / "out" / "training_args.bin").exists()


def test_nothing_of_ours_opens_pickles_or_trusts_code():
    forbidden = ("import pickle", "torch.load(", "weights_only", "joblib", "marshal")
    for path in [*ROOT.glob("llmc_attnmask/**/*.py"), *ROOT.glob("scripts/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text], path
        for line in text.splitlines():
            if "from_pretrained(" in line and "Auto" in line and "Model" not in line:
                assert path.name == "source.py", f"{path} reads past source.py"


# Recipes


def billion_laughs(kind: str) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    for i in range(1, 30):
        copies = ", ".join([f"*a{i - 1}"] * 9)
        value = {"lists": f"[{copies}]", "merges": f"{{<<: [{copies}]}}"}[kind]
        lines.append(f"a{i}: &a{i} {value}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (billion_laughs("lists"), "more than 10000 values, aliases written out"),
        (billion_laughs("merges"), "more than 10000 values, aliases written out"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 3000, "nested too deep"),
        ("a: !!int ''", "value that does not fit its tag: IndexError"),
        ("a: !!bool maybe", "value that does not fit its tag: KeyError"),
        ("a: !!timestamp x", "value that does not fit its tag: AttributeError"),
        ("a: 9999-99-99", "value that does not fit its tag: ValueError"),
        ("? [a]\n: 1", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("# " + "x" * (1 << 20), "has 1048578 bytes; expected at most"),
    ],
)
def test_recipes_that_take_more_than_they_hold_are_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_many_keys_are_compared_in_one_pass(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(f"a{i}: 1" for i in range(4000)))
    with pytest.raises(RecipeError, match="silently drop 'a0'"):
        load_recipe(path)


def test_anchors_may_be_used_within_reason(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "a_stage:\n  b_modifiers:\n"
        "    SparseGPTModifier: {sparsity: 0.5, targets: &t ['re:.*q_proj$']}\n"
        "    WandaPruningModifier: {sparsity: 0.5, targets: *t}\n"
    )
    first, second = load_recipe(path).modifiers
    assert first.targets == second.targets == ["re:.*q_proj$"]


# Commands


def test_markup_and_control_codes_of_others_are_shown_and_not_obeyed(tmp_path):
    name = "layers.0.[/x]\x1b[2J[red].weight"
    write(tmp_path / "[bold]dense", {name: two_of_four(4, 8)})
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "[bold]dense")])
    assert done.exit_code == 0
    assert r"layers.0.[/x]\x1b[2J[red]" in done.stdout and "\x1b" not in done.stdout
    assert "[bold]" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 10**30}, "expected at least 0 and less than"),
        ({"seed": -1}, "expected at least 0 and less than"),
        ({"num_samples": 10**12, "max_length": 64}, "different windows of 64"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, arguments, message):
    text = tmp_path / "text.txt"
    text.write_text("some words " * 200)
    with pytest.raises(ValueError, match=message):
        prune(MODEL_DIR, "attention_2of4", tmp_path / "out", str(text), **arguments)
    assert not (tmp_path / "out").exists()


def test_as_many_windows_as_there_are_is_the_most(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        windows = calibration_windows(["some words " * 20], tokenizer, 8, 16)
        with pytest.raises(DatasetError, match="different windows of 16"):
            calibration_windows(["some words " * 20], tokenizer, 10_000, 16)
    assert windows.shape == (8, 16)


# Memory


def test_no_file_takes_memory_that_it_does_not_hold(tmp_path):
    """In a process that may not have a gigabyte more than what it imports takes."""
    weights = write(tmp_path / "weights", {"norm.weight": torch.ones(1)})
    shape = [1 << 14, 20_000]
    size = 2 * shape[0] * shape[1]  # a hole of 655 MB, all in one layer
    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}
    header(weights, json.dumps({"layers.0.a.weight": entry}))
    with (weights / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) + size)
    model = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    change(model, vocab_size=10**9)
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
