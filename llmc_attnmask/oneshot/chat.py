"""Ask a chat model questions."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmc_attnmask.text.generation import answers


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    most: int = 48,
) -> str:
    """Return the most likely answer, token by token, on one line.

    :param tokenizer: with a chat template
    :param most: tokens after which the answer is cut, which "..." then says
    """
    (dialog,) = answers(model, tokenizer, [question], most)
    text = tokenizer.decode(
        dialog.answer, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    words = str(text).split()
    return " ".join([*words, "..."] if dialog.cut else words)
