"""``llmc-attnmask bench`` on real checkpoints, in vLLM's environment."""

from pathlib import Path

import pytest
import torch
from processes import ENVIRONMENT, SPARSE

from llmc_attnmask.serving.bench import run
from llmc_attnmask.serving.kernels.cpu import machine

RIVALS = {
    "unstructured-packed": "UnquantizedLinearMethod",
    "int8-dense": "CompressedTensorsW8A8Int8 with CPUInt8ScaledMMLinearKernel",
}
DENSITY = {"unstructured-packed": 0.6, "int8-dense": 0.5}  # of down_proj


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (ENVIRONMENT | SPARSE).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run, "SECONDS", 0.5)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("name", DENSITY)
def test_every_kind_of_layer_is_timed_dense_and_sparse(
    checkpoints: Path, name: str
) -> None:
    found = run.bench(checkpoints / name)
    kinds = {kind.name: kind for kind in found.kinds}
    assert {name: kind.layers for name, kind in kinds.items()} == {
        "q_proj+k_proj+v_proj": 4,
        "o_proj": 4,
        "gate_proj+up_proj": 4,
        "down_proj": 4,
        "output layer": 1,
    }
    down = kinds["down_proj"]
    assert (down.rows, down.columns) == (192, 384)
    assert found.rival == RIVALS[name]
    for times in (*(kind.times for kind in kinds.values()), found.times):
        assert [time.tokens for time in times] == [1, 8, 64, 512]
    for which in ("dense_ms", "sparse_ms"):
        summed = sum(k.layers * getattr(k.times[0], which) for k in found.kinds)
        assert getattr(found.times[0], which) == pytest.approx(summed)
    if machine.lacks(machine.flags(), torch.int8, two_of_four=False):
        assert {kind.kernel for kind in found.kinds} == {"dense"}
        return
    assert down.kernel == "avx512"
    head = kinds["output layer"]
    assert head.dense_bytes == head.sparse_bytes > 0
    bit = 1 / 8 if name == "int8-dense" else 1 / 16  # per entry, of its bytes
    share = down.sparse_bytes / down.dense_bytes
    assert share == pytest.approx(DENSITY[name] + bit, rel=0.05)


@pytest.mark.usefixtures("environment")
def test_a_model_without_sparse_layers_has_nothing_to_gain(checkpoints: Path) -> None:
    with pytest.raises(ValueError, match=r"random: config.json names no sparse layers"):
        run.bench(checkpoints / "random")


@pytest.mark.usefixtures("environment")
def test_layers_that_stay_dense_keep_their_bytes(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_ATTNMASK_KERNEL", "dense")
    found = run.bench(checkpoints / "bf16-packed")
    assert {kind.kernel for kind in found.kinds} == {"dense"}
    assert found.sparse_bytes == found.dense_bytes > 0
