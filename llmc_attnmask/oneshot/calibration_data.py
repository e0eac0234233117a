"""Prepare the calibration data of a run: texts, dialogs, the model's own answers.

Several datasets share the windows evenly. The model's own answers are sampled in
batches; each batch has a seed of its own, so it does not matter which process samples
it, or whether an earlier run has.
"""

import hashlib
import itertools
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmc_attnmask.distributed import gathered, is_source, rank, world_size
from llmc_attnmask.oneshot.loading import on_gpu
from llmc_attnmask.text.dataset import (
    BUILTIN,
    SELF,
    DatasetError,
    Messages,
    load_documents,
)
from llmc_attnmask.text.dialogs import (
    contains_dialogs,
    dialog_windows,
    has_template,
    render,
    window_starts,
)
from llmc_attnmask.text.generation import TEMPERATURE, TOP_P, answers
from llmc_attnmask.text.prompts import PROMPTS
from llmc_attnmask.text.windows import STREAM_TO_SAMPLE, calibration_windows

if TYPE_CHECKING:
    from llmc_attnmask.runlog.progress import Progress

Dataset = str | Path | Sequence[str | Path]

ANSWER = 192  # tokens that an answer has at most
_BATCH = 32  # dialogs that are sampled at once, at most
_USUAL_DIALOG = 128  # tokens, to sample no more than needed for a short run


class CalibrationData:
    """The calibration windows of a run, as far as they are known without the model.

    :param dataset: one or several, see ``load_documents``, or ``builtin:self``; None
        for the model's own answers and ``builtin:pydoc``, or for the latter alone if
        the model has no chat template
    :param text_column: key of the text in the rows of each
    :param count: windows in total
    :param length: tokens per window
    :param seed: of the model's own answers
    :raises DatasetError: if a dataset cannot be read or is too small, or the model has
        no chat template and is asked for its own answers
    """

    def __init__(
        self,
        dataset: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        text_column: str,
        count: int,
        length: int,
        seed: int,
    ):
        self.datasets = _chosen(dataset, tokenizer, count)
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        shares = _shares(count, self.datasets)
        self.sampled = sum(n for name, n in shares if name == SELF)  # windows
        if self.sampled:
            render(tokenizer, [{"role": "user", "content": PROMPTS[0]}], reply=True)
        self._chats = False  # whether any dataset consists of dialogs
        self._known = [
            None if name == SELF else self._read(name, text_column, n)
            for name, n in shares
        ]
        if not (self.sampled or self._chats) and has_template(tokenizer):
            self._warn_if_all_are_plain()

    def _read(self, name: str, text_column: str, count: int) -> Tensor:
        documents, are_dialogs = load_documents(name, text_column)
        if not are_dialogs:
            texts = cast(Iterator[str], documents)
            return calibration_windows(texts, self.tokenizer, count, self.length)
        self._chats = True
        messages = cast(Iterator[Messages], documents)
        dialogs = (render(self.tokenizer, dialog) for dialog in messages)
        most = count * self.length * STREAM_TO_SAMPLE
        return dialog_windows(_up_to(most, dialogs), count, self.length)

    def _warn_if_all_are_plain(self) -> None:
        known = (w for w in self._known if w is not None)
        try:
            plain = not any(contains_dialogs(w, self.tokenizer) for w in known)
        except DatasetError:  # no chat is possible with such a template anyway
            return
        if plain and is_source():
            warnings.warn(
                f"{self.tokenizer.name_or_path or 'the model'} has a chat template but "
                "is calibrated on plain text only, so it may forget how to chat; add "
                f"--dataset {SELF}",
                stacklevel=4,
            )

    @property
    def identity(self) -> bytes:
        """What identifies the data, apart from the model, the seed and the machine."""
        known = b"".join(w.numpy().tobytes() for w in self._known if w is not None)
        if not self.sampled and len(self._known) == 1:
            return known
        prompts = _digest_of_prompts(self.tokenizer) if self.sampled else None
        how = (self.sampled, self.length, ANSWER, TEMPERATURE, TOP_P, prompts)
        order = [name == SELF for name in self.datasets]
        return known + repr((order, how if self.sampled else None)).encode()

    def windows(self, model: PreTrainedModel, progress: "Progress") -> Tensor:
        """Return the windows, the same on every rank, of all datasets in turn.

        :param model: is asked for its own answers, unless an earlier run has them
        :return: int64 [windows, length]
        """
        parts = list(self._known)
        if self.sampled:
            with on_gpu(model):
                own = self._sampled(model, progress)
            parts = [own if part is None else part for part in parts]
        rounds = itertools.zip_longest(*(part for part in parts if part is not None))
        return torch.stack([w for turn in rounds for w in turn if w is not None])

    def _sampled(self, model: PreTrainedModel, progress: "Progress") -> Tensor:
        dialogs: list[list[int]] = []
        needed = self.sampled * self.length
        bar = tqdm(
            total=needed,
            desc=f"tokens of {SELF}",
            unit="",
            disable=None if is_source() else True,
        )
        batches = self._batches(model, progress)
        with bar:
            while len(window_starts(dialogs, self.length)) < self.sampled:
                batch = next(batches)
                dialogs += batch
                bar.update(min(sum(map(len, batch)), needed - bar.n))
        return dialog_windows(dialogs, self.sampled, self.length)

    def _batches(
        self, model: PreTrainedModel, progress: "Progress"
    ) -> Iterator[list[list[int]]]:
        """Yield batches of dialogs without end; ranks sample them in turn."""
        usual = math.ceil(self.sampled * self.length / _USUAL_DIALOG)
        size = min(_BATCH, usual)
        for first in itertools.count(0, world_size()):
            numbers = range(first, first + world_size())
            kept = gathered([progress.read_data(_name(n)) for n in numbers])[0]
            own = kept[rank()]
            if own is None:
                prompts, seed = _prompts(first + rank(), size, self.seed)
                sampled = answers(model, self.tokenizer, prompts, ANSWER, seed)
                own = [dialog.tokens for dialog in sampled]
            for number, batch in zip(numbers, gathered(own), strict=True):
                if kept[number - first] is None:
                    progress.save_data(_name(number), batch)
                yield batch


def _name(batch: int) -> str:
    return f"{batch:05d}"


def _digest_of_prompts(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the prompts as the chat template writes them."""
    rendered = [
        render(tokenizer, [{"role": "user", "content": prompt}], reply=True)
        for prompt in PROMPTS
    ]
    known = repr((rendered, tokenizer.eos_token_id))
    return hashlib.sha256(known.encode()).hexdigest()


def _chosen(
    dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[str]:
    """Return the names of the datasets, each once."""
    if not dataset:
        default = [SELF, BUILTIN] if has_template(tokenizer) else [BUILTIN]
        return default[: max(1, count)]
    names = [dataset] if isinstance(dataset, str | Path) else dataset
    return list(dict.fromkeys(map(str, names)))


def _shares(count: int, datasets: Sequence[str]) -> list[tuple[str, int]]:
    """Divide windows evenly; the first datasets get what is left over."""
    if count < len(datasets):
        raise DatasetError(
            f"num_samples is {count}, fewer than the {len(datasets)} datasets that "
            "share the windows; ask for at least one window each"
        )
    each, more = divmod(count, len(datasets))
    return [(name, each + (i < more)) for i, name in enumerate(datasets)]


def _prompts(batch: int, size: int, seed: int) -> tuple[list[str], int]:
    """Return the prompts of a batch and its seed.

    All prompts come once, in random order, before any comes again.
    """
    chosen = []
    for position in range(batch * size, (batch + 1) * size):
        turn, place = divmod(position, len(PROMPTS))
        order = random.Random(f"{seed} {turn}").sample(PROMPTS, len(PROMPTS))
        chosen.append(order[place])
    return chosen, random.Random(f"{seed} {batch}").getrandbits(63)


def _up_to(most: int, dialogs: Iterator[list[int]]) -> Iterator[list[int]]:
    """Yield dialogs until they have ``most`` tokens together."""
    tokens = 0
    for dialog in dialogs:
        yield dialog
        tokens += len(dialog)
        if tokens >= most:
            return
