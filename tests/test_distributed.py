"""Compare several processes (torchrun, gloo on CPUs) with a single one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmc_attnmask.oneshot.prune import prune
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.chat import chat_model
from tests.support.ranks import channel_weights

ROOT = Path(__file__).parents[1]
SUPPORT = Path(__file__).parent / "support"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
}
TORCHRUN = [sys.executable, *["-m", "torch.distributed.run", "--standalone"]]
TORCHRUN += ["--nproc_per_node", "2"]
RECIPE = """
prune_stage:
  light_modifiers:
    AttentionMatrixPruningModifier:
      {sparsity: 0.5, mask_structure: "2:4", steps: 24,
       targets: ["re:.*[01].self_attn$"]}
  accurate_modifiers:
    AttentionMatrixPruningModifier:
      {sparsity: 0.6, projections: [q, k, v, o], update_weights: true, steps: 8,
       targets: ["re:.*2.self_attn$"]}
  rest_modifiers:
    ALPSPruningModifier:
      {sparsity: 0.5, mask_structure: "2:4", targets: ["re:.*(gate|up|down)_proj$"]}
  recovery_modifiers:
    MaskedRecoveryModifier: {steps: 4, attention_weight: 0.1}
  smoothing_modifiers:
    ActivationSmoothingModifier: {}
"""
DATA = ["--num-samples", "18", "--max-length", "32"]  # nine micro-batches


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run one of this package's commands in two processes."""
    return subprocess.run(
        [*TORCHRUN, *command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def one_thread():
    """With more threads, sums would be computed in a different order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_ranks_write_the_same_checkpoint_as_one_process(tmp_path, one_thread):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = ["-m", "llmc_attnmask", "prune", str(MODEL_DIR), "--recipe", str(recipe)]
    done = run([*command, *DATA, "--output", str(tmp_path / "2")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 1
    prune(MODEL_DIR, recipe, tmp_path / "1", num_samples=18, max_length=32)
    files = {n: load_file(tmp_path / str(n) / "model.safetensors") for n in (1, 2)}
    dense = load_file(MODEL_DIR / "model.safetensors")
    for name, alone in files[1].items():
        together = files[2][name]
        assert torch.equal(together == 0, alone == 0)
        torch.testing.assert_close(together.float(), alone.float(), rtol=0, atol=1e-5)
    changed = [name for name in dense if not torch.equal(dense[name], files[2][name])]
    # of four blocks, smoothing has changed all but o; one of these was pruned
    assert len(changed) == 4 * (2 + 3 + 3) + 1
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in "12"]
    assert names[0] == names[1]


@pytest.mark.slow
def test_two_ranks_sample_the_same_answers_as_one_process(tmp_path, one_thread):
    model, recipe = chat_model(tmp_path / "model"), tmp_path / "recipe.yaml"
    recipe.write_text(
        "s_stage: {m_modifiers: {ALPSPruningModifier: {sparsity: 0.5, "
        "mask_structure: '2:4', targets: ['re:.*layers.0.mlp.up_proj$']}}}"
    )
    command = ["-m", "llmc_attnmask", "prune", str(model), "--recipe", str(recipe)]
    data = ["--dataset", "builtin:self", "--dataset", "builtin:pydoc"]
    done = run([*command, *DATA, *data, "--output", str(tmp_path / "2")])
    assert done.returncode == 0, done.stderr
    few = {"num_samples": 18, "max_length": 32}
    prune(model, recipe, tmp_path / "1", ["builtin:self", "builtin:pydoc"], **few)
    name = "model.layers.0.mlp.up_proj.weight"
    together, alone = (
        load_file(tmp_path / n / "model.safetensors")[name].float() for n in "21"
    )
    assert (together == 0).float().mean() >= 0.5
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_ranks_sum_what_they_have_and_refuse_invalid_runs(tmp_path, one_thread):
    channels = channel_weights()
    assert min(channels) < 0.1
    done = run([str(SUPPORT / "ranks.py"), str(tmp_path)])
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for modifier in ("attention", "alps", "recovery", "smoothing"):
            assert "ranks 0 and 1 calibrate on the same samples" in found[modifier]
            assert "dataset of its own" in found[modifier]
        for modifier in ("sparsegpt", "wanda"):
            assert "cannot run in 2 processes" in found[modifier]
            assert "use ALPSPruningModifier" in found[modifier]
            assert found[f"{modifier} hooks"] == 0
        assert "rank 1 reached b" in found["reached"]
        assert found["sum"] == [3.0, 3.0]
        assert found["channels"] == channels
        assert found["sent"] == [[1.0, 1.0], [float(rank)] * 2]
        assert found["written"] == [7.0, 7.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [("raise", "error: no luck with layer 1"), ("kill", "lost another rank")],
)
def test_a_rank_that_fails_ends_the_run_with_one_message(fault, message, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = [
        str(SUPPORT / "faulty.py"),
        fault,
        "prune",
        str(MODEL_DIR),
        *DATA,
    ]
    output = tmp_path / "out"
    start = time.monotonic()
    done = run([*command, "--recipe", str(recipe), "--output", str(output)])
    assert done.returncode == 1
    own = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(own) == 1 and message in own[0]
    failed = float((tmp_path / "failed").read_text())
    assert time.monotonic() - max(start, failed) < 60
    assert not output.exists() or not (output / "config.json").exists()
    if fault == "kill":
        assert signal.Signals.SIGKILL.name in done.stderr  # torchrun's summary
