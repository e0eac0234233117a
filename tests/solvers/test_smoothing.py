import pytest
import torch
from torch import nn

from llmc_attnmask.solvers.smoothing import Place, places, smoothing_scales

WIDTH = 16


def rounding_error(inputs, weight, scales):
    """Return the bound on the squared error that these scales are to make least."""
    activations = (inputs / scales).square().sum()
    return activations * (weight * scales).square().sum()


def test_the_scales_make_the_rounding_error_least():
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(64, WIDTH, generator=generator) for _ in range(2))
    inputs *= torch.linspace(-2, 3, WIDTH).exp()  # channels of very different sizes
    scales = smoothing_scales(inputs.square().sum(0), [weight[:24], weight[24:]])
    least = rounding_error(inputs, weight, scales)
    assert least < 0.5 * rounding_error(inputs, weight, torch.ones(WIDTH))
    for channel in range(WIDTH):
        for factor in (0.9, 1.1):
            other = scales.clone()
            other[channel] *= factor
            assert rounding_error(inputs, weight, other) > least
    assert scales.log().mean().abs() < 1e-5


def test_channels_that_calibration_hardly_uses_or_nothing_reads_stay_moderate():
    squares, weight = torch.full((WIDTH,), 9.0), torch.ones(4, WIDTH)
    squares[0], squares[1], squares[2], weight[:, 2] = 0, 1e-20, 9e4, 0
    scales = smoothing_scales(squares, [weight])
    # a tenth of the median's root mean square; ten times the others, read like them
    torch.testing.assert_close(scales[:2], (scales[3] * 0.1**0.5).expand(2))
    torch.testing.assert_close(scales[2], scales[3] * 10)
    assert torch.equal(smoothing_scales(0 * squares, [weight]), torch.ones(WIDTH))
    assert torch.equal(smoothing_scales(squares, [0 * weight]), torch.ones(WIDTH))


class Block(nn.Module):
    """A block of an MLP, of which ``kind`` says how it is computed."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.down = nn.Linear(8, WIDTH)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        read = self.norm(states)
        gate, up = self.gate(read), self.up(read)
        inner = {
            "gated": lambda: nn.functional.silu(gate) * up,
            "relu": lambda: torch.relu(up),
            "clamped": lambda: nn.functional.silu(gate) * up.clamp(-1e4, 1e4),
            "gelu": lambda: nn.functional.gelu(up),
            "not reached": lambda: 0 * up,
            "read elsewhere": lambda: nn.functional.silu(gate) * up,
        }[self.kind]()
        stream = read if self.kind == "read elsewhere" else states
        return stream + self.down(inner)


NORM, UP = Place("norm", ("gate", "up")), Place("up", ("down",))


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("gated", [NORM, UP]),
        ("relu", [NORM, UP]),
        ("clamped", [NORM]),
        ("gelu", [NORM]),
        ("not reached", []),
        ("read elsewhere", [UP]),
    ],
)
@torch.no_grad()
def test_places_are_where_scaling_changes_nothing(kind, expected):
    torch.manual_seed(0)
    block = Block(kind)
    nn.init.normal_(block.norm.bias)
    block.norm.weight.uniform_(0.5, 2)
    block.norm.weight[4] = 400.0
    for linear in (block.gate, block.up):
        linear.weight[:, 4] = 3.0
    before = {k: v.clone() for k, v in block.state_dict().items()}
    states = torch.randn(2, 5, WIDTH)
    states[..., 3] = 5000.0  # what one channel holds must not hide the others
    states[0, 0, 4] = 1e5  # nor must one token, for which GELU is almost linear
    assert places(block, lambda: block(states)) == expected
    after = block.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_linears_of_excluded_modules_are_not_paired():
    torch.manual_seed(0)
    block = nn.Sequential(Block("gated"))
    states = torch.randn(2, 5, WIDTH)
    found = places(block, lambda: block(states), without=["0"])
    assert found == [Place("0.norm", ("0.gate", "0.up"))]


class Unusual(nn.Module):
    """A norm that returns two tensors, and a Linear called with a keyword."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.read = nn.Linear(WIDTH, 4)
        self.norm = nn.LayerNorm(WIDTH)
        self.norm.register_forward_hook(lambda _, args, output: (output, args[0]))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, states = self.norm(states)
        return self.read(input=normed), states


@torch.no_grad()
def test_unusual_calls_are_left_alone():
    block = Unusual()
    states = torch.randn(2, 5, WIDTH)
    assert places(block, lambda: block(states)) == []


class Leaking(Block):
    """Returns what its norm has made, too."""

    def forward(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"states": super().forward(states), "normed": self.norm(states)}


@torch.no_grad()
def test_everything_that_a_block_returns_has_to_stay():
    torch.manual_seed(0)
    block, states = Leaking("gated"), torch.randn(2, 5, WIDTH)
    assert places(block, lambda: block(states)) == [UP]
