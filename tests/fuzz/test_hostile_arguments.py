"""Names and numbers that reach a command: each once."""

import warnings

import pytest
from typer.testing import CliRunner

from llmc_attnmask.cli import app
from llmc_attnmask.oneshot.prune import prune
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.text.dataset import DatasetError
from llmc_attnmask.text.windows import calibration_windows
from tests.support.checkpoints import two_of_four, write


def test_markup_and_control_codes_in_names_are_shown_but_not_obeyed(tmp_path):
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


def test_requesting_more_windows_than_exist_is_refused(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        windows = calibration_windows(["some words " * 20], tokenizer, 8, 16)
        with pytest.raises(DatasetError, match="different windows of 16"):
            calibration_windows(["some words " * 20], tokenizer, 10_000, 16)
    assert windows.shape == (8, 16)
