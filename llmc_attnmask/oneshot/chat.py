"""Ask a chat model questions."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
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
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=False,
    )
    # the template has written the special tokens
    prompt = tokenizer([str(asked)], add_special_tokens=False, return_tensors="pt")
    prompt = prompt.to(model.device)
    end = tokenizer.eos_token_id
    output = model.generate(  # type: ignore[operator]
        **prompt,
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=end,
        pad_token_id=end,
    )[0, prompt["input_ids"].shape[1] :]
    text = tokenizer.decode(
        output, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    words = str(text).split()
    cut = len(output) == most and output[-1] != end
    return " ".join([*words, "..."] if cut else words)
