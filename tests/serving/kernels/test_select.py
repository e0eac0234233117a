from dataclasses import replace

import pytest
import torch

from llmc_attnmask.serving.kernels import select
from llmc_attnmask.serving.kernels.cpu import library

LAYER = select.Layer(4096, 4096, torch.bfloat16, True, "16-bit")
HOPPER = select.Machine("cuda", (9, 0), nvrtc=True, triton=True, cusparselt=True)
CPU = select.Machine("cpu", None, nvrtc=False, triton=False, cusparselt=False)
FLAGS = "avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512_vnni avx512_vbmi2"
AVX512 = replace(CPU, flags=frozenset(FLAGS.split()))
INT8 = {"dtype": torch.int8, "activations": "8-bit per token"}
EIGHT = {"dtype": torch.float8_e4m3fn, "activations": "8-bit per token"}


def test_few_and_many_tokens_get_different_kernels():
    choice = select.choose(LAYER, HOPPER)
    assert (choice.few, choice.many) == ("cuda", "cusparselt")
    assert choice.label == "cuda to 64 tokens, then cusparselt"


@pytest.mark.parametrize(
    ("layer", "machine", "reason"),
    [
        ({}, CPU, "this CPU lacks avx512f, avx512bw, avx512vl, avx512dq, avx512_bf16"),
        ({"dtype": torch.float16}, AVX512, "no sparse kernel for float16 on CPUs"),
        (EIGHT, AVX512, "no sparse kernel for float8_e4m3fn on CPUs"),
        ({"model_dtype": torch.float16}, AVX512, "for float16 on CPUs"),
        ({"activations": "other"}, AVX512, "quantization of activations"),
        ({"columns": 4098}, AVX512, "4098 inputs on this rank, not a multiple of 4"),
        (INT8 | {"columns": 65540}, AVX512, "65540 inputs, more than 65536"),
        ({}, replace(AVX512, flags=AVX512.flags | {"amx_tile"}), "with AMX"),
        ({"two_of_four": False}, HOPPER, "not all of its parts are 2:4"),
        ({"dtype": torch.float32}, HOPPER, "no sparse kernel for float32"),
        ({"activations": "other"}, HOPPER, "quantization of activations"),
        ({"columns": 4100}, HOPPER, "not a multiple of 8"),
        ({"rows": 64}, HOPPER, "too small: 64 x 4096"),
        ({"rows": 4104}, HOPPER, "cuSPARSELt does not support 4104 x 4096"),
        ({}, replace(HOPPER, capability=(7, 5)), "capability 7.5 is below 8.0"),
        ({}, replace(HOPPER, capability=(10, 0)), "capability 10.0 is untested"),
        (EIGHT, replace(HOPPER, capability=(8, 6)), "capability 8.6 is below 8.9"),
        (
            EIGHT,
            HOPPER,
            "8-bit kernels are unmeasured; set LLMC_ATTNMASK_KERNEL=sparse",
        ),
        ({}, replace(HOPPER, cusparselt=False), "cuSPARSELt is not available"),
        ({}, replace(HOPPER, nvrtc=False), "cuda-bindings is not available"),
    ],
)
def test_every_other_layer_is_dense_with_a_reason(layer, machine, reason):
    choice = select.choose(replace(LAYER, **layer), machine)
    assert not choice.sparse
    assert reason in choice.reason


def test_a_requested_kernel_is_used_where_it_is_only_unmeasured():
    blackwell = replace(HOPPER, capability=(10, 0), cusparselt=False)
    for requested in ("triton", "cuda"):
        choice = select.choose(LAYER, blackwell, requested)
        assert (choice.few, choice.many) == (requested, requested)
        assert choice.tokens == select.NO_LIMIT


def test_the_default_kernels_can_be_requested_where_they_are_unmeasured():
    for layer, machine in (
        (replace(LAYER, **EIGHT), HOPPER),
        (LAYER, replace(HOPPER, capability=(10, 0))),
    ):
        assert not select.choose(layer, machine).sparse
        choice = select.choose(layer, machine, "sparse")
        assert (choice.few, choice.many) == ("cuda", "cusparselt")
    assert not select.choose(replace(LAYER, two_of_four=False), HOPPER, "sparse").sparse


@pytest.mark.parametrize("requested", ["triton", "cuda", "cusparselt", "sparse"])
def test_a_requested_kernel_that_cannot_run_is_replaced_by_dense(requested):
    choice = select.choose(LAYER, CPU, requested)
    assert not choice.sparse


def test_dense_can_be_requested():
    assert not select.choose(LAYER, HOPPER, "dense").sparse


def test_the_environment_is_checked(monkeypatch):
    monkeypatch.delenv(select.VARIABLE, raising=False)
    assert select.forced() is None
    for wish in select.WISHES:
        monkeypatch.setenv(select.VARIABLE, wish)
        assert select.forced() == wish
    monkeypatch.setenv(select.VARIABLE, "marlin")
    with pytest.raises(ValueError, match="'marlin'; expected one of dense"):
        select.forced()


@pytest.mark.skipif(library.missing() is not None, reason="built without CPU kernels")
@pytest.mark.parametrize(
    "layer",
    [
        {},
        INT8,
        {"two_of_four": False, "columns": 4097},
        INT8 | {"activations": "8-bit"},  # static or asymmetric
    ],
)
def test_cpus_serve_any_structure_where_it_is_faster(layer):
    choice = select.choose(replace(LAYER, **layer), AVX512)
    assert (choice.few, choice.many, choice.timed) == ("avx512", "avx512", True)


@pytest.mark.skipif(library.missing() is not None, reason="built without CPU kernels")
@pytest.mark.parametrize("wish", ["sparse", "avx512"])
def test_a_wish_on_a_cpu_is_not_timed(wish):
    with_amx = replace(AVX512, flags=AVX512.flags | {"amx_tile"})
    choice = select.choose(LAYER, with_amx, wish)
    assert (choice.few, choice.timed) == ("avx512", False)
    assert choice.reason == f"LLMC_ATTNMASK_KERNEL={wish}"


def test_the_cpu_kernel_cannot_run_on_a_gpu():
    choice = select.choose(LAYER, HOPPER, "avx512")
    assert not choice.sparse
    assert "LLMC_ATTNMASK_KERNEL=avx512, which cannot run" in choice.reason
