"""Which windows a run is calibrated on."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc_attnmask.checkpoint.io.atomic import PROGRESS
from llmc_attnmask.oneshot import calibration_data
from llmc_attnmask.oneshot.calibration_data import CalibrationData
from llmc_attnmask.oneshot.prune import prune
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.runlog.progress import Progress, ProgressError
from llmc_attnmask.text.dataset import SELF, DatasetError, load_texts
from llmc_attnmask.text.dialogs import render
from llmc_attnmask.text.prompts import PROMPTS
from llmc_attnmask.text.windows import calibration_windows
from tests.support.chat import chat_model

RECIPE = """
a_stage:
  b_modifiers:
    AttentionMatrixPruningModifier:
      {sparsity: 0.5, mask_structure: "2:4", steps: 0, targets: ["re:.*0.self_attn$"]}
"""
FEW = {"num_samples": 4, "max_length": 48}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(calibration_data, "ANSWER", 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def chatting(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def words(tmp_path) -> str:
    path = tmp_path / "words.jsonl"
    rows = [{"text": f"Item {i} of the list is {i * i}."} for i in range(200)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def chats(tmp_path) -> str:
    path = tmp_path / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is item {i}?"},
                {"role": "assistant", "content": f"It is {i * i}."},
            ]
        }
        for i in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def data(dataset, tokenizer, count=4, length=48, seed=0) -> CalibrationData:
    return CalibrationData(dataset, tokenizer, "text", count, length, seed)


def windows(found: CalibrationData, folder: Path, tmp_path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    progress = Progress(tmp_path / PROGRESS, {}, [])
    try:
        return found.windows(model, progress)
    finally:
        progress.close()


def test_the_models_own_answers_depend_on_the_seed_alone(folder, chatting, tmp_path):
    first, again, other = (
        windows(data(SELF, chatting, seed=seed), folder, tmp_path / name)
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert first.shape == (4, 48) and first.dtype == torch.int64
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_window_of_answers_starts_with_a_prompt(folder, chatting, tmp_path):
    found = windows(data(SELF, chatting), folder, tmp_path)
    questions = [
        render(chatting, [{"role": "user", "content": p}], reply=True) for p in PROMPTS
    ]
    for window in found.tolist():
        assert any(window[: len(q)] == q for q in questions)
        assert window[1] != chatting.bos_token_id


def test_plain_text_gives_the_same_windows_as_ever(tokenizer, words, tmp_path):
    alone = data(words, tokenizer)
    expected = calibration_windows(load_texts(words), tokenizer, 4, 48)
    assert torch.equal(windows(alone, MODEL_DIR, tmp_path), expected)
    assert alone.identity == expected.numpy().tobytes()


def test_datasets_share_the_windows_evenly_in_turn(folder, chatting, words, tmp_path):
    both = windows(data([SELF, words], chatting, count=5), folder, tmp_path / "a")
    assert len(both) == 5
    own = windows(data(SELF, chatting, count=3), folder, tmp_path / "b")
    text = calibration_windows(load_texts(words), chatting, 2, 48)
    assert torch.equal(both[1::2], text)
    assert torch.equal(both[0::2], own)


def test_more_datasets_than_windows_are_refused(tokenizer, words):
    with pytest.raises(DatasetError, match="num_samples is 1, fewer than the 2"):
        data([words, "builtin:pydoc"], tokenizer, count=1)


def test_without_a_dataset_the_chat_template_decides(tokenizer, chatting):
    assert data(None, tokenizer).datasets == ["builtin:pydoc"]
    assert data(None, chatting).datasets == [SELF, "builtin:pydoc"]


def test_answers_need_a_chat_template(tokenizer):
    with pytest.raises(DatasetError, match=r"has no chat template.*builtin:pydoc"):
        data(SELF, tokenizer)


def test_a_chat_model_with_plain_text_only_causes_one_warning(chatting, words, chats):
    with pytest.warns(UserWarning) as found:
        data([words, "builtin:pydoc"], chatting)
    assert [f"add --dataset {SELF}" in str(w.message) for w in found] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data([words, SELF], chatting)


def test_a_base_model_causes_no_warning(tokenizer, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data(words, tokenizer)


def test_messages_are_rendered_by_the_chat_template(chatting, chats, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = data(chats, chatting, count=3, length=40)
    start = chatting.encode("<|endoftext|>user: What is item")
    for window in windows(found, MODEL_DIR, tmp_path).tolist():
        assert window[: len(start)] == start


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"messages": []}, r"chats\.jsonl:2 has no messages that are a list"),
        ({"messages": [{"role": "user"}]}, "with a role and a content"),
        ({"text": "x"}, "either only dialogs or only texts"),
    ],
)
def test_a_row_without_a_dialog_is_named(second, message, chatting, chats):
    first = Path(chats).read_text().splitlines()[0]
    Path(chats).write_text(f"{first}\n{json.dumps(second)}\n")
    with pytest.raises(DatasetError, match=message):
        data(chats, chatting, count=1)


@pytest.fixture
def seen(monkeypatch) -> list[torch.Tensor]:
    """The calibration windows of each run."""
    found: list[torch.Tensor] = []
    own = CalibrationData.windows

    def recorded(self, *args):
        found.append(own(self, *args))
        return found[-1]

    monkeypatch.setattr(CalibrationData, "windows", recorded)
    return found


def stop_after(monkeypatch, batches: int, error: BaseException) -> None:
    """Have sampling end with an error after some batches."""
    sample, done = calibration_data.answers, []

    def limited(*args):
        if len(done) == batches:
            monkeypatch.setattr(calibration_data, "answers", sample)
            raise error
        done.append(1)
        return sample(*args)

    monkeypatch.setattr(calibration_data, "answers", limited)


def test_a_resumed_run_continues_sampling_and_has_the_same_windows(
    folder, recipe, seen, tmp_path, monkeypatch
):
    arguments = {"dataset": SELF, **FEW}
    monkeypatch.setattr(calibration_data, "_BATCH", 1)
    prune(folder, recipe, tmp_path / "uninterrupted", **arguments)
    stop_after(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        prune(folder, recipe, tmp_path / "out", **arguments)
    assert "the sampled dialogs are kept in" in caught.value.__notes__[0]
    with pytest.raises(ProgressError, match="differs in seed"):
        prune(folder, recipe, tmp_path / "out", **arguments, resume=True, seed=1)
    stop_after(monkeypatch, 2, AssertionError("sampled again"))
    prune(folder, recipe, tmp_path / "out", **arguments, resume=True)
    assert torch.equal(*seen)
    files = [tmp_path / n / "model.safetensors" for n in ("uninterrupted", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "out" / PROGRESS).exists()


def test_bad_input_that_shows_after_sampling_leaves_nothing(folder, recipe, tmp_path):
    recipe.write_text(RECIPE.replace("re:.*0.self_attn$", "nothing"))
    with pytest.raises(ValueError, match="matches no attention module"):
        prune(folder, recipe, tmp_path / "out", SELF, **FEW)
    assert [path.name for path in tmp_path.iterdir()] == [recipe.name]


def test_the_report_names_all_data(folder, recipe, words, tmp_path):
    saved = prune(folder, recipe, tmp_path / "out", [SELF, words], **FEW)
    options = json.loads((saved / "report.json").read_text())["options"]
    assert options["dataset"] == f"{SELF}, {words}"
    assert f"{SELF}, {words}" in (saved / "report.html").read_text()
    assert "sampled from the dense model" in (saved / "README.md").read_text()


def test_a_model_on_disk_gives_the_same_answers(folder, recipe, seen, tmp_path):
    for place in ("cpu", "disk"):
        output = tmp_path / place
        prune(folder, recipe, output, SELF, **FEW, offload_model=place)
    assert torch.equal(*seen)
