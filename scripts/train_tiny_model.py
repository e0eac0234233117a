"""Train the tiny model that the package ships on the standard library's docstrings.

    python scripts/train_tiny_model.py --output llmc_attnmask/builtin/model

At the end it prints the perplexity on held-out text and that of a unigram model.
The evaluation split is used neither for training nor for the tokenizer.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llmc_attnmask.evaluation.perplexity import perplexity
from llmc_attnmask.text.pydoc import documents
from llmc_attnmask.text.windows import evaluation_windows, token_stream

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
WINDOW = 256  # tokens


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[END_OF_TEXT]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def unigram_perplexity(train: Tensor, held_out: Tensor, vocabulary: int) -> float:
    """Return the perplexity of token frequencies alone, with add-one smoothing.

    A model has to be better than this.

    :param train: int64 token ids to count, any shape
    :param held_out: int64 token ids to predict, any shape
    """
    counts = torch.bincount(train.flatten(), minlength=vocabulary).double() + 1
    log_probability = (counts / counts.sum()).log()
    return math.exp(-log_probability[held_out].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    texts = documents("calibration")
    tokenizer = train_tokenizer(texts)
    train = token_stream(texts, tokenizer)
    held_out = evaluation_windows(documents("evaluation"), tokenizer, WINDOW)
    unigram = unigram_perplexity(train, held_out, VOCABULARY)
    print(f"{len(train)} tokens, held out {held_out.numel()}, unigram {unigram:.1f}")

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
        attention_dropout=0.1,
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    kept = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": kept, "weight_decay": 0}],
        betas=(0.9, 0.95),
    )
    start = time.perf_counter()
    for step in range(args.steps):
        offsets = torch.randint(len(train) - WINDOW, (args.batch_size,))
        batch = torch.stack([train[o : o + WINDOW] for o in offsets.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.peak_lr)
        optimizer.step()
        if step % 200 == 0 or step == args.steps - 1:
            seconds = time.perf_counter() - start
            print(f"step {step} loss {loss:.3f} {seconds:.0f} s", flush=True)
        if step % 250 == 249:
            model.eval()
            print(f"step {step} held out {perplexity(model, held_out):.2f}", flush=True)
            model.train()

    model.bfloat16()
    model.config.use_cache = True
    model.config.attention_dropout = 0.0
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    dense = perplexity(model.float().eval(), held_out)
    print(f"held out: {dense:.2f}, unigram {unigram:.2f}, ratio {unigram / dense:.2f}")


if __name__ == "__main__":
    main()
