"""What is asked of the library, when, and how long its objects live."""

import gc
from collections.abc import Iterator

import pytest
import torch

from llmc_attnmask.serving.kernels import cusparselt
from llmc_attnmask.serving.kernels.cusparselt import library
from llmc_attnmask.serving.kernels.cusparselt.engine import Engine
from llmc_attnmask.serving.kernels.cusparselt.library import (
    CuSparseLtError,
    Library,
    UnusableLibraryError,
)
from llmc_attnmask.serving.kernels.cusparselt.plans import Handle, Plan, Problem
from tests.support.compiler import shared_library
from tests.support.kernels.fake_cusparselt import SOURCE, Fake
from tests.support.kernels.matrices import DTYPES, random_2of4, random_values

ROWS, COLUMNS = 32, 64
PLAN = [  # the calls that make one plan
    "StructuredDescriptorInit",
    "DenseDescriptorInit",
    "DenseDescriptorInit",
    "MatmulDescriptorInit",
    "MatmulAlgSelectionInit",
    "MatmulPlanInit",
    "MatmulGetWorkspace",
]
END = [  # and those that end it
    "MatmulPlanDestroy",
    "MatmulAlgSelectionDestroy",
    *["MatDescriptorDestroy"] * 3,
]
DEFAULT = {0: 0, 3: 1, 4: 1, 5: 0}  # settings of an algorithm
FOUND = {16: [(0, 3), (3, 4), (4, 2), (5, 3)], 512: [(0, 2)]}  # by the fake's search


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fake")


@pytest.fixture
def fake(folder) -> Iterator[Fake]:
    torch.manual_seed(0)
    made = Fake(folder)
    yield made
    if made.live():
        gc.collect()  # an exception that a test looked at holds the frames it crossed
    assert made.live() == 0, "the test left objects of the library"


def compressed_weight(engine, dtype=torch.bfloat16):
    return engine.compress(random_2of4(ROWS, COLUMNS, dtype))


def multiply(engine, compressed, tokens):
    dtype = compressed.dtype
    x = random_values((tokens, COLUMNS), dtype)
    scales = (None, None)
    if dtype.itemsize == 1:
        scales = (torch.ones(ROWS), torch.ones(tokens))
    return engine.linear(x, compressed, *scales, None, torch.bfloat16)


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


def test_the_stream_is_handed_over(fake):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    engine.prepare(compressed, COLUMNS, largest=16, search=False)
    fake.reset()  # to a stream that does not exist
    multiply(engine, compressed, 16)
    assert fake.shared.fake_last_stream() is None  # CPU tensors have the default one


def test_compressing_takes_no_plan_and_leaves_only_the_handle(fake):
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


def test_a_plan_is_made_and_ended_in_order(fake):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    fake.reset()
    engine.prepare(compressed, COLUMNS, largest=16, search=False)
    assert fake.calls() == PLAN
    del engine
    assert fake.live() == 0
    assert fake.calls() == [*PLAN, *END, "Destroy"]


def test_eight_bits_ask_for_a_vector_of_scales_before_the_algorithm(fake):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine, torch.int8)
    fake.reset()
    engine.prepare(compressed, COLUMNS, largest=16, search=False)
    wanted = [*PLAN[:4], "MatmulDescSetAttribute", *PLAN[4:]]
    assert fake.calls() == wanted


def test_a_handle_outlives_its_plans(fake):
    handle = Handle(fake.library())
    problem = Problem(torch.device("cpu"), ROWS, COLUMNS, torch.float16)
    plan = Plan(handle, problem, 16)
    del handle
    assert fake.live() == 6 and "Destroy" not in fake.calls()
    del plan
    assert fake.live() == 0 and fake.calls()[-1] == "Destroy"


def test_layers_of_one_shape_and_type_share_plans_and_search(fake):
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
    assert fake.calls().count("MatmulPlanInit") == 1  # of the one bucket more
    assert "MatmulSearch" not in fake.calls()
    engine.prepare(compressed_weight(engine, torch.float16), COLUMNS, largest=16)
    assert fake.calls().count("MatmulSearch") == 1


def _settings(engine):
    """The algorithm of each bucket, as the library has it."""
    (prepared,) = engine._prepared.values()
    return {n: plan._settings() for n, plan in prepared.plans.items()}


def test_searched_algorithms_go_to_the_neighbours(fake):
    engine = Engine(fake.library())
    engine.prepare(compressed_weight(engine), COLUMNS, largest=2048)
    assert fake.calls().count("MatmulSearch") == 4
    for tokens, found in _settings(engine).items():
        few = tokens < 256  # the fake's, of 128 tokens; 256 is as near to 512
        assert found == DEFAULT | dict(FOUND[16 if few else 512]), tokens


def test_a_split_has_its_workspace_in_every_product(fake):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    engine.prepare(compressed, COLUMNS, largest=32)
    (prepared,) = engine._prepared.values()
    assert {plan.workspace_bytes for plan in prepared.plans.values()} == {4096}
    found = multiply(engine, compressed, 20)  # the fake refuses a missing one
    assert found.shape == (20, ROWS)


def test_no_search_unless_wanted(fake):
    engine = Engine(fake.library())
    engine.prepare(compressed_weight(engine), COLUMNS, largest=512, search=False)
    assert "MatmulSearch" not in fake.calls()
    assert "MatmulAlgSetAttribute" not in fake.calls()


def test_the_time_for_searches_ends(fake):
    engine = Engine(fake.library(), search_seconds=1e-9)
    engine.prepare(compressed_weight(engine), COLUMNS, largest=512)
    assert fake.calls().count("MatmulSearch") == 1
    engine.prepare(compressed_weight(engine, torch.int8), COLUMNS, largest=16)
    assert fake.calls().count("MatmulSearch") == 1
    assert multiply(engine, compressed_weight(engine, torch.int8), 16).shape[0] == 16


def test_a_search_that_fails_leaves_the_default(fake, caplog):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    fake.fail("MatmulSearch", 6)
    engine.prepare(compressed, COLUMNS, largest=16)
    assert "No search" in caplog.text and "EXECUTION_FAILED" in caplog.text
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


def test_a_bucket_that_refuses_even_that_takes_the_default(fake, monkeypatch):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    unknown = {16: ((0, 99), (3, 4))}  # the fake has four configurations
    monkeypatch.setattr(engine, "_search", lambda *_: unknown.items())
    engine.prepare(compressed, COLUMNS, largest=32)
    assert _settings(engine) == {16: DEFAULT, 32: DEFAULT}
    assert multiply(engine, compressed, 16).shape == (16, ROWS)


def test_a_setting_that_a_gpu_does_not_have_is_left_alone(fake):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    fake.fail("MatmulAlgGetAttribute", 10, nth=8)  # buffers, after the search
    engine.prepare(compressed, COLUMNS, largest=16)
    assert _settings(engine) == {16: {0: 3, 3: 4, 4: 2, 5: 0}}


@pytest.mark.parametrize("function", [*dict.fromkeys(PLAN), "MatmulDescSetAttribute"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_failure_leaves_no_half_made_plan(fake, function, nth):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine, torch.int8)
    live = fake.live()
    fake.fail(function, 2, nth)
    with pytest.raises(CuSparseLtError, match="ALLOC_FAILED; leave more memory free"):
        engine.prepare(compressed, COLUMNS, largest=32, search=False)
    assert fake.live() == live
    engine.prepare(compressed, COLUMNS, largest=32, search=False)  # it can be repeated
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
def test_a_failure_to_compress_leaves_nothing(fake, function):
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


def test_a_shape_that_the_library_does_not_take(fake):
    engine = Engine(fake.library())
    with pytest.raises(CuSparseLtError, match="NOT_SUPPORTED; the library does not"):
        engine.compress(torch.zeros(8, COLUMNS, dtype=torch.bfloat16))
    assert not cusparselt.fits(8, COLUMNS, 2)


def test_a_product_without_prepare_says_what_is_missing(fake):
    engine = Engine(fake.library())
    compressed = compressed_weight(engine)
    with pytest.raises(RuntimeError, match="32 x 64 in bfloat16 on cpu; call prepare"):
        multiply(engine, compressed, 3)


def test_version_0_7_has_larger_objects_and_one_function_less(folder):
    fake = Fake(folder, "-DMINOR=7")
    engine = Engine(fake.library())
    assert engine.library.version == "0.7.1"
    compressed = compressed_weight(engine, torch.float8_e4m3fn)
    engine.prepare(compressed, COLUMNS, largest=32)
    assert multiply(engine, compressed, 17).shape == (17, ROWS)
    del compressed, engine
    assert fake.live() == 0
    assert "MatmulAlgSelectionDestroy" not in fake.calls()


@pytest.mark.parametrize("version", [(0, 6, 3), (0, 5, 2), (1, 0, 0)])
def test_other_versions_are_refused(fake, version):
    fake.set_version(*version)
    with pytest.raises(UnusableLibraryError, match=r"0\.7 to below 1\.0; install"):
        fake.library()


@pytest.mark.parametrize("version", [(0, 7, 0), (0, 8, 1), (0, 10, 0)])
def test_these_versions_are_taken(fake, version):
    fake.set_version(*version)
    assert fake.library().version == ".".join(map(str, version))


def test_a_file_that_is_no_such_library(tmp_path):
    with pytest.raises(UnusableLibraryError, match="cannot load"):
        Library.load(tmp_path / "missing.so")


def test_only_a_copy_that_is_loaded_already_is_taken(folder, monkeypatch):
    name = "libfake_cusparselt.so.9"
    soname = f"-Wl,-soname,{name}"
    unloaded = shared_library(SOURCE, folder, soname)
    monkeypatch.setattr(library, "SONAME", str(unloaded))
    with pytest.raises(UnusableLibraryError, match=f"torch has not loaded {unloaded}"):
        Library.of_torch()
    fake = Fake(folder, soname)
    monkeypatch.setattr(library, "SONAME", name)
    assert Library.of_torch().version == "0.8.0"
    assert fake.calls() == ["GetProperty"] * 3  # of that very copy


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a GPU would change")
def test_a_machine_without_a_gpu():
    assert not cusparselt.available()
    assert cusparselt.version() is None
    assert cusparselt.why_not() == "torch sees no CUDA GPU"
