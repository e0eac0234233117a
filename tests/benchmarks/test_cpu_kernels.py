import pytest

from integration.benchmarks import cpu_kernels


def row(tokens: int, ratio: float, name: str = "bf16") -> dict:
    figures = {"seconds": 0.001, "bytes": 5_000_000, "ratio": ratio}
    kinds = dict.fromkeys(["dense", *cpu_kernels.KINDS], figures)
    return {"type": name, "shape": [64, 32], "tokens": tokens, "read": 4e9} | kinds


def test_ratios_are_written_from_the_slowest_shape_to_the_fastest():
    rows = [row(1, 1.5), row(1, 2.25), row(16, 1.2), row(1, 1.1, "int8")]
    lines = cpu_kernels.markdown(rows).splitlines()
    assert lines[0] == "| type | tokens | 2:4 | 50 % | 60 % | 70 % |"
    assert lines[2] == "| bf16 | 1 | " + " | ".join(["1.50 to 2.25"] * 4) + " |"
    assert lines[3] == "| bf16 | 16 | " + " | ".join(["1.20"] * 4) + " |"
    assert lines[4] == "| int8 | 1 | " + " | ".join(["1.10"] * 4) + " |"


def test_bandwidth_is_that_of_one_token():
    lines = cpu_kernels.bandwidth([row(1, 1.5), row(16, 1.2)]).splitlines()
    assert lines[2:] == ["| bf16 | 64 x 32 | 4.0 | " + " | ".join(["5.0"] * 5) + " |"]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", list(cpu_kernels.KINDS))
def test_weights_have_the_zeros_of_their_kind(kind, int8):
    weight = cpu_kernels.weight_of(256, 512, kind, int8, seed=0)
    share = cpu_kernels.KINDS[kind]
    zeros = (weight == 0).float()
    if share is None:
        assert (zeros.view(-1, 4).sum(-1) == 2).all()
    else:
        assert float(zeros.mean()) == pytest.approx(share, abs=0.01)
