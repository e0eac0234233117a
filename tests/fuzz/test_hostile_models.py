"""Models that are inconsistent, or that come with code: each once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc_attnmask.checkpoint.convert import to_packed
from llmc_attnmask.checkpoint.inspect import inspect
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.checkpoint.source import read_tokenizer
from llmc_attnmask.evaluation.perplexity import evaluate
from llmc_attnmask.oneshot.prune import prune
from tests.support.checkpoints import change_config

ROOT = Path(__file__).parents[2]

READERS = [inspect, lambda folder: to_packed(folder, folder.parent / "out")]

CODE = "open({sign!r}, 'w').close()\nclass Config: ...\nclass Model: ...\n"


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
    change_config(model, **fields)
    with pytest.raises(ValueError, match=message):
        load(model)


def test_missing_weights_are_an_error_and_not_filled_with_random_values(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no model\.norm\.weight"):
        load(model)


def test_an_unreadable_tokenizer_is_an_error_that_names_the_model(model):
    (model / "tokenizer.json").write_text('{"model": {"type": "Nonsense"}}')
    with pytest.raises(ValueError, match="model cannot be read: KeyError"):
        read_tokenizer(model)


@pytest.mark.parametrize("kind", ["config", "tokenizer"])
def test_a_models_own_code_is_never_run(model, tmp_path, kind, monkeypatch):
    """Nor does anything ask whether to run it: someone may answer yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    sign = tmp_path / "has run"
    (model / "code.py").write_text(CODE.format(sign=str(sign)))
    if kind == "config":
        auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        change_config(model, model_type="their_own", auto_map=auto)
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


def test_pickled_weights_are_not_read(model, tmp_path):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    for reader in (*READERS, load):
        with pytest.raises(OSError, match=r"pytorch_model\.bin, which is pickled"):
            reader(model)


def test_the_package_neither_opens_pickles_nor_trusts_code():
    forbidden = ("import pickle", "torch.load(", "weights_only", "joblib", "marshal")
    # real_model.py reads a file that it has fetched by its hash
    readers = ("source.py", "real_model.py")
    for path in [*ROOT.glob("llmc_attnmask/**/*.py"), *ROOT.glob("scripts/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text], path
        for line in text.splitlines():
            if "from_pretrained(" in line and "Auto" in line and "Model" not in line:
                assert path.name in readers, f"{path} reads past source.py"
