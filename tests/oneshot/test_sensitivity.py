import pytest
import torch

from llmc_attnmask.checkpoint.linears import served_groups
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.sensitivity import Loss, Sensitivity
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.upstream.baselines import baselines

STRUCTURE = MaskStructure.parse("2:4")
GROUPS = served_groups(
    [
        f"model.layers.{layer}.{child}_proj"
        for layer in (1, 3)
        for child in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down")
    ]
)
QKV, DOWN = list(GROUPS)[:2]  # of layer 1


def model():
    return load(MODEL_DIR, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def sensitivity(calibration) -> Sensitivity:
    windows = (calibration[:12], calibration[12:16])
    return Sensitivity(model(), *windows, GROUPS, STRUCTURE, torch.device("cpu"))


@torch.no_grad()
def direct(calibration, names) -> Loss:
    """Losses, on every other token, of a model with some Linears pruned.

    They are pruned on what they read in the dense model.
    """
    pruned = model()
    hessians, handles = {}, []
    for name in names:

        def add(_, args, name=name):
            inputs = args[0].flatten(0, -2)
            hessians[name] = hessians.get(name, 0) + inputs.T @ inputs

        linear = pruned.get_submodule(name)
        handles.append(linear.register_forward_pre_hook(add))
    pruned(calibration[:12])
    for handle in handles:
        handle.remove()
    for name in names:
        weight = pruned.get_parameter(f"{name}.weight")
        sparsegpt = baselines(STRUCTURE, 0.5)["SparseGPT"]
        weight.copy_(sparsegpt(weight.clone(), hessians[name]))
    held_out = calibration[12:16]
    return loss(pruned, held_out)


@torch.no_grad()
def loss(pruned, held_out) -> Loss:
    p, q = (m(held_out).logits.log_softmax(-1)[:, ::2] for m in (model(), pruned))
    words = held_out[:, 1::2, None]
    rise = (p - q)[:, : words.shape[1]].gather(-1, words)
    return Loss((p.exp() * (p - q)).sum(-1).mean().item(), rise.mean().item())


def test_a_group_costs_the_divergence_of_the_model_with_it_alone_pruned(
    sensitivity, calibration
):
    costs = dict(sensitivity.costs([0.5], {}))
    assert list(costs) == [f"model.layers.{n}" for n in range(4)]
    assert not costs["model.layers.0"] and not costs["model.layers.2"]
    found = costs["model.layers.1"]
    assert list(found) == [QKV, DOWN]
    for group in (QKV, DOWN):
        expected = direct(calibration, GROUPS[group])
        # products in bfloat16 round differently in each run
        assert found[group][0.5] == pytest.approx(expected.kl, rel=0.03, abs=1e-4)


def test_groups_pruned_together_cost_what_the_whole_model_loses(
    sensitivity, calibration
):
    choices = [dict.fromkeys(GROUPS, 0.5), dict.fromkeys(GROUPS, 0.0)]
    everything, nothing = sensitivity.together(choices)
    names = [name for members in GROUPS.values() for name in members]
    expected = direct(calibration, names)
    assert everything.kl == pytest.approx(expected.kl, rel=0.03)
    assert everything.rise == pytest.approx(expected.rise, rel=0.1, abs=1e-3)
    assert nothing.kl == pytest.approx(0.0, abs=1e-6)


def test_other_weights_lose_what_a_model_with_them_does(sensitivity, calibration):
    pruned, weights = model(), {}
    for name in [name for members in GROUPS.values() for name in members]:
        weight = pruned.get_parameter(f"{name}.weight").data
        weight[:, ::2] = 0
        weights[name] = weight.clone()
    found, expected = sensitivity.of_weights(weights), loss(pruned, calibration[12:16])
    assert found.kl == pytest.approx(expected.kl, rel=0.03)
    assert found.rise == pytest.approx(expected.rise, rel=0.03)


def test_more_sparsity_costs_more(calibration):
    unstructured = Sensitivity(
        model(),
        calibration[:12],
        calibration[12:16],
        GROUPS,
        MaskStructure.parse("0:0"),
        torch.device("cpu"),
    )
    for costs in dict(unstructured.costs([0.5, 0.7], {})).values():
        for of in costs.values():
            assert 0 < of[0.5] < of[0.7]


def test_blocks_that_are_known_are_not_measured_again(sensitivity):
    known = {"model.layers.1": {QKV: {0.5: 42.0}}}
    costs = dict(sensitivity.costs([0.5], known))
    assert costs["model.layers.1"] == known["model.layers.1"]
    assert 0 < costs["model.layers.3"][list(GROUPS)[2]][0.5] < 1
