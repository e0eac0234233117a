import pytest
import torch

from llmc_attnmask.attention.capture import AttentionReplica
from llmc_attnmask.attention.projections import find_projections
from llmc_attnmask.evaluation.attention_error import attention_inputs
from llmc_attnmask.solvers.attention_layer import AttentionLayer
from llmc_attnmask.solvers.matrix_objective import MatrixObjective
from llmc_attnmask.solvers.output_objective import OutputObjective


@pytest.fixture
def layer(random_llama):
    tokens = torch.randint(64, (16, 20), generator=torch.Generator().manual_seed(1))
    name, inputs = list(attention_inputs(random_llama, tokens).items())[1]
    replica = AttentionReplica(random_llama.get_submodule(name))
    return AttentionLayer(replica, inputs, find_projections(replica.module))


def objectives(layer):
    return {
        "q": MatrixObjective(layer, ["q"], output_weight=0.5),
        "k": MatrixObjective(layer, ["k"], output_weight=0.5),
        "v": OutputObjective(layer, ["v"], {}),
        "o": OutputObjective(layer, ["o"], {}),
    }


@pytest.mark.parametrize("role", ["q", "k", "v", "o"])
def test_only_the_dense_weights_have_no_error(layer, role):
    objective = objectives(layer)[role]
    dense = objective.layer.dense(role)
    assert objective.validation_error({role: dense}) < 1e-10
    assert objective.validation_error({role: dense * 0}) > 0.05


@pytest.mark.parametrize("role", ["q", "k", "v", "o"])
def test_the_curvature_predicts_the_error_of_small_changes(layer, role):
    objective = objectives(layer)[role]
    objective.validation = objective.micro_batches
    hessian, sensitivity = objective.curvature()[role]
    dense = objective.layer.dense(role)
    samples = len(objective.layer.inputs)
    if role in "qk":  # H and G are sums over the same tokens; the form is their product
        factor = 1 / (samples * 20)
    else:  # v's H is a sum over its heads
        factor = objective.weight / (4 if role == "v" else 1)
    if sensitivity is None:
        sensitivity = torch.eye(dense.shape[0])[None]
    generator = torch.Generator().manual_seed(0)
    predicted, measured = [], []
    for _ in range(24):
        change = 1e-3 * torch.randn(dense.shape, generator=generator)
        blocks = (change @ hessian).view(len(sensitivity), -1, change.shape[1])
        form = ((sensitivity @ blocks).view(change.shape) * change).sum()
        predicted.append(form.item() * factor / samples)
        measured.append(objective.validation_error({role: dense + change}))
    ratio = sum(measured) / sum(predicted)
    # Kronecker's factors treat a token's input and its weight as independent
    assert (0.4 < ratio < 2.5) if role != "o" else ratio == pytest.approx(1, rel=1e-2)


def test_the_output_objective_is_the_modules_own_output(layer, random_llama):
    objective = OutputObjective(layer, ["v", "o"], {})
    attention = random_llama.model.layers[1].self_attn
    validation = [
        i for micro_batch in objective.validation for i in micro_batch.samples
    ]
    args, kwargs = layer.inputs.batch(validation, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        dense = attention(*args, **kwargs)[0]
        changed = {role: objective.layer.dense(role) * 0.9 for role in ("v", "o")}
        for role in changed:
            attention.get_parameter(f"{role}_proj.weight").mul_(0.9)
        now = attention(*args, **kwargs)[0]
    expected = (now - dense).square().sum() / dense.square().sum()
    assert objective.validation_error(changed) == pytest.approx(
        expected.item(), rel=1e-4
    )
