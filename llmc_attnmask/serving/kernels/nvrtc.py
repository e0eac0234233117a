"""Compile CUDA C++ at run time with NVRTC, and launch it through the driver.

Both are called through cuda-bindings, which torch's CUDA builds install together with
NVRTC itself.
"""

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch


class CompilationError(RuntimeError):
    """NVRTC refused a source."""


def missing() -> str | None:
    """Return what this environment lacks for compiling; None if it lacks nothing."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed"
    return None


def compile_cubin(
    source: str,
    name: str,
    headers: Mapping[str, str],
    kernels: Sequence[str],
    architecture: str,
    macros: Mapping[str, int] | None = None,
) -> tuple[bytes, dict[str, str]]:
    """Compile templates to machine code; this needs no GPU.

    :param source: CUDA C++
    :param name: name of the source, for messages
    :param headers: files that the source may include, by name
    :param kernels: name expressions such as ``f<1>``
    :param architecture: such as ``sm_90``
    :param macros: macros to define, with their values
    :return: a cubin, and each expression's symbol in it
    :raises CompilationError: with the compiler's log
    """
    from cuda.bindings import nvrtc

    program = _check(
        nvrtc.nvrtcCreateProgram(
            source.encode(),
            name.encode(),
            len(headers),
            [content.encode() for content in headers.values()],
            [header.encode() for header in headers],
        )
    )
    try:
        for kernel in kernels:
            _check(nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        for macro, value in (macros or {}).items():
            options.append(f"--define-macro={macro}={value}".encode())
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise CompilationError(
                f"{name} does not compile for {architecture}: {log.decode().strip()}"
            )
        cubin = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
        symbols = {
            kernel: _check(nvrtc.nvrtcGetLoweredName(program, kernel.encode())).decode()
            for kernel in kernels
        }
    finally:
        _check(nvrtc.nvrtcDestroyProgram(program))
    return bytes(cubin), symbols


class Module:
    """Compiled kernels, loaded into the current CUDA context."""

    def __init__(self, cubin: bytes, symbols: dict[str, str]):
        from cuda.bindings import driver

        self._driver = driver
        self._module = _check(driver.cuModuleLoadData(cubin))
        self._functions = {
            kernel: _check(driver.cuModuleGetFunction(self._module, symbol.encode()))
            for kernel, symbol in symbols.items()
        }

    def allow_shared_memory(self, kernel: str, size: int) -> None:
        """Allow each block this many bytes, beyond the usual 48 KB.

        As many blocks may then run at once as fit into all of a multiprocessor's shared
        memory.
        """
        attribute = self._driver.CUfunction_attribute
        for name, value in (
            (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, size),
            (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
        ):
            _check(
                self._driver.cuFuncSetAttribute(self._functions[kernel], name, value)
            )

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_memory: int,
        stream: int,
        arguments: ctypes.Structure,
    ) -> None:
        """Start a kernel whose only parameter is a structure.

        :param threads: threads of a block
        :param shared_memory: bytes of a block
        :param stream: as ``torch.cuda.Stream.cuda_stream`` gives it
        """
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _check(
            self._driver.cuLaunchKernel(
                self._functions[kernel],
                *grid,
                threads,
                1,
                1,
                shared_memory,
                stream,
                ctypes.addressof(parameters),
                0,
            )
        )


def _check(returned: tuple[Any, ...]) -> Any:
    """Return the outputs of a call whose first return value is a status."""
    status, *outputs = returned
    if status:
        raise RuntimeError(f"CUDA returned {status.name} ({int(status)})")
    return outputs[0] if outputs else None


@cache
def architecture(device: int) -> str:
    """Return a GPU's architecture, as the compiler names it."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
