import torch

from llmc_attnmask.evaluation.attention_error import attention_errors
from llmc_attnmask.evaluation.perplexity import load_model, perplexity
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.text.dataset import load_texts
from llmc_attnmask.text.windows import token_stream
from scripts.train_tiny_model import unigram_perplexity


def test_the_shipped_model_is_a_small_llama_with_gqa():
    config = load_model(MODEL_DIR).config
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 4_000_000


def test_the_shipped_models_perplexity_is_meaningful(tokenizer, evaluation):
    """It is far below a unigram model's, and magnitude pruning visibly raises it."""
    train = token_stream(load_texts("builtin:pydoc"), tokenizer)
    unigram = unigram_perplexity(train, evaluation, tokenizer.vocab_size)
    dense = load_model(MODEL_DIR)
    reached = perplexity(dense, evaluation)
    assert reached <= unigram / 4

    pruned = load_model(MODEL_DIR)
    two_of_four = MaskStructure.parse("2:4")
    with torch.no_grad():
        for name, weight in pruned.named_parameters():
            if "_proj" in name:
                weight.masked_fill_(~two_of_four.mask(weight.abs(), 0.5), 0.0)
    assert perplexity(pruned, evaluation) >= 1.15 * reached
    errors = attention_errors(dense, pruned, evaluation[:8])
    assert min(errors.values()) > 0.005
