"""Small models and data shared by the tests."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on CPU in tests

import hypothesis
import pytest
import torch
from loguru import logger
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.text.dataset import load_texts
from llmc_attnmask.text.windows import calibration_windows, evaluation_windows

# no timings in tests, and the same examples in every run
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fixed")


@pytest.fixture
def random_llama() -> LlamaForCausalLM:
    """Two layers, four query heads on two key-value heads, float32, eager."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # logits far from zero: a peaked softmax
        if parameter.ndim == 2:
            parameter.data.mul_(12)
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="session")
def calibration(tokenizer) -> Tensor:
    return calibration_windows(load_texts("builtin:pydoc"), tokenizer, 24, 128)


@pytest.fixture(scope="session")
def evaluation(tokenizer) -> Tensor:
    texts = load_texts("builtin:pydoc", split="evaluation")
    return evaluation_windows(texts, tokenizer, 256)


@pytest.fixture
def warnings():
    """The warnings logged during a test."""
    found: list[str] = []
    sink = logger.add(lambda m: found.append(m.record["message"]), level="WARNING")
    yield found
    logger.remove(sink)
