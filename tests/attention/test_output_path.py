import pytest
import torch

from llmc_attnmask.attention.capture import AttentionReplica, UnsupportedAttentionError
from llmc_attnmask.attention.output_path import check_output_path
from llmc_attnmask.attention.projections import find_projections
from llmc_attnmask.evaluation.attention_error import attention_inputs
from tests.support import architectures
from tests.support.architectures import Family, small_model


def check(family: str) -> None:
    model = small_model(family)
    inputs = attention_inputs(model, torch.randint(3, 64, (1, 9)))
    name, collected = next(iter(inputs.items()))
    replica = AttentionReplica(model.get_submodule(name))
    args, kwargs = collected.batch([0], replica.device, replica.dtype)
    before = replica(args, kwargs)
    try:
        check_output_path(
            replica, args, kwargs, find_projections(replica.module)["o"].child
        )
    finally:  # either way, the replica is unchanged
        assert torch.equal(replica(args, kwargs).query, before.query)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_attention_that_reaches_o_unchanged_is_accepted(family):
    check(family)


@pytest.mark.parametrize("family", ["bitnet", "diffllama"])
def test_attention_that_is_changed_before_o_is_refused(family, monkeypatch):
    monkeypatch.setitem(architectures.FAMILIES, family, Family("in between"))
    with pytest.raises(UnsupportedAttentionError, match="output_weight: 0"):
        check(family)
