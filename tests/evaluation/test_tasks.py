import json
import sys

import pytest
from typer.testing import CliRunner

from llmc_attnmask.checkpoint.convert import to_packed
from llmc_attnmask.cli import app, tables
from llmc_attnmask.evaluation.tasks import (
    TaskResult,
    _matched,
    _recovery,
    evaluate_tasks,
)
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.checkpoints import prune_2of4


@pytest.fixture
def harness():
    pytest.importorskip(
        "lm_eval",
        reason="the extra `eval` has 370 MB and takes a minute to set up, so the "
        "tests' environment leaves it out: pip install -c constraints.txt lm_eval",
    )


@pytest.fixture
def folder(tmp_path):
    """A task of eight questions that a model trained on docstrings can answer."""
    rows = [
        {"q": "Return the", "choices": [" zebra banana", " sum of a list"], "label": 1},
        {"q": "If the argument is", "choices": [" None", " zebra"], "label": 0},
    ] * 4
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "questions.yaml").write_text(f"""
task: docstring_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    return tmp_path


def test_tasks_of_a_packed_checkpoint_are_compared_with_the_dense_model(
    harness, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    prune_2of4(MODEL_DIR, dense)
    to_packed(dense, packed)
    arguments = ["--tasks", "docstring_questions", "--include-path", str(folder)]
    arguments += ["--reference", str(MODEL_DIR), "--json"]
    done = CliRunner().invoke(app, ["eval", str(packed), *arguments])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found) == ["tasks"]
    reference, pruned = found["tasks"]
    assert reference["model"] == str(MODEL_DIR) and pruned["model"] == str(packed)
    assert reference["value"] == 1.0 and reference["recovery"] is None
    assert pruned["samples"] == 8 and pruned["metric"] == "acc"
    assert pruned["recovery"] == pytest.approx(100 * pruned["value"])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("no_such_task", "there is no task 'no_such_task'.*--include-path"),
        ("broken", "task broken cannot be loaded: .*local file"),
    ],
)
def test_a_task_that_cannot_run_is_refused_by_name(harness, folder, task, message):
    broken = (folder / "questions.yaml").read_text().replace("questions", "broken")
    (folder / "broken.yaml").write_text(broken.replace("docstring_broken", "broken"))
    from lm_eval.tasks import TaskManager

    # the harness's own 14,000 tasks take seconds to read
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.raises(ValueError, match=message):
        _matched(manager, [task])


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"pip install \"llmc-attnmask\[eval\]\""):
        evaluate_tasks([MODEL_DIR], ["arc_easy"])


@pytest.mark.parametrize(
    ("value", "dense", "higher", "percent"),
    [
        (0.4, 0.5, True, 80.0),
        (25.0, 20.0, False, 80.0),  # perplexity
        (0.4, None, True, None),
        (0.4, 0.0, True, None),
    ],
)
def test_recovery_is_below_100_for_worse_values(value, dense, higher, percent):
    found = _recovery(value, dense, higher)
    assert found == (None if percent is None else pytest.approx(percent))


def test_the_table_has_a_row_per_metric_and_a_column_per_model():
    rows = [
        TaskResult("dense", "arc", "acc", 0.5, 0.01, 8, True, None),
        TaskResult("dense", "arc", "acc_norm", 0.6, None, 8, True, None),
        TaskResult("pruned", "arc", "acc", 0.4, 0.01, 8, True, 80.0),
        TaskResult("pruned", "arc", "acc_norm", 0.6, None, 8, True, 100.0),
    ]
    rows += [TaskResult("other", "arc", "acc_norm", 0.3, None, 8, True, 50.0)]
    table = tables.tasks(rows)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["metric"] == ["acc", "acc_norm"]
    assert cells["dense"] == ["0.5000 ± 0.0100", "0.6000"]
    assert cells["pruned"] == ["0.4000 ± 0.0100 (80.0 %)", "0.6000 (100.0 %)"]
    assert cells["other"] == ["", "0.3000 (50.0 %)"]
