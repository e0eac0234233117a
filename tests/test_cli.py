import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmc_attnmask.cli import main
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.checkpoints import digests, prune_2of4

# conftest.py sets these to keep tests quiet; they would hide what a user sees
TEST_SETTINGS = {"LLM_COMPRESSOR_LOG_LEVEL", "TQDM_DISABLE", "TOKENIZERS_PARALLELISM"}
RECIPES = Path(__file__).parents[1] / "recipes"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmc_attnmask", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in TEST_SETTINGS}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "d.jsonl"
    row = {"body": "Return the sum of a list of numbers. " * 40}
    path.write_text("\n".join(json.dumps(row) for _ in range(20)))
    return path


def test_prune_inspect_and_eval_work_as_a_user_calls_them(text, tmp_path):
    output = tmp_path / "pruned"
    dataset = ("--dataset", text, "--text-column", "body")
    windows = ("--num-samples", 4, "--max-length", 64)
    recipe = ("--recipe", RECIPES / "attention_2of4.yaml")
    done = run("prune", MODEL_DIR, *recipe, *dataset, *windows, "--output", output)
    assert done.returncode == 0, done.stderr
    assert f"saved {output}" in done.stdout

    shown = run("inspect", output)
    assert shown.returncode == 0 and "layer" in shown.stdout
    layers = {x["name"]: x for x in json.loads(run("inspect", output, "--json").stdout)}
    query = layers["model.layers.0.self_attn.q_proj"]
    assert query["two_of_four"] and query["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert layers["model.layers.0.mlp.up_proj"]["two_of_four"] is False

    compared = ("--reference", MODEL_DIR, "--text", text, "--text-column", "body")
    evaluated = run("eval", output, *compared, "--max-length", 64, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    dense, pruned = json.loads(evaluated.stdout)
    assert dense["model"] == str(MODEL_DIR) and pruned["model"] == str(output)
    assert pruned["tokens"] == pruned["windows"] * 63
    table = run("eval", output, *compared, "--max-length", 64)
    assert f"{pruned['perplexity']:.3f}" in table.stdout


def test_an_error_prints_one_line_to_stderr_and_exits_with_code_1(tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(
        "s_stage:\n  g_modifiers:\n    WandaPruningModifier: {spars: 1}\n"
    )
    failed = run("prune", MODEL_DIR, "--recipe", recipe, "--output", tmp_path / "out")
    assert failed.returncode == 1
    assert "WandaPruningModifier.spars: unknown field" in failed.stderr
    (error,) = [line for line in failed.stderr.splitlines() if "error:" in line]
    assert error.startswith("error: recipe")
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()


def test_a_truncated_model_prints_one_error_line_and_leaves_nothing(tmp_path):
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    recipe = ("--recipe", RECIPES / "attention_2of4.yaml")
    windows = ("--num-samples", 4, "--max-length", 64)
    output = ("--output", tmp_path / "out")
    failed = run("prune", tmp_path / "model", *recipe, *windows, *output)
    assert failed.returncode == 1
    assert "model.safetensors is not a readable safetensors file" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_usage_exits_with_code_2():
    assert run("prune", MODEL_DIR).returncode == 2
    assert run("nonsense").returncode == 2


@pytest.fixture
def call(monkeypatch, capsys):
    """Like ``run``, but in this process, for commands that do not need a new one."""

    def in_process(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llmc-attnmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return in_process


def test_an_unexpected_error_prints_one_line_that_says_how_to_see_more(
    call, monkeypatch
):
    def broken(_: Path) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("llmc_attnmask.checkpoint.inspect.inspect", broken)
    code, _, err = call("inspect", MODEL_DIR)
    assert code == 1
    assert "error: KeyError: 'lost' (LLMC_ATTNMASK_TRACEBACK=1 shows where)" in err


def test_packing_and_unpacking_restore_every_tensor(call, tmp_path):
    dense = prune_2of4(MODEL_DIR, tmp_path / "dense")
    code, out, err = call("pack", dense, tmp_path / "packed", "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert len(figures["layers"]) == 28
    assert figures["bytes_after"] < figures["bytes_before"]
    code, out, err = call("unpack", tmp_path / "packed", tmp_path / "restored")
    assert code == 0, err
    assert f"saved {tmp_path / 'restored'}: 28 layers" in out.replace("\n", "")
    assert digests(tmp_path / "restored") == digests(dense)


def test_a_checkpoint_that_cannot_be_packed_prints_one_error_line(call, tmp_path):
    code, out, err = call("pack", MODEL_DIR, tmp_path / "out")
    assert code == 1 and not out
    (error,) = [line for line in err.splitlines() if "error:" in line]
    assert "is not 2:4" in error and "--only-2of4" in error
    assert not (tmp_path / "out").exists()
    code, _, err = call("pack", MODEL_DIR, tmp_path / "out", "--only-2of4")
    assert code == 1 and "nothing in" in err


def test_plan_prints_what_it_has_chosen_and_what_it_costs(call, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    data = ("--dataset", text, "--text-column", "body")
    command = ("plan", MODEL_DIR, "--recipe", "block_2of4_quick", *data)
    budget = (
        "--max-length",
        64,
        "--num-samples",
        4,
        "--dense-share",
        0.25,
        "--output",
        recipe,
    )
    code, out, err = call(*command, *budget)
    assert code == 0, err
    # whole names, also in 80 columns
    assert "Groups of weights in model.layers" in out
    assert "0.self_attn.q_proj+k_proj+v_proj" in out
    assert "chosen" in out and "is expected" in out
    assert f"saved {recipe}" in out.replace("\n", "")
    assert "ignore:" in recipe.read_text()
    other = (*budget[:-1], tmp_path / "other.yaml")
    found = json.loads(call(*command, *other, "--json")[1])
    assert found["chosen"]["dense_share"] <= 0.25
    code, _, err = call(*command, "--size", 0.2, "--output", tmp_path / "none.yaml")
    assert code == 1 and "error: size is 0.2, which cannot be met" in err


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_pack_and_unpack_have_help_and_check_their_usage(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0 and "Usage" in out
    assert call(command)[0] == 2


@pytest.mark.parametrize("command", ["prune", "plan", "eval", "inspect"])
def test_every_command_has_help(command):
    shown = run(command, "--help")
    assert shown.returncode == 0 and "Usage" in shown.stdout


def test_the_defaults_that_depend_on_the_model_or_recipe_are_in_the_help(call):
    """In brackets they would be taken for markup and vanish."""
    shown = "".join(call("prune", "--help")[1].replace("│", " ").split())
    assert "bydefault2048" in shown and "bydefaultwhattherecipeasksfor" in shown


def test_bench_without_vllm_says_where_to_run_it(call):
    code, _, err = call("bench", MODEL_DIR)
    assert code == 1
    assert "bench needs vLLM, which is not installed here" in err
