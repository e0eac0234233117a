"""README.md: a card that the Hub can read, with numbers of this run only."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llmc_attnmask.checkpoint.convert import to_packed
from llmc_attnmask.evaluation.answers import Agreement
from llmc_attnmask.evaluation.perplexity import Evaluation
from llmc_attnmask.evaluation.tasks import TaskResult
from llmc_attnmask.report import card, conversion, files
from llmc_attnmask.report.files import add_evaluation, render
from llmc_attnmask.report.mark import is_ours
from tests.report.test_numbers import check


@pytest.fixture
def copy(pruned, tmp_path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "copy"))


def evaluation(model: str, perplexity: float) -> Evaluation:
    return Evaluation(model, perplexity, 10, 256, 2550, "none", "held_out.jsonl")


def test_the_hub_can_read_the_front_matter(pruned):
    found = ModelCard.load(pruned / "README.md")
    assert found.data.library_name == "transformers"
    assert found.data.pipeline_tag == "text-generation"
    assert {"2:4", "compressed-tensors", "llmc-attnmask"} <= set(found.data.tags)
    # a folder is not a model on the Hub, and this one names no license
    assert found.data.base_model is None and found.data.license is None


def test_the_card_has_the_runs_numbers_and_no_others(pruned, report):
    text = (pruned / "README.md").read_text(encoding="utf-8")
    layers = [x for x in report["layers"] if x.get("compared")]
    for name, method in (("This run", "ours"), ("SparseGPT", "SparseGPT")):
        mean = sum(x["compared"][method]["matrix"] for x in layers) / len(layers)
        assert f"| {name} | {mean:.5f} |" in text
    assert "Perplexity was not measured" in text
    assert "QuantizationModifier" in text and "vllm serve" in text


def test_a_base_model_on_the_hub_is_named_and_its_license_adopted(report, copy):
    report["base_model"] = "org/model"
    data = ModelCard(card.render(report, copy)).data
    assert data.base_model == "org/model"
    assert data.base_model_relation == "quantized"
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
        report["base_model"] = base
        data = ModelCard(card.render(report, copy)).data
    assert data.license == "apache-2.0" and data.base_model is None


def test_the_card_of_a_planned_model_says_what_was_chosen(report, copy):
    assert "planned" not in card.render(report, copy)
    report["plan"] = {
        "budget": "dense_share 0.25",
        "size": 0.6714,
        "dense_share": 0.249,
        "sparsity": 0.3755,
        "expected_rise": 0.0612,
    }
    text = " ".join(card.render(report, copy).split())
    assert "for a budget of dense share 0.25: 24.9 % of the weights stay dense" in text
    assert "37.5 % are zero" in text or "37.6 % are zero" in text
    assert "6.1 %, without what quantization adds" in text and "0.671" not in text


def test_the_card_of_a_packed_checkpoint_says_how_to_load_it(copy, tmp_path, report):
    packed = Path(to_packed(copy, tmp_path / "packed", only_2of4=True).output)
    text = card.render(report, packed)
    assert "llmc_attnmask.load" in text and "AutoModelForCausalLM" not in text


def test_measured_perplexities_are_added_to_page_card_and_json(copy):
    add_evaluation(copy, [evaluation("dense", 45.6), evaluation("copy", 47.25)])
    assert "| this model | 47.250 |" in (copy / "README.md").read_text()
    assert "+1.650 compared with the reference" in (copy / "report.html").read_text()
    saved = json.loads((copy / "report.json").read_text())
    assert [e["perplexity"] for e in saved["evaluation"]] == [45.6, 47.25]
    assert not (copy / "README.previous.md").exists()
    weights = "model.safetensors"
    assert (copy / weights).exists()


def test_agreement_on_answers_is_added_to_page_card_and_json(copy):
    compared = replace(evaluation("copy", 47.25), answers=Agreement(0.25, 0.875, 640))
    add_evaluation(copy, [evaluation("dense", 45.6), compared])
    card = " ".join((copy / "README.md").read_text().split())
    assert "87.5 % of the tokens" in card and "is 0.2500 nats per token" in card
    page = (copy / "report.html").read_text()
    assert "KL 0.2500 nats per token, 640 tokens" in page
    assert "<td>0.2500</td><td>87.5 %</td>" in page
    report = json.loads((copy / "report.json").read_text())
    check(report)
    assert [e["answers"] for e in report["evaluation"]] == [
        None,
        {"kl": 0.25, "agreement": 0.875, "tokens": 640},
    ]


def test_perplexities_of_earlier_versions_have_no_answers_but_a_page(copy):
    add_evaluation(copy, [evaluation("dense", 45.6), evaluation("copy", 47.25)])
    report = json.loads((copy / "report.json").read_text())
    for entry in report["evaluation"]:
        del entry["answers"]
    (copy / "report.json").write_text(json.dumps(report))
    render(copy)
    assert "47.250" in (copy / "report.html").read_text()


def test_tasks_are_added_to_earlier_measurements(copy):
    add_evaluation(copy, [evaluation("dense", 45.6), evaluation("copy", 47.25)])
    results = [
        TaskResult(model, "arc", "acc", value, 0.01, 100, True, recovery)
        for model, value, recovery in (("dense", 0.5, None), ("copy", 0.45, 90.0))
    ]
    add_evaluation(copy, tasks=results)
    text = (copy / "README.md").read_text()
    assert "| arc | acc | 0.5000 | 0.4500 | 90.0 % |" in text and "47.250" in text
    assert "90.0 %" in (copy / "report.html").read_text()
    check(json.loads((copy / "report.json").read_text()))


def test_a_card_that_somebody_else_wrote_is_kept(copy):
    (copy / "README.md").write_text("# My own words")
    add_evaluation(copy, [evaluation("copy", 47.25)])
    assert (copy / "README.previous.md").read_text() == "# My own words"
    assert is_ours((copy / "README.md").read_text())
    (copy / "README.md").write_text("# Other words")
    add_evaluation(copy, [evaluation("copy", 47.25)])
    kept = sorted(path.name for path in copy.glob("README*"))
    assert kept == ["README.md", "README.previous-2.md", "README.previous.md"]


def test_a_card_that_was_edited_is_kept(copy):
    edited = (copy / "README.md").read_text() + "\nTested on our own data.\n"
    (copy / "README.md").write_text(edited)
    add_evaluation(copy, [evaluation("copy", 47.25)])
    assert (copy / "README.previous.md").read_text() == edited


def test_packing_updates_report_and_card(copy, tmp_path):
    packed = tmp_path / "packed"
    conversion.pack(copy, packed, only_2of4=True)
    assert "llmc_attnmask.load" in (packed / "README.md").read_text()
    dense, sparse = (
        json.loads((folder / "report.json").read_text())["checkpoint"]
        for folder in (copy, packed)
    )
    assert sum(x["bytes"] for x in sparse) < sum(x["bytes"] for x in dense)
    conversion.unpack(packed, tmp_path / "again")
    assert "llmc_attnmask.load" not in (tmp_path / "again" / "README.md").read_text()


def test_without_plotly_packing_leaves_out_files_that_would_be_wrong(
    copy, tmp_path, monkeypatch
):
    def missing(_: Path) -> None:
        raise ImportError("no plotly")

    monkeypatch.setattr("llmc_attnmask.report.files.render", missing)
    with pytest.warns(UserWarning, match="left out: no plotly"):
        conversion.pack(copy, tmp_path / "packed", only_2of4=True)
    left = {path.name for path in (tmp_path / "packed").iterdir()}
    assert not left & {"README.md", "report.html"}
    (copy / "README.md").write_text("# My own words")
    with pytest.warns(UserWarning, match="left out: no plotly"):
        conversion.pack(copy, tmp_path / "mine", only_2of4=True)
    assert (tmp_path / "mine" / "README.md").read_text() == "# My own words"


def test_rendering_again_writes_the_page_and_nothing_else(copy):
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    (copy / "report.html").unlink()
    render(copy)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ('{"version": 7}', "version 1")]
)
def test_a_report_that_cannot_be_read_says_what_to_do(copy, content, message):
    (copy / "report.json").write_text(content)
    with pytest.raises(files.ReportError, match=rf"{message}.*remove it"):
        render(copy)
