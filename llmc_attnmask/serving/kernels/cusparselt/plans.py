"""Objects of the library, each with an owner in Python that destroys it.

One product is ``D = alpha A B``: A is the 2:4 weight [rows, K], B the transposed tokens
[K, tokens], and D [rows, tokens] is stored by columns, which torch stores as
[tokens, rows]. torch's own binding describes the product in the same way.
"""

import ctypes
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from ctypes import byref, c_float, c_int32, c_size_t, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels.cusparselt import library as lib

# (attribute, value) of an algorithm, where it differs from the default
Algorithm = tuple[tuple[int, int], ...]

_ONE, _ZERO = c_float(1.0), c_float(0.0)


@dataclass(frozen=True)
class Problem:
    """What products with weights of one shape have in common."""

    device: torch.device
    rows: int
    columns: int
    dtype: torch.dtype  # of the weight and of the tokens

    @property
    def scaled(self) -> bool:
        """Whether a vector scales the rows of D."""
        return self.dtype.itemsize == 1

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of D.

        For 8 bits it is bfloat16: without the tokens' scales, D can leave the range of
        fp16, and 32 bits (fp32 for fp8, only int32 for int8) would double its traffic.
        """
        return torch.bfloat16 if self.scaled else self.dtype

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.rows} x {self.columns} in {kind} on {self.device}"


_TYPES = {
    torch.float16: lib.FLOAT16,
    torch.bfloat16: lib.BFLOAT16,
    torch.int8: lib.INT8,
    torch.float8_e4m3fn: lib.FLOAT8_E4M3,
}


def value_type(dtype: torch.dtype) -> int:
    """Return the library's number for a dtype.

    :raises ValueError: if this binding does not multiply matrices of this dtype
    """
    if dtype not in _TYPES:
        known = ", ".join(map(str, _TYPES))
        raise ValueError(f"{dtype} weights are not supported; expected {known}")
    return _TYPES[dtype]


class Handle:
    """The library on one device, the current device at the time of creation."""

    def __init__(self, library: lib.Library) -> None:
        self.library = library
        memory = lib.Opaque()
        self.address = memory.address
        library.call("cusparseLtInit", self.address)
        _when_dropped(self, library.destroy, "cusparseLtDestroy", memory)

    def call(self, name: str, *arguments: object) -> None:
        """Call a function whose first argument is the handle."""
        self.library.call(name, self.address, *arguments)

    def destroy(self, name: str, memory: lib.Opaque) -> None:
        """Destroy an object made with this handle, which stays alive until then."""
        self.library.destroy(name, memory)


def weight_descriptor(
    handle: Handle, rows: int, columns: int, dtype: torch.dtype, made: ExitStack
) -> lib.Opaque:
    """Describe a 2:4 weight stored by rows.

    :param made: destroys the descriptor when the stack is closed
    """
    described = lib.Opaque()
    handle.call(
        "cusparseLtStructuredDescriptorInit",
        *(described.address, rows, columns, columns, lib.ALIGNMENT),
        *(value_type(dtype), lib.ROW_MAJOR, lib.HALF),
    )
    made.callback(handle.destroy, "cusparseLtMatDescriptorDestroy", described)
    return described


class Plan:
    """How one number of tokens is multiplied with weights of one shape."""

    def __init__(
        self, handle: Handle, problem: Problem, tokens: int, algorithm: Algorithm = ()
    ) -> None:
        """
        :param algorithm: as ``searched`` returns it
        :raises CuSparseLtError: if the library refuses; then nothing is left behind
        """
        self.problem = problem
        self.tokens = tokens
        self.handle = handle
        with ExitStack() as made:
            self._make(made, algorithm)
            # in reverse order of creation; the handle outlives them all
            _when_dropped(self, made.pop_all().close)

    def _make(self, made: ExitStack, algorithm: Algorithm) -> None:
        handle, problem, tokens = self.handle, self.problem, self.tokens
        rows, columns = problem.rows, problem.columns
        weight = weight_descriptor(handle, rows, columns, problem.dtype, made)
        dense = []
        for shape, leading, dtype, order in (
            ((tokens, columns), columns, problem.dtype, lib.ROW_MAJOR),
            ((rows, tokens), rows, problem.out_dtype, lib.COLUMN_MAJOR),
        ):
            described = lib.Opaque()
            handle.call(
                "cusparseLtDenseDescriptorInit",
                *(described.address, *shape, leading, lib.ALIGNMENT),
                *(value_type(dtype), order),
            )
            made.callback(handle.destroy, "cusparseLtMatDescriptorDestroy", described)
            dense.append(described.address)
        x, out = dense
        # the library has no function that destroys this one
        self._matmul = matmul = lib.Opaque()
        integers = problem.dtype == torch.int8
        handle.call(
            "cusparseLtMatmulDescriptorInit",
            *(matmul.address, lib.AS_IT_IS, lib.TRANSPOSED),
            *(weight.address, x, out, out),
            lib.COMPUTE_INT32 if integers else lib.COMPUTE_FLOAT32,
        )
        if problem.scaled:
            # A vector, because a single scale is read on the host. The rows of D are
            # channels; the tokens' scales belong to its columns and cannot be given
            self._set(
                "cusparseLtMatmulDescSetAttribute", matmul, lib.ALPHA_IS_A_VECTOR, 1
            )
        self._selection = selection = lib.Opaque()
        handle.call(
            "cusparseLtMatmulAlgSelectionInit",
            *(selection.address, matmul.address, lib.DEFAULT_ALGORITHM),
        )
        made.callback(handle.destroy, "cusparseLtMatmulAlgSelectionDestroy", selection)
        for attribute, value in algorithm:
            self._set("cusparseLtMatmulAlgSetAttribute", selection, attribute, value)
        self._plan = plan = lib.Opaque()
        handle.call(
            "cusparseLtMatmulPlanInit",
            *(plan.address, matmul.address, selection.address),
        )
        made.callback(handle.destroy, "cusparseLtMatmulPlanDestroy", plan)
        size = c_size_t()
        handle.call("cusparseLtMatmulGetWorkspace", plan.address, byref(size))
        self.workspace_bytes = size.value

    def multiply(
        self, compressed: Tensor, x: Tensor, scale: Tensor | None, out: Tensor
    ) -> None:
        """Launch the product on the current stream of x's device.

        :param compressed: the library's form of a weight of this shape
        :param x: [tokens, K], contiguous, at an address that ``ALIGNMENT`` divides
        :param scale: fp32 [rows] if the problem is scaled
        :param out: [tokens, rows] in the problem's ``out_dtype``; is overwritten
        """
        self._launch("cusparseLtMatmul", compressed, x, scale, out)

    def searched(
        self, compressed: Tensor, x: Tensor, scale: Tensor | None, out: Tensor
    ) -> Algorithm:
        """Return the fastest algorithm, found by trying each on the current stream.

        The parameters are those of ``multiply``.

        :return: the algorithm for other plans
        """
        before = self._settings()
        self._launch("cusparseLtMatmulSearch", compressed, x, scale, out)
        after = self._settings()
        return tuple(item for item in after.items() if item not in before.items())

    def _launch(
        self,
        function: str,
        compressed: Tensor,
        x: Tensor,
        scale: Tensor | None,
        out: Tensor,
    ) -> None:
        workspace = None
        if self.workspace_bytes:
            # from torch's allocator, which respects streams and graphs and never waits
            # for the GPU; this call's kernels finish with it before a later tensor's
            workspace = x.new_empty(self.workspace_bytes, dtype=torch.uint8)
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        self.handle.call(
            function,
            self._plan.address,
            byref(_ONE) if scale is None else scale.data_ptr(),
            *(compressed.data_ptr(), x.data_ptr(), byref(_ZERO)),
            *(out.data_ptr(), out.data_ptr()),  # C (ignored, as beta = 0) and D
            None if workspace is None else workspace.data_ptr(),
            byref(c_void_p(stream)),
            1,
        )

    def _settings(self) -> dict[int, int]:
        """Return the selected algorithm's settings, without those that a GPU lacks."""
        found = {}
        for attribute in lib.ALGORITHM_ATTRIBUTES:
            value = c_int32()
            try:
                self.handle.call(
                    "cusparseLtMatmulAlgGetAttribute",
                    *(self._selection.address, attribute),
                    *(byref(value), ctypes.sizeof(value)),
                )
            except lib.CuSparseLtError as error:
                if error.status not in (lib.INVALID_VALUE, lib.NOT_SUPPORTED):
                    raise
                continue
            found[attribute] = value.value
        return found

    def _set(self, name: str, owner: lib.Opaque, attribute: int, value: int) -> None:
        data = c_int32(value)
        size = ctypes.sizeof(data)
        self.handle.call(name, owner.address, attribute, byref(data), size)


def _when_dropped(owner: object, destroy: Callable[..., None], *what: object) -> None:
    # not at interpreter exit, when the driver may be gone already
    weakref.finalize(owner, destroy, *what).atexit = False
