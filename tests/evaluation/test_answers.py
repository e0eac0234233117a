"""How close a checkpoint is to the reference on the reference's own answers."""

import json
import shutil
import sys

import pytest
import torch
from transformers import AutoTokenizer

from llmc_attnmask.cli import main
from llmc_attnmask.evaluation import perplexity
from llmc_attnmask.evaluation.answers import agreement, reference_answers
from llmc_attnmask.evaluation.perplexity import evaluate, load_model
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.text.generation import Dialog
from tests.support.chat import chat_model

PROMPTS = ["Return the sum.", "What is a list?", "Explain what numbers are used for."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def reference(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def dialogs(reference, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return reference_answers(reference, tokenizer, PROMPTS, longest=12)


@pytest.fixture
def perturbed(folder):
    """A function that makes a copy of the reference with noise in its MLPs."""

    @torch.no_grad()
    def make(noise: float):
        model = load_model(folder)
        random = torch.Generator().manual_seed(0)
        for name, weight in model.named_parameters():
            if "mlp" in name:
                change = torch.randn(weight.shape, generator=random)
                weight += noise * weight.std() * change
        return model

    return make


def test_a_model_agrees_with_itself(reference, dialogs):
    found = agreement(reference, reference, dialogs)
    assert found.agreement == 1.0 and found.kl == 0.0
    assert found.tokens == sum(len(dialog.answer) for dialog in dialogs)


def test_agreement_falls_and_kl_grows_with_the_perturbation(
    reference, dialogs, perturbed
):
    little, much = (
        agreement(reference, perturbed(noise), dialogs) for noise in (0.1, 1.0)
    )
    assert 1 > little.agreement > much.agreement
    assert 0 < little.kl < much.kl


@torch.no_grad()
def test_only_answer_tokens_count(reference, dialogs, perturbed):
    model = perturbed(0.5)
    divergences, hits = [], []
    for dialog in dialogs:
        ids = torch.tensor([dialog.tokens])
        p, q = (m(ids).logits[0].log_softmax(-1) for m in (reference, model))
        for position in range(dialog.start, len(dialog.tokens)):
            before, after = p[position - 1], q[position - 1]
            divergences.append((before.exp() * (before - after)).sum().item())
            hits.append((before.argmax() == after.argmax()).item())
    found = agreement(reference, model, dialogs)
    assert found.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert found.agreement == pytest.approx(sum(hits) / len(hits))


def test_models_of_other_vocabularies_are_refused(reference, random_llama):
    dialog = Dialog([1, 2, 3], start=1, cut=False)
    with pytest.raises(ValueError, match="vocabulary of 64 tokens and the reference"):
        agreement(reference, random_llama, [dialog])


def test_a_broken_model_is_named(reference, dialogs, perturbed, folder):
    with pytest.raises(ValueError, match=f"the logits of {folder} are not finite"):
        agreement(reference, perturbed(float("nan")), dialogs)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Return the sum of a list of numbers.\n" * 20)
    return str(path)


@pytest.fixture
def few_answers(monkeypatch):
    def few(model, tokenizer):
        return reference_answers(model, tokenizer, PROMPTS[:2], longest=6)

    monkeypatch.setattr(perplexity, "reference_answers", few)


def test_evaluate_compares_with_a_reference_that_can_chat(folder, text, few_answers):
    short = {"text": text, "max_length": 32}
    dense, same = evaluate([folder], **short, reference=folder)
    assert dense.answers is None and same.answers is not None
    assert same.answers.agreement == 1.0
    (alone,) = evaluate([folder], **short)
    assert alone.answers is None
    for arguments in (
        {"answers": False, "reference": folder},
        {"reference": MODEL_DIR},
    ):
        found = evaluate([folder], **short, **arguments)
        assert [result.answers for result in found] == [None, None]


def test_a_checkpoint_of_another_vocabulary_is_left_out(
    folder, text, few_answers, tmp_path
):
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    tokens = content["model"]["vocab"]
    tokens["ssages"], tokens["Ġinternal"] = tokens["Ġinternal"], tokens["ssages"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.warns(UserWarning, match="another vocabulary than the reference"):
        found = evaluate([other], text, 32, reference=folder)
    assert found[1].answers is None and found[1].perplexity > 1


def test_the_command_shows_agreement_and_leaves_it_out_on_request(
    folder, text, few_answers, monkeypatch, capsys
):
    def run(*more: str) -> str:
        words = ["eval", folder, "--reference", folder, "--text", text]
        command = ["llmc-attnmask", *map(str, words), "--max-length", "32", *more]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    dense, same = json.loads(run("--json"))
    assert dense["answers"] is None and same["answers"]["agreement"] == 1.0
    assert same["answers"].keys() == {"kl", "agreement", "tokens"}
    monkeypatch.setenv("COLUMNS", "300")
    assert "100.0%" in run() and "100.0%" not in run("--no-answers")
