"""Out-of-memory errors are raised where they would occur: inside a module."""

import pytest
import torch

from llmc_attnmask.attention.capture import AttentionReplica
from llmc_attnmask.attention.projections import find_projections
from llmc_attnmask.calibration.memory import MicroBatchRunner
from llmc_attnmask.calibration.micro_batches import MicroBatch
from llmc_attnmask.evaluation.attention_error import attention_inputs
from llmc_attnmask.evaluation.perplexity import load_model
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.recovery.refine import RefineSettings, refine
from llmc_attnmask.solvers.attention_layer import AttentionLayer
from llmc_attnmask.solvers.matrix_objective import MatrixObjective
from tests.support.blocks import case_of


@pytest.fixture
def layer(calibration):
    model = load_model(MODEL_DIR)
    name, inputs = next(iter(attention_inputs(model, calibration[:, :64]).items()))
    replica = AttentionReplica(model.get_submodule(name))
    return AttentionLayer(replica, inputs, find_projections(replica.module))


def limit_memory(module: torch.nn.Module, samples: int) -> None:
    """Make a module run out of memory with more samples, as a small device would."""

    def hook(_: torch.nn.Module, args: tuple) -> None:
        if len(args[0]) > samples:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(args[0])} samples")

    module.register_forward_pre_hook(hook)


def test_too_little_memory_halves_the_batch_and_the_step_is_the_same(layer, warnings):
    objective = MatrixObjective(layer, ["q", "k"], output_weight=0.5)
    micro_batch = MicroBatch(0, 8, tuple(range(8)))
    weights = {role: objective.layer.dense(role) * 0.9 for role in ("q", "k")}
    error, gradients = objective.gradient([micro_batch], weights)
    limit_memory(layer.replica.module.q_proj, 3)
    for _ in range(2):
        short_error, short_gradients = objective.gradient([micro_batch], weights)
        assert short_error == pytest.approx(error, rel=1e-6)
        for role in weights:
            torch.testing.assert_close(short_gradients[role], gradients[role])
    assert len(warnings) == 2  # to four, then to two, which is remembered
    assert (
        "out of memory with 8 calibration samples at once; continuing with 4"
        in (warnings[0])
    )


def test_a_block_also_recovers_with_little_memory(calibration, warnings):
    errors = []
    for samples in (8, 1):
        case = case_of(load_model(MODEL_DIR), calibration[:16, :64])
        limit_memory(case.pruned.module.self_attn.q_proj, samples)
        settings = RefineSettings(
            steps=4, learning_rate=0.03, batch_size=8, attention_weight=0.0, seed=0
        )
        errors.append(refine(case, settings, "block").errors[-1])
    assert errors[1] == pytest.approx(errors[0], rel=1e-4) and warnings


def test_too_little_memory_for_a_single_sample_is_an_error_that_says_what_to_do():
    def run(samples: list[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryError, match=r"one calibration sample.*--max-length"):
        list(MicroBatchRunner()([MicroBatch(0, 4, (0, 1, 2, 3))], run))
