"""Which algorithm each bucket of tokens gets from the library's search."""

import pytest
import torch

from llmc_attnmask.serving.kernels.cusparselt.engine import Engine
from tests.support.kernels.fake_cusparselt import (
    COLUMNS,
    ROWS,
    compressed_weight,
    multiply,
)

DEFAULT = {0: 0, 3: 1, 4: 1, 5: 0}  # settings of an algorithm
FOUND = {
    16: [(0, 3), (3, 4), (4, 2), (5, 3)],
    512: [(0, 2)],
}  # what the fake's search finds


def _settings(engine):
    """The algorithm of each bucket, as the library reports it."""
    (prepared,) = engine._prepared.values()
    return {n: plan._settings() for n, plan in prepared.plans.items()}


def test_neighboring_buckets_take_over_searched_algorithms(fake):
    engine = Engine(fake.library())
    engine.prepare(compressed_weight(engine), COLUMNS, largest=2048)
    assert fake.calls().count("MatmulSearch") == 4
    for tokens, found in _settings(engine).items():
        few = tokens < 256  # the fake's up to 128 tokens; 256 is as close to 512
        assert found == DEFAULT | dict(FOUND[16 if few else 512]), tokens


def test_a_split_gets_its_workspace_in_every_product(fake):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    engine.prepare(compressed, COLUMNS, largest=32)
    (prepared,) = engine._prepared.values()
    assert {plan.workspace_bytes for plan in prepared.plans.values()} == {4096}
    found = multiply(engine, compressed, 20)  # the fake refuses a missing workspace
    assert found.shape == (20, ROWS)


def test_no_search_unless_requested(fake):
    engine = Engine(fake.library())
    engine.prepare(compressed_weight(engine), COLUMNS, largest=512, search=False)
    assert "MatmulSearch" not in fake.calls()
    assert "MatmulAlgSetAttribute" not in fake.calls()


def test_the_time_for_searches_is_limited(fake):
    engine = Engine(fake.library(), search_seconds=1e-9)
    engine.prepare(compressed_weight(engine), COLUMNS, largest=512)
    assert fake.calls().count("MatmulSearch") == 1
    engine.prepare(compressed_weight(engine, torch.int8), COLUMNS, largest=16)
    assert fake.calls().count("MatmulSearch") == 1
    assert multiply(engine, compressed_weight(engine, torch.int8), 16).shape[0] == 16


def test_a_failed_search_leaves_the_default(fake, caplog):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    fake.fail("MatmulSearch", 6)
    engine.prepare(compressed, COLUMNS, largest=16)
    assert "The algorithm search" in caplog.text and "EXECUTION_FAILED" in caplog.text
    assert _settings(engine) == {16: DEFAULT}
    assert multiply(engine, compressed, 16).shape == (16, ROWS)


@pytest.mark.parametrize(
    ("function", "nth", "left"),
    [
        ("MatmulAlgSetAttribute", 2, {0: 3}),  # its split
        ("MatmulAlgSetAttribute", 4, {0: 3}),  # its buffers
        ("MatmulPlanInit", 2, {0: 3}),  # the search's own plan is the first
    ],
)
def test_a_bucket_that_refuses_a_split_keeps_the_configuration(
    fake, function, nth, left
):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    fake.fail(function, 10, nth)
    engine.prepare(compressed, COLUMNS, largest=32)
    assert _settings(engine) == {16: DEFAULT | left, 32: DEFAULT | dict(FOUND[16])}
    assert multiply(engine, compressed, 16).shape == (16, ROWS)


def test_a_bucket_that_refuses_the_configuration_takes_the_default(fake, monkeypatch):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    unknown = {16: ((0, 99), (3, 4))}  # the fake has four configurations
    monkeypatch.setattr(engine, "_search", lambda *_: unknown.items())
    engine.prepare(compressed, COLUMNS, largest=32)
    assert _settings(engine) == {16: DEFAULT, 32: DEFAULT}
    assert multiply(engine, compressed, 16).shape == (16, ROWS)


def test_a_setting_that_a_gpu_lacks_is_left_alone(fake):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    fake.fail("MatmulAlgGetAttribute", 10, nth=8)  # buffers, after the search
    engine.prepare(compressed, COLUMNS, largest=16)
    assert _settings(engine) == {16: {0: 3, 3: 4, 4: 2, 5: 0}}
