import pytest
import torch

from llmc_attnmask import AttentionMatrixPruningModifier
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.architectures import small_model, text_attention


@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen3_moe", "llama"])
def test_calibration_hides_the_future_as_the_model_does(family, tokenizer):
    model = small_model(family)
    model.config.name_or_path = str(MODEL_DIR)
    tokens = torch.randint(5, 2000, (1, 12))
    seen: list[torch.Tensor] = []

    def record(_, args, kwargs):
        seen.append(kwargs["attention_mask"])

    attention = next(iter(text_attention(model).values()))
    handle = attention.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        model(tokens, use_cache=False)
    modifier = AttentionMatrixPruningModifier(
        sparsity=0.5, mask_structure="2:4", steps=0
    )
    compress(model, tokenizer, [modifier], tokens)
    handle.remove()
    own, *calibration = seen
    assert own is not None
    for mask in calibration:
        assert torch.equal(mask, own)
