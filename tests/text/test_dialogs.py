import copy
import re

import pytest
import torch

from llmc_attnmask.text.dataset import DatasetError
from llmc_attnmask.text.dialogs import (
    contains_dialogs,
    dialog_windows,
    render,
    window_starts,
)
from llmc_attnmask.text.prompts import EVALUATION_PROMPTS, PROMPTS, SUBJECTS
from llmc_attnmask.text.windows import calibration_windows
from tests.support.chat import MARK, TEMPLATE

QUESTION = [{"role": "user", "content": "Why?"}]


@pytest.fixture
def chatting(tokenizer):
    """A tokenizer with a template and a token that only the template writes."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = TEMPLATE
    changed.add_tokens([MARK], special_tokens=True)
    return changed


def test_the_template_alone_writes_the_bos_token(chatting):
    tokens = render(chatting, QUESTION, reply=True)
    assert chatting.decode(tokens) == f"<|endoftext|>user: Why?{MARK}\nassistant: "
    assert tokens.count(chatting.bos_token_id) == 1


def test_without_a_template_the_error_says_what_to_use_instead(tokenizer):
    with pytest.raises(DatasetError, match=r"no chat template.*plain text, such as"):
        render(tokenizer, QUESTION)


def test_a_template_that_refuses_a_dialog_is_named_with_its_reason(chatting):
    chatting.chat_template = "{{ raise_exception('only tools') }}"
    with pytest.raises(DatasetError, match=r"a dialog of user: .*only tools"):
        render(chatting, QUESTION)


def test_every_window_starts_at_a_dialog_and_runs_into_those_after_it():
    dialogs = [[10, 11, 12], [20, 21], [30, 31, 32, 33, 34, 35], [40, 41, 42, 43]]
    assert window_starts(dialogs, 4) == [0, 5, 11]
    windows = dialog_windows(dialogs, 3, 4)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[10, 11, 12, 20], [30, 31, 32, 33], [40, 41, 42, 43]]
    assert dialog_windows(dialogs, 2, 4).tolist() == windows[::2].tolist()


def test_few_dialogs_overlap_with_a_warning_and_too_few_are_refused():
    dialogs = [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
    with pytest.warns(UserWarning, match="fill 1 windows of 5, so the 2 windows over"):
        windows = dialog_windows(dialogs, 2, 5)
    assert windows[:, 0].tolist() == [10, 20]
    with pytest.raises(DatasetError, match="3 dialogs of 9 tokens together are too"):
        dialog_windows(dialogs, 3, 5)
    with pytest.raises(DatasetError, match="5 dialogs of 12 tokens together are too"):
        dialog_windows([[], *dialogs, [40, 41, 42]], 4, 6)


def test_few_long_dialogs_fill_further_windows(recwarn):
    dialogs = [list(range(10, 20)), list(range(20, 25))]
    assert window_starts(dialogs, 4) == [0, 10]
    assert dialog_windows(dialogs, 2, 4)[:, 0].tolist() == [10, 20]
    assert window_starts(dialogs, 4, continued=True) == [0, 4, 10]
    assert dialog_windows(dialogs, 3, 4)[:, 0].tolist() == [10, 14, 20]
    assert not recwarn.list
    with pytest.warns(UserWarning, match="fill 3 windows of 4, so the 4 windows over"):
        windows = dialog_windows(dialogs, 4, 4)
    assert windows[:, 0].tolist() == [10, 14, 18, 20]


def test_short_dialogs_are_never_continued():
    assert window_starts([[0] * 3] * 4, 4, continued=True) == [0, 6]


def test_a_window_that_continues_a_dialog_begins_as_dialogs_do():
    dialogs = [[1, *range(10, 19)], [1, *range(20, 24)]]
    windows = dialog_windows(dialogs, 3, 4)
    assert windows.tolist() == [[1, 10, 11, 12], [1, 14, 15, 16], [1, 20, 21, 22]]


def test_rendered_dialogs_are_recognized_among_plain_text(chatting):
    plain = calibration_windows(["some words here and there. " * 9] * 3, chatting, 2, 9)
    rendered = torch.tensor([render(chatting, QUESTION)])
    assert not contains_dialogs(plain, chatting)
    assert contains_dialogs(rendered, chatting)


def test_prompts_for_evaluation_are_about_other_subjects():
    assert len(set(PROMPTS)) == len(PROMPTS) > 300
    assert len(set(EVALUATION_PROMPTS)) == len(EVALUATION_PROMPTS) == 32
    assert not set(PROMPTS) & set(EVALUATION_PROMPTS)
    held_out = " ".join(EVALUATION_PROMPTS).lower()
    assert [s for s in SUBJECTS if re.search(rf"\b{s}\b", held_out)] == []
