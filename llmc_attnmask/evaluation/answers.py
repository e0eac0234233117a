"""Compare a checkpoint with its reference on answers that the reference has given.

The answers are to prompts that calibration does not use. Every model reads the same
tokens, so the figures say how it would have continued the reference's own words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmc_attnmask.text.generation import Dialog, answers
from llmc_attnmask.text.prompts import EVALUATION_PROMPTS

ANSWER = 128  # tokens that an answer has at most
_BATCH = 16  # prompts that are answered at once


@dataclass(frozen=True)
class Agreement:
    """How close a model is to the reference on the reference's answers."""

    kl: float  # nats per answer token, from the reference's probabilities
    agreement: float  # share of answer tokens with the same most likely token
    tokens: int  # of all answers together


def reference_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = EVALUATION_PROMPTS,
    longest: int = ANSWER,
) -> list[Dialog]:
    """Return a model's most likely answers to prompts kept apart for evaluation.

    :param longest: most tokens of an answer
    :raises DatasetError: if the model has no chat template
    """
    found: list[Dialog] = []
    for first in tqdm(range(0, len(prompts), _BATCH), desc="answers", leave=False):
        batch = prompts[first : first + _BATCH]
        found += answers(model, tokenizer, batch, longest)
    return found


@torch.no_grad()
def agreement(
    reference: PreTrainedModel, model: PreTrainedModel, dialogs: Sequence[Dialog]
) -> Agreement:
    """Compare two models' next-token probabilities over the answers in dialogs.

    Only an answer's tokens count, not those of the prompt. Both models may be of any
    dtype and on different devices; probabilities are computed in float32.

    :param dialogs: from ``reference_answers``
    :raises ValueError: if the models have vocabularies of different sizes, or a
        model's logits are not finite
    """
    divergence, same, tokens = 0.0, 0, 0
    for dialog in tqdm(dialogs, desc="agreement", leave=False):
        expected, found = _logits(reference, dialog), _logits(model, dialog)
        if expected.shape != found.shape:
            raise ValueError(
                f"{_name(model)} has a vocabulary of {found.shape[-1]} tokens and the "
                f"reference one of {expected.shape[-1]}; answers can be compared only "
                "between models of one vocabulary"
            )
        found = found.to(expected.device)
        p, q = expected.log_softmax(-1), found.log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum(-1).double().sum().item()
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        tokens += len(expected)
    return Agreement(divergence / tokens, same / tokens, tokens)


def _logits(model: PreTrainedModel, dialog: Dialog) -> Tensor:
    """Return the logits of the answer's tokens, float32 [tokens, vocabulary]."""
    ids = torch.tensor([dialog.tokens[:-1]], device=model.device)
    kept = len(dialog.answer)
    output = model(input_ids=ids, use_cache=False, logits_to_keep=kept)
    logits = output.logits[0, -kept:].float()
    if not logits.isfinite().all():
        raise ValueError(
            f"the logits of {_name(model)} are not finite: its weights or activations "
            "overflow or are NaN"
        )
    return logits


def _name(model: PreTrainedModel) -> str:
    return model.config.name_or_path or "the model"
