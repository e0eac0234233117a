"""Decide which files of a wheel the bundle includes."""

from fnmatch import fnmatchcase

# never imported, whatever the wheel
SOURCES = (".c", ".cc", ".cmake", ".cpp", ".cu", ".cuh", ".h", ".hh", ".hpp", ".inl")
NOT_IMPORTED = (*SOURCES, ".a", ".m4", ".map", ".pxd", ".pyi", ".pyx")

# extensions of vLLM that a Llama in bf16 or W8A8 needs; the worker cannot be imported
# without one of the FlashAttentions, and stock vLLM calls the third on Hopper
CUDA_LIBRARIES = (
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
)

# the first pattern that matches decides; "*" crosses folders
RULES: dict[str, tuple[tuple[str, bool], ...]] = {
    "llmc_attnmask": (
        ("*", True),
    ),  # its CUDA source is compiled when a model is loaded
    "mistral_common": (("mistral_common/data/*", False),),
    "plotly": (  # the JavaScript, and what merely importing the package runs
        ("plotly/package_data/plotly.min.js", True),
        ("plotly/*/*", False),
        ("plotly/*", True),
        ("_plotly_utils/*", True),
        ("*.dist-info/*", True),
        ("*", False),
    ),
    "pycountry": (("pycountry/locales/*", False),),
    "vllm": (
        *((library, True) for library in CUDA_LIBRARIES),
        ("*.so", False),
        ("vllm/vllm-rs", False),  # a web server
        ("vllm/third_party/deep_gemm/*", False),
        ("vllm/third_party/fmha_sm100/*", False),  # for another GPU
        ("vllm/entrypoints/serve/instrumentator/static/*", False),
        ("vllm/model_executor/layers/fused_moe/configs/*", False),
        ("*.dist-info/RECORD", False),
    ),
}


def carried(distribution: str, path: str) -> bool:
    """Return whether the bundle includes a file of a wheel.

    ``path`` is the file's path in the wheel of ``distribution``.

    ``distribution`` is the first part of the wheel's file name, with underscores.
    """
    parts = path.split("/")
    if path.endswith("/") or parts[0].endswith(".data"):
        return False
    for pattern, answer in RULES.get(distribution, ()):
        if fnmatchcase(path, pattern):
            return answer
    in_metadata = parts[0].endswith(".dist-info")
    return "tests" not in parts and (in_metadata or not path.endswith(NOT_IMPORTED))
