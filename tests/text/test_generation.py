import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc_attnmask.text.dataset import DatasetError
from llmc_attnmask.text.generation import answers
from tests.support.chat import chat_model

PROMPTS = [
    "Return the sum.",
    "What is a list of numbers, and what is it used for?",
    "x",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def chatting(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_a_prompt_gets_the_same_answer_alone_and_among_longer_ones(model, chatting):
    together = answers(model, chatting, PROMPTS, 24)
    alone = [answers(model, chatting, [prompt], 24)[0] for prompt in PROMPTS]
    assert together == alone
    assert all(0 < len(dialog.answer) <= 24 for dialog in together)


@torch.no_grad()
def test_greedy_answers_are_the_most_likely_tokens(model, chatting):
    (dialog,) = answers(model, chatting, PROMPTS[:1], 8)
    logits = model(torch.tensor([dialog.tokens])).logits[0]
    likely = logits[dialog.start - 1 : -1].argmax(-1)
    assert likely.tolist() == dialog.answer


def test_the_seed_alone_decides_about_samples(model, chatting):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = answers(model, chatting, PROMPTS, 16, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert answers(model, chatting, PROMPTS, 16, seed=1) == first
    assert answers(model, chatting, PROMPTS, 16, seed=2) != first


def test_the_models_own_generation_settings_change_nothing(model, chatting):
    plain = answers(model, chatting, PROMPTS, 16)
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.max_length = 5.0, 1, 3
    assert answers(model, chatting, PROMPTS, 16) == plain
    assert model.generation_config is own


def test_an_answer_ends_with_the_first_token_that_ends_it(model, chatting):
    (free,) = answers(model, chatting, PROMPTS[:1], 16)
    model.generation_config.eos_token_id = [1, free.answer[4]]
    (dialog,) = answers(model, chatting, PROMPTS[:1], 16)
    end = free.answer.index(free.answer[4])
    assert dialog.answer == free.answer[: end + 1]


def test_a_model_without_room_for_an_answer_is_refused(model, chatting):
    model.config.max_position_embeddings = 8
    with pytest.raises(DatasetError, match="8 positions, too few to answer a prompt"):
        answers(model, chatting, PROMPTS, 16)
