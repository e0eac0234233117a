"""The shared library: how it is found, its functions, and its error statuses.

Signatures, constants and sizes are those of cusparseLt.h 0.7.1, 0.8.0, 0.8.1, 0.9.1 and
0.10.0, which agree in everything that is used here.
"""

import ctypes
import logging
import os
import threading
from ctypes import POINTER, byref, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path

logger = logging.getLogger("vllm.llmc_attnmask")  # vLLM's handlers and level

SONAME = "libcusparseLt.so.0"
OLDEST, NEXT_MAJOR = (0, 7), (1,)

# cudaDataType
FLOAT16, BFLOAT16, INT8, FLOAT8_E4M3 = 2, 14, 3, 28
# cusparseComputeType
COMPUTE_INT32, COMPUTE_FLOAT32 = 0, 2
# cusparseOperation_t and cusparseOrder_t
AS_IT_IS, TRANSPOSED = 0, 1
COLUMN_MAJOR, ROW_MAJOR = 1, 2
# the only values of cusparseLtSparsity_t and cusparseLtMatmulAlg_t
HALF, DEFAULT_ALGORITHM = 0, 0
# of cusparseLtMatmulDescAttribute_t
ALPHA_IS_A_VECTOR = 5
# of cusparseLtMatmulAlgAttribute_t; the others are split-K, its mode and its buffers
CONFIGURATION = 0
ALGORITHM_ATTRIBUTES = (CONFIGURATION, 3, 4, 5)
ALIGNMENT = 16  # bytes, of every pointer
_SIZE = 1024  # bytes of every object before 0.8; 512 since

NOT_INITIALIZED, INVALID_VALUE, NOT_SUPPORTED = 1, 3, 10
_ELSEWHERE = "LLMC_ATTNMASK_KERNEL=triton or dense serves without this library"
_STATUSES = {
    NOT_INITIALIZED: (
        "CUSPARSE_STATUS_NOT_INITIALIZED",
        "check with nvidia-smi that the driver works and the GPU is visible",
    ),
    2: (
        "CUSPARSE_STATUS_ALLOC_FAILED",
        "leave more memory free on the GPU (gpu_memory_utilization) and on the host",
    ),
    INVALID_VALUE: (
        "CUSPARSE_STATUS_INVALID_VALUE",
        f"please report this with the version; {_ELSEWHERE}",
    ),
    4: (
        "CUSPARSE_STATUS_ARCH_MISMATCH",
        f"this GPU needs another version of the library; {_ELSEWHERE}",
    ),
    5: (
        "CUSPARSE_STATUS_MAPPING_ERROR",
        "an earlier kernel may have failed: run again with CUDA_LAUNCH_BLOCKING=1",
    ),
    6: (
        "CUSPARSE_STATUS_EXECUTION_FAILED",
        "an earlier kernel may have failed: run again with CUDA_LAUNCH_BLOCKING=1",
    ),
    7: (
        "CUSPARSE_STATUS_INTERNAL_ERROR",
        f"please report this with the version; {_ELSEWHERE}",
    ),
    8: (
        "CUSPARSE_STATUS_MATRIX_TYPE_NOT_SUPPORTED",
        f"the library does not support this type on this GPU; {_ELSEWHERE}",
    ),
    9: (
        "CUSPARSE_STATUS_ZERO_PIVOT",
        f"please report this with the version; {_ELSEWHERE}",
    ),
    NOT_SUPPORTED: (
        "CUSPARSE_STATUS_NOT_SUPPORTED",
        f"the library does not support this shape or type on this GPU; {_ELSEWHERE}",
    ),
    11: (
        "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
        "leave more memory free on the GPU (gpu_memory_utilization)",
    ),
}

_MATRIX = [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_uint32, c_int, c_int]
_ATTRIBUTE = [c_void_p, c_void_p, c_int, c_void_p, c_size_t]
_PRODUCT = [*[c_void_p] * 10, c_int32]
_SIGNATURES: dict[str, list] = {
    "cusparseLtGetProperty": [c_int, POINTER(c_int)],
    "cusparseLtInit": [c_void_p],
    "cusparseLtDestroy": [c_void_p],
    "cusparseLtDenseDescriptorInit": _MATRIX,
    "cusparseLtStructuredDescriptorInit": [*_MATRIX, c_int],
    "cusparseLtMatDescriptorDestroy": [c_void_p],
    "cusparseLtMatmulDescriptorInit": [
        *[c_void_p, c_void_p, c_int, c_int],
        *[c_void_p, c_void_p, c_void_p, c_void_p, c_int],
    ],
    "cusparseLtMatmulDescSetAttribute": _ATTRIBUTE,
    "cusparseLtMatmulAlgSelectionInit": [c_void_p, c_void_p, c_void_p, c_int],
    "cusparseLtMatmulAlgSelectionDestroy": [c_void_p],
    "cusparseLtMatmulAlgSetAttribute": _ATTRIBUTE,
    "cusparseLtMatmulAlgGetAttribute": _ATTRIBUTE,
    "cusparseLtMatmulPlanInit": [c_void_p, c_void_p, c_void_p, c_void_p],
    "cusparseLtMatmulPlanDestroy": [c_void_p],
    "cusparseLtMatmulGetWorkspace": [c_void_p, c_void_p, POINTER(c_size_t)],
    "cusparseLtMatmul": _PRODUCT,
    "cusparseLtMatmulSearch": _PRODUCT,
    "cusparseLtSpMMACompressedSize2": [
        *[c_void_p, c_void_p, POINTER(c_size_t), POINTER(c_size_t)]
    ],
    "cusparseLtSpMMACompress2": [
        *[c_void_p, c_void_p, c_int, c_int],
        *[c_void_p, c_void_p, c_void_p, c_void_p],
    ],
}
_SINCE_0_8 = "cusparseLtMatmulAlgSelectionDestroy"


class CuSparseLtError(RuntimeError):
    """The library returned an error status.

    :ivar function: the library's function
    :ivar status: its cusparseStatus_t
    """

    def __init__(self, function: str, status: int, version: str) -> None:
        name, advice = _STATUSES.get(
            status, (f"status {status}", f"an unknown status; {_ELSEWHERE}")
        )
        super().__init__(f"{function} of cuSPARSELt {version}: {name}; {advice}")
        self.function = function
        self.status = status


class UnusableLibraryError(RuntimeError):
    """This machine has no library that this module can use."""


class Opaque:
    """Memory for one object of the library.

    It must not move, because the library keeps its address.
    """

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_SIZE + ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self.address = start + -start % ALIGNMENT


class Library:
    """The functions of one copy of the library, typed and with checked statuses.

    Calls are serialized: NVIDIA does not document whether threads may share a handle.
    """

    def __init__(self, shared: ctypes.CDLL) -> None:
        """
        :raises UnusableLibraryError: if its version is not supported here, or it lacks
            a function
        """
        # reentrant, because the garbage collector may run a destructor within a call
        self._lock = threading.RLock()
        self.version = "of unknown version"
        self._functions = {}
        for name, types in _SIGNATURES.items():
            function = getattr(shared, name, None)
            if function is not None:
                function.argtypes, function.restype = types, c_int
                self._functions[name] = function
            elif name != _SINCE_0_8:
                raise UnusableLibraryError(f"{shared._name} has no function {name}")
        parts = tuple(self._property(which) for which in range(3))
        self.version = ".".join(map(str, parts))
        if not OLDEST <= parts < NEXT_MAJOR:
            raise UnusableLibraryError(
                f"cuSPARSELt {self.version} is not supported: this package needs "
                f"a version from {'.'.join(map(str, OLDEST))} to below 1.0; install a "
                "torch that ships one"
            )

    @classmethod
    def load(cls, path: Path) -> "Library":
        """Load the library at ``path``.

        :raises UnusableLibraryError: if it cannot be loaded or used
        """
        try:
            return cls(ctypes.CDLL(str(path)))
        except OSError as error:
            raise UnusableLibraryError(f"cannot load {path}: {error}") from error

    @classmethod
    def of_torch(cls) -> "Library":
        """Use the copy that torch has loaded, wherever it comes from, and no other.

        :raises UnusableLibraryError: if torch has not loaded a usable one
        """
        try:
            return cls(ctypes.CDLL(SONAME, mode=os.RTLD_NOLOAD))
        except OSError as error:
            raise UnusableLibraryError(f"torch has not loaded {SONAME}") from error

    def call(self, name: str, *arguments: object) -> None:
        """Call ``name``.

        :raises CuSparseLtError: unless it succeeds
        """
        with self._lock:
            status = self._functions[name](*arguments)
        if status:
            raise CuSparseLtError(name, status, self.version)

    def destroy(self, name: str, memory: Opaque) -> None:
        """Call ``name``, if it exists, in a destructor, which only logs errors."""
        if name not in self._functions:
            return
        try:
            self.call(name, memory.address)
        except CuSparseLtError as error:
            logger.warning("%s", str(error))

    def _property(self, which: int) -> int:
        value = c_int()
        self.call("cusparseLtGetProperty", which, byref(value))
        return value.value
