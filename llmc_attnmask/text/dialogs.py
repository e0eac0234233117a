"""Render dialogs with a model's chat template, and cut them into token windows.

Every window starts where a dialog starts and is filled up with the dialogs after it, so
it begins as a chat does; only if dialogs are few and long do windows continue them. The
template alone decides about the bos token.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmc_attnmask.text.dataset import DatasetError, Messages


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer comes with a chat template."""
    return bool(tokenizer.chat_template)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, reply: bool = False
) -> list[int]:
    """Return a dialog's tokens, as the tokenizer's chat template writes it.

    :param messages: each with ``role`` and ``content``
    :param reply: whether to end with the start of the model's next answer
    :raises DatasetError: if there is no template, or it refuses the messages
    """
    name = tokenizer.name_or_path or "the model"
    if not has_template(tokenizer):
        raise DatasetError(
            f"{name} has no chat template, so there are no dialogs for it; calibrate "
            "it on plain text, such as builtin:pydoc or a .jsonl file"
        )
    try:
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=reply, return_dict=False
        )
    except Exception as error:  # of any kind: templates are other people's code
        raise DatasetError(
            f"the chat template of {name} refuses a dialog of "
            f"{' and '.join(str(m.get('role')) for m in messages[:3])}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return cast(list[int], tokens)


def contains_dialogs(windows: Tensor, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether windows have tokens that only the chat template writes.

    :param windows: int64 [windows, length]
    :raises DatasetError: if the template refuses a dialog of one question and answer
    """
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    marks = set(render(tokenizer, messages)) & {*tokenizer.added_tokens_decoder}
    marks.discard(tokenizer.bos_token_id)  # also written before plain text
    if not marks:
        return False
    return bool(torch.isin(windows, torch.tensor(sorted(marks))).any())


def dialog_windows(dialogs: Iterable[Sequence[int]], count: int, length: int) -> Tensor:
    """Return ``count`` windows, equally spaced over the dialogs.

    If too few windows can start at a dialog without overlap, further ones continue the
    dialogs that are longer than a window; their first token gives way to the one that
    all dialogs begin with, such as bos. If there are too few of these as well, windows
    overlap, and a warning says so.

    :param dialogs: the tokens of each
    :return: int64 [count, length]
    :raises DatasetError: if there are too few dialogs for that many different windows
    """
    dialogs = list(dialogs)
    stream = torch.tensor([token for d in dialogs for token in d], dtype=torch.long)
    starts = window_starts(dialogs, length)
    if len(starts) < count:
        starts = window_starts(dialogs, length, continued=True)
    if (found := len(starts)) < count:
        starts, place = [], 0
        for dialog in dialogs:
            # a dialog longer than a window has several
            starts += range(place, place + len(dialog), length)
            place += len(dialog)
        starts = [start for start in starts if start + length <= len(stream)]
        if len(starts) < count:
            raise DatasetError(
                f"{len(dialogs)} dialogs of {len(stream)} tokens together are too few "
                f"for {count} different windows of {length}; give more dialogs or ask "
                "for fewer windows"
            )
        warnings.warn(
            f"{len(dialogs)} dialogs fill {found} windows of {length}, so the {count} "
            "windows overlap; give more dialogs or ask for fewer windows",
            stacklevel=2,
        )
    chosen = torch.linspace(0, len(starts) - 1, count).long().tolist()
    windows = torch.stack([stream[starts[i] : starts[i] + length] for i in chosen])
    if len(first := {dialog[0] for dialog in dialogs if dialog}) == 1:
        windows[:, 0] = first.pop()
    return windows


def window_starts(
    dialogs: Sequence[Sequence[int]], length: int, continued: bool = False
) -> list[int]:
    """Return where windows start that do not overlap, in tokens from the first dialog.

    :param continued: whether the rest of a long dialog fills further windows; otherwise
        it is left out, so that every window starts at a dialog
    """
    starts, start, place = [], 0, 0
    for dialog in dialogs:
        place += len(dialog)
        if place - start >= length:
            starts.append(start)
            if continued:
                starts += range(start + length, place - length + 1, length)
            start = place
    return starts
