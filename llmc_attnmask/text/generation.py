"""Let a model answer prompts, many at once.

Prompts are padded on the left, so that every answer continues where its prompt ends.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmc_attnmask.text.dataset import DatasetError
from llmc_attnmask.text.dialogs import render

TEMPERATURE = 0.8
TOP_P = 0.95


@dataclass(frozen=True)
class Dialog:
    """A prompt, as the chat template renders it, and the model's answer."""

    tokens: list[int]
    start: int  # of the answer within the tokens
    cut: bool  # whether the answer had not ended at its limit

    @property
    def answer(self) -> list[int]:
        """The answer's tokens, with the one that ends it unless it was cut off."""
        return self.tokens[self.start :]


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    longest: int,
    seed: int | None = None,
) -> list[Dialog]:
    """Return a model's answers to prompts that it gets all at once.

    :param longest: most tokens of an answer, which is cut off there
    :param seed: of the samples, at temperature 0.8 and top-p 0.95; None for the most
        likely tokens. The same seed and the same prompts give the same answers on the
        same machine; other random numbers are not touched
    :raises DatasetError: if the model has no chat template, or no room for an answer
    """
    rendered = [
        render(tokenizer, [{"role": "user", "content": prompt}], reply=True)
        for prompt in prompts
    ]
    width = max(map(len, rendered))
    stop = _stop_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stop[0] if stop else 0
    padding = [width - len(tokens) for tokens in rendered]
    ids = [[pad] * n + tokens for n, tokens in zip(padding, rendered, strict=True)]
    mask = [[0] * n + [1] * (width - n) for n in padding]
    sampling = {"temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
    config = GenerationConfig(
        do_sample=seed is not None,
        max_new_tokens=min(longest, _room(model, width)),
        eos_token_id=stop or None,
        pad_token_id=pad,
        use_cache=True,
        **(sampling if seed is not None else {}),
    )
    # an offloaded model has no device of its own, and moves its inputs itself
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        _generating_by(model, config),
    ):
        torch.manual_seed(seed or 0)
        generated = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
        )
    found = [_until(row, stop) for row in generated[:, width:].tolist()]
    return [
        Dialog(tokens + answer, start=len(tokens), cut=answer[-1] not in stop)
        for tokens, answer in zip(rendered, found, strict=True)
    ]


@contextmanager
def _generating_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace a model's generation config, which would fill in what ours leaves out."""
    own, model.generation_config = model.generation_config, config
    try:
        with warnings.catch_warnings():
            # wrong for an offloaded model, whose hooks move the inputs
            warnings.filterwarnings("ignore", "You are calling .generate", UserWarning)
            yield
    finally:
        model.generation_config = own


def _room(model: PreTrainedModel, width: int) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or width + 4096
    if positions <= width:
        raise DatasetError(
            f"{model.config.name_or_path or 'the model'} has {positions} positions, "
            f"too few to answer a prompt of {width} tokens; calibrate it on plain text"
        )
    return positions - width


def _stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the tokens that end an answer, each once."""
    config = model.generation_config
    found = (config.eos_token_id if config else None) or []
    found = found if isinstance(found, list) else [found]
    if tokenizer.eos_token_id is not None:
        found = [*found, tokenizer.eos_token_id]
    return list(dict.fromkeys(found))


def _until(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Return the tokens up to the first that ends an answer, which is included."""
    end = next((i for i, token in enumerate(tokens, 1) if token in stop), len(tokens))
    return tokens[:end]
