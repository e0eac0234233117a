"""Which calls the library gets, when, and how long its objects live."""

import pytest
import torch

from llmc_attnmask.serving.kernels import cusparselt
from llmc_attnmask.serving.kernels.cusparselt.engine import Engine
from llmc_attnmask.serving.kernels.cusparselt.library import CuSparseLtError
from llmc_attnmask.serving.kernels.cusparselt.plans import Handle, Plan, Problem
from tests.support.kernels.fake_cusparselt import (
    COLUMNS,
    ROWS,
    compressed_weight,
    multiply,
)
from tests.support.kernels.matrices import DTYPES

PLAN = [  # the calls that create one plan
    "StructuredDescriptorInit",
    "DenseDescriptorInit",
    "DenseDescriptorInit",
    "MatmulDescriptorInit",
    "MatmulAlgSelectionInit",
    "MatmulPlanInit",
    "MatmulGetWorkspace",
]
END = [  # and those that destroy it
    "MatmulPlanDestroy",
    "MatmulAlgSelectionDestroy",
    *["MatDescriptorDestroy"] * 3,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_after_prepare_a_product_is_one_call_and_can_be_captured(fake, dtype):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine, dtype)
    engine.prepare(compressed, COLUMNS, largest=48)
    for tokens, launches in ((1, 1), (16, 1), (48, 1), (49, 2), (144, 3)):
        fake.reset()
        with fake.capturing():
            multiply(engine, compressed, tokens)
        assert fake.calls() == ["Matmul"] * launches


def test_the_current_stream_is_passed_on(fake):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    engine.prepare(compressed, COLUMNS, largest=16, search=False)
    fake.reset()  # to a stream that does not exist
    multiply(engine, compressed, 16)
    assert fake.shared.fake_last_stream() is None  # CPU tensors use the default stream


def test_compressing_needs_no_plan_and_leaves_only_the_handle(fake):
    engine = Engine(fake.library())
    fake.reset()
    compressed_weight(engine)
    assert fake.calls() == [
        "Init",
        "StructuredDescriptorInit",
        "SpMMACompressedSize2",
        "SpMMACompress2",
        "MatDescriptorDestroy",
    ]
    assert fake.live() == 1
    compressed_weight(engine)
    assert fake.calls().count("Init") == 1


def test_a_plan_is_created_and_destroyed_in_order(fake):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    fake.reset()
    engine.prepare(compressed, COLUMNS, largest=16, search=False)
    assert fake.calls() == PLAN
    del engine
    assert fake.live() == 0
    assert fake.calls() == [*PLAN, *END, "Destroy"]


def test_eight_bits_request_a_vector_of_scales_before_the_algorithm(fake):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine, torch.int8)
    fake.reset()
    engine.prepare(compressed, COLUMNS, largest=16, search=False)
    expected = [*PLAN[:4], "MatmulDescSetAttribute", *PLAN[4:]]
    assert fake.calls() == expected


def test_a_handle_outlives_its_plans(fake):
    handle = Handle(fake.library())
    problem = Problem(torch.device("cpu"), ROWS, COLUMNS, torch.float16)
    plan = Plan(handle, problem, 16)
    del handle
    assert fake.live() == 6 and "Destroy" not in fake.calls()
    del plan
    assert fake.live() == 0 and fake.calls()[-1] == "Destroy"


def test_layers_of_the_same_shape_and_type_share_plans_and_search(fake):
    engine = Engine(fake.library())
    first = compressed_weight(engine)
    engine.prepare(first, COLUMNS, largest=64)
    live = fake.live()
    fake.reset()
    second = compressed_weight(engine)
    fake.reset()
    engine.prepare(second, COLUMNS, largest=64)
    engine.prepare(second, COLUMNS, largest=20)
    assert fake.calls() == [] and fake.live() == live
    engine.prepare(second, COLUMNS, largest=80)
    assert fake.calls().count("MatmulPlanInit") == 1  # for the additional bucket
    assert "MatmulSearch" not in fake.calls()
    engine.prepare(compressed_weight(engine, torch.float16), COLUMNS, largest=16)
    assert fake.calls().count("MatmulSearch") == 1


@pytest.mark.parametrize("function", [*dict.fromkeys(PLAN), "MatmulDescSetAttribute"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_failure_leaves_no_incomplete_plan(fake, function, nth):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine, torch.int8)
    live = fake.live()
    fake.fail(function, 2, nth)
    with pytest.raises(CuSparseLtError, match="ALLOC_FAILED; leave more memory free"):
        engine.prepare(compressed, COLUMNS, largest=32, search=False)
    assert fake.live() == live
    # the call can be repeated
    engine.prepare(compressed, COLUMNS, largest=32, search=False)
    assert multiply(engine, compressed, 17).shape == (17, ROWS)


@pytest.mark.parametrize("status", range(1, 13))
def test_every_status_has_a_name_and_advice(fake, status):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    engine.prepare(compressed, COLUMNS, largest=16, search=False)
    fake.fail("Matmul", status)
    with pytest.raises(CuSparseLtError) as raised:
        multiply(engine, compressed, 3)
    assert (raised.value.function, raised.value.status) == ("cusparseLtMatmul", status)
    text = str(raised.value)
    del raised  # and with it this frame, which holds the engine
    assert text.startswith("cusparseLtMatmul of cuSPARSELt 0.8.0: ")
    assert ("CUSPARSE_STATUS_" in text) == (status < 12)
    assert len(text.partition("; ")[2]) > 20


@pytest.mark.parametrize("function", ["Init", "SpMMACompressedSize2", "SpMMACompress2"])
def test_a_failure_to_compress_leaves_no_objects(fake, function):
    engine = Engine(fake.library())
    fake.fail(function, 1)
    with pytest.raises(CuSparseLtError, match="NOT_INITIALIZED; check with nvidia-smi"):
        compressed_weight(engine)
    assert fake.live() == (function != "Init")
    compressed_weight(engine)


def test_a_destructor_that_fails_is_logged(fake, caplog):
    engine = Engine(fake.library())
    engine.prepare(compressed_weight(engine), COLUMNS, largest=16, search=False)
    fake.fail("Destroy", 7)
    del engine
    assert fake.live() == 1
    assert "cusparseLtDestroy of cuSPARSELt 0.8.0" in caplog.text
    fake.forget()


def test_a_shape_that_the_library_does_not_support_is_refused(fake):
    engine = Engine(fake.library())
    with pytest.raises(CuSparseLtError, match="NOT_SUPPORTED; the library does not"):
        engine.compress(torch.zeros(8, COLUMNS, dtype=torch.bfloat16))
    assert not cusparselt.fits(8, COLUMNS, 2)


def test_a_product_without_prepare_says_what_is_missing(fake):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    with pytest.raises(RuntimeError, match="32 x 64 in bfloat16 on cpu; call prepare"):
        multiply(engine, compressed, 3)
