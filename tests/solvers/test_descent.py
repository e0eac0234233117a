import math

import pytest
import torch

from llmc_attnmask.calibration.micro_batches import MicroBatch
from llmc_attnmask.solvers.descent import (
    Derivative,
    DescentSettings,
    descend,
    non_finite,
)

SETTINGS = DescentSettings(steps=40, batch_size=2, seed=0)
MICRO_BATCHES = [MicroBatch(i, 1, (i,)) for i in range(6)]


def to_the_origin(weight: torch.Tensor):
    """|W|^2, differentiated at 2 W: the chain rule leads back to W."""

    def differentiate(_: list[MicroBatch], __: float) -> Derivative:
        with torch.enable_grad():
            doubled = 2 * weight
        return Derivative(
            weight.square().sum().item(), [doubled], [doubled.detach() / 2]
        )

    return differentiate


def test_learning_rates_decay_from_their_peaks_as_a_cosine():
    weight = torch.tensor([1e3, -1e3])
    steps = []
    before = weight.clone()

    def after_step(_: int, __: float) -> bool:
        steps.append((before - weight.detach()).abs())
        before.copy_(weight.detach())
        return False

    assert (
        descend(
            [(weight, 0.1)], MICRO_BATCHES, to_the_origin(weight), SETTINGS, after_step
        )
        is None
    )
    # a steady gradient: Adam's steps are the learning rates
    expected = [0.05 * (1 + math.cos(math.pi * i / 40)) for i in range(40)]
    found = torch.stack(steps).mean(-1)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0.02, atol=1e-3)


def test_the_callback_sees_every_loss_and_may_end_the_descent():
    weight = torch.ones(2)
    seen = []

    def after_step(step: int, loss: float) -> bool:
        seen.append((step, loss))
        return step == 2

    descend([(weight, 0.1)], MICRO_BATCHES, to_the_origin(weight), SETTINGS, after_step)
    assert [step for step, _ in seen] == [0, 1, 2]
    losses = [loss for _, loss in seen]
    assert losses == sorted(losses, reverse=True) and losses[0] == 2


def test_a_loss_that_is_not_finite_ends_the_descent_before_its_step():
    weight = torch.ones(2)
    calls = 0

    def differentiate(batch: list[MicroBatch], progress: float) -> Derivative:
        nonlocal calls
        calls += 1
        found = to_the_origin(weight)(batch, progress)
        return found._replace(loss=math.nan) if calls == 3 else found

    fault = descend([(weight, 0.1)], MICRO_BATCHES, differentiate, SETTINGS)
    assert fault == "step 2: the loss is nan" and calls == 3
    assert weight.isfinite().all() and (weight < 1).all()


@pytest.mark.parametrize(
    ("loss", "gradient", "fault"),
    [
        (1.0, [0.0, 1.0], None),
        (math.nan, [0.0], "the loss is nan"),
        (1.0, [math.inf, math.nan, 0.0], "2 entries of the gradient"),
    ],
)
def test_what_is_not_finite_is_described(loss, gradient, fault):
    found = non_finite(loss, [torch.tensor(gradient)])
    assert found is None if fault is None else fault in found
