"""An interrupted run that is resumed gives the same bytes as an uninterrupted one."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors import safe_open
from torch import nn

from llmc_attnmask.checkpoint.io.atomic import PROGRESS
from llmc_attnmask.oneshot.prune import prune
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.runlog.progress import Progress, ProgressError

# every kind of modifier: this package's, a stock pruner, a quantizer
RECIPE = """
prune_stage:
  attention_modifiers:
    AttentionMatrixPruningModifier: {sparsity: 0.5, mask_structure: "2:4", steps: 2}
  output_modifiers:
    ALPSPruningModifier:
      {sparsity: 0.5, mask_structure: "2:4", targets: ["re:.*[vo]_proj$"]}
  rest_modifiers:
    SparseGPTModifier:
      {sparsity: 0.5, mask_structure: "2:4", targets: ["re:.*(gate|up|down)_proj$"]}
  recovery_modifiers:
    MaskedRecoveryModifier: {steps: 1}
quant_stage:
  quant_modifiers:
    ActivationSmoothingModifier: {}
    MaskedGPTQModifier: {scheme: W8A8, targets: [Linear], ignore: ["re:.*lm_head"]}
"""
FEW = {"num_samples": 4, "max_length": 48}
# saved layers per modifier: q and k of 4 blocks together, v and o one by one, ...
LAYERS = {
    "attention": 4,
    "ALPS": 8,
    "SparseGPT": 12,
    "recovery": 4,
    "smoothing": 4,
    "GPTQ": 4 + 28,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    return contents(prune(MODEL_DIR, recipe, output, **FEW))


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files except those that contain timings."""
    assert not (folder / PROGRESS).exists()
    timed = {"report.json", "report.html"}
    assert all((folder / name).exists() for name in timed)
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in timed}


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function that interrupts a run after a number of layers."""

    def after(layers: int) -> None:
        save = Progress.save

        def interrupted(self: Progress, *args: object) -> None:
            save(self, *args)
            if self.layers == layers:
                monkeypatch.undo()
                raise KeyboardInterrupt

        monkeypatch.setattr(Progress, "save", interrupted)

    return after


def middle_of(name: str) -> int:
    names = list(LAYERS)
    before = names[: names.index(name)]
    return sum(LAYERS[n] for n in before) + LAYERS[name] // 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers", [1, *map(middle_of, ("SparseGPT", "recovery", "GPTQ"))]
)
def test_a_run_interrupted_in_any_pass_resumes_to_the_same_bytes(
    layers, recipe, uninterrupted, interrupt, tmp_path
):
    interrupt(layers)
    with pytest.raises(KeyboardInterrupt) as caught:
        prune(MODEL_DIR, recipe, tmp_path / "out", **FEW)
    assert f"{layers} finished layers are kept" in caught.value.__notes__[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PROGRESS]
    resumed = prune(MODEL_DIR, recipe, tmp_path / "out", **FEW, resume=True)
    assert contents(resumed) == uninterrupted


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_resumes_to_the_same_bytes(
    recipe, uninterrupted, tmp_path, monkeypatch
):
    output = tmp_path / "out"

    def killed(*_, **__):
        left = output / ".saving-killed"  # a killed process does not clean up
        left.mkdir()
        (left / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", killed)
        with pytest.raises(OSError, match="No space left"):
            prune(MODEL_DIR, recipe, output, **FEW)
    computed = []
    monkeypatch.setattr(Progress, "save", lambda *args: computed.append(args))
    resumed = prune(MODEL_DIR, recipe, output, **FEW, resume=True)
    assert contents(resumed) == uninterrupted
    assert not computed


def test_progress_is_stored_as_safetensors_and_json(recipe, interrupt, tmp_path):
    interrupt(5)
    with pytest.raises(KeyboardInterrupt):
        prune(MODEL_DIR, recipe, tmp_path / "out", **FEW)
    files = sorted((tmp_path / "out" / PROGRESS).iterdir())
    assert {path.suffix for path in files} == {"", ".json", ".safetensors"}
    assert [path.stat().st_size for path in files if not path.suffix] == [0]  # the lock
    saved = next(path for path in files if path.suffix == ".safetensors")
    with safe_open(saved, "pt") as file:
        keys = set(file.keys())
        (entry,) = json.loads(file.metadata()["journal"])
    module = "model.layers.0.self_attn.q_proj"
    assert {f"{module}:weight", f"{module}:mask"} <= keys
    assert set(entry) == {"modifier", "layer", "figures"}  # as earlier versions wrote


@pytest.fixture
def interrupted(recipe, interrupt, tmp_path) -> Path:
    interrupt(1)
    with pytest.raises(KeyboardInterrupt):
        prune(MODEL_DIR, recipe, tmp_path / "out", **FEW)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": False}, "--resume to continue it"),
        ({"seed": 1}, "differs in seed .was '0', is '1'"),
        ({"num_samples": 5}, "differs in calibration data"),
        ({"recipe": "attention_2of4"}, "differs in recipe"),
    ],
)
def test_the_progress_of_another_run_is_refused_and_left_alone(
    changes, message, recipe, interrupted
):
    if "recipe" in changes:
        recipes = Path(__file__).parents[2] / "recipes"
        changes = {"recipe": recipes / f"{changes['recipe']}.yaml"}
    before = {p: p.read_bytes() for p in (interrupted / PROGRESS).iterdir()}
    arguments = {"recipe": recipe, **FEW, "resume": True, **changes}
    with pytest.raises((ValueError, OSError), match=message):
        prune(MODEL_DIR, output=interrupted, **arguments)
    assert {p: p.read_bytes() for p in (interrupted / PROGRESS).iterdir()} == before


def test_two_processes_cannot_work_in_the_same_folder(recipe, interrupted):
    at_work = Progress(interrupted / PROGRESS, {}, [])
    with pytest.raises(ProgressError, match="another process is working"):
        prune(MODEL_DIR, recipe, interrupted, **FEW, resume=True)
    at_work.close()


def test_a_changed_config_makes_it_a_different_run(recipe, interrupt, tmp_path):
    model = shutil.copytree(MODEL_DIR, tmp_path / "model")
    interrupt(1)
    with pytest.raises(KeyboardInterrupt):
        prune(model, recipe, tmp_path / "out", **FEW)
    config = model / "config.json"
    changed = json.loads(config.read_text()) | {"rms_norm_eps": 0.5}
    config.write_text(json.dumps(changed))
    with pytest.raises(ProgressError, match="differs in config"):
        prune(model, recipe, tmp_path / "out", **FEW, resume=True)


@pytest.mark.slow
def test_layers_of_an_unknown_run_are_ignored(recipe, uninterrupted, interrupted):
    folder = interrupted / PROGRESS
    (folder / "run.json").unlink()
    stem = "00 AttentionMatrixPruningModifier"
    (folder / f"{stem}.json").write_text('["model.layers.0.self_attn"]')
    (folder / f"{stem} model.layers.0.self_attn.safetensors").write_text("stale")
    resumed = prune(MODEL_DIR, recipe, interrupted, **FEW, resume=True)
    assert contents(resumed) == uninterrupted


def test_a_run_does_not_write_into_a_checkpoint_that_was_finished_meanwhile(tmp_path):
    finished = tmp_path / "out"
    progress = Progress(finished / PROGRESS, {}, [modifier := SmoothQuantModifier()])
    finished.mkdir()
    (finished / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        progress.save(nn.Module(), modifier, "layer", [], [])
    assert [path.name for path in finished.iterdir()] == ["config.json"]


def test_a_disk_without_locks_causes_a_warning(tmp_path, monkeypatch):
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    progress = Progress(tmp_path / PROGRESS, {}, [modifier := SmoothQuantModifier()])
    progress.save(nn.Module(), modifier, "layer", [], [])
    assert progress.has(modifier, "layer")
    progress.close()


def test_a_half_written_layer_is_ignored(recipe, interrupted):
    half = interrupted / PROGRESS / ".01 ALPSPruningModifier x.safetensors"
    half.write_text("half")
    progress = Progress(interrupted / PROGRESS, {}, [])
    assert progress.layers == 1
    progress.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_resumes_to_the_same_bytes(
    how, recipe, uninterrupted, tmp_path
):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "llmc_attnmask", "prune", str(MODEL_DIR)]
    command += ["--recipe", str(recipe), "--output", str(output)]
    command += ["--num-samples", "4", "--max-length", "48"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "300"},
        # a shell's background jobs ignore SIGINT, and so would this process
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while process.poll() is None:
            if len(list(output.glob(f"{PROGRESS}/[0-9]*"))) >= 2:
                process.send_signal(how)
                break
            time.sleep(0.005)
        _, stderr = process.communicate()
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in stderr
        assert "interrupted; " in stderr and "--resume continues" in stderr
    else:
        assert process.returncode == -how
    assert not (output / "config.json").exists()
    resumed = prune(MODEL_DIR, recipe, output, **FEW, resume=True)
    assert contents(resumed) == uninterrupted
