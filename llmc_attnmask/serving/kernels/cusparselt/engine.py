"""Make the plans of all shapes when a model is loaded, and multiply with them."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from ctypes import byref, c_size_t
from dataclasses import dataclass

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels.cusparselt import library as lib
from llmc_attnmask.serving.kernels.cusparselt.buckets import (
    buckets,
    fitting,
    nearest,
    representatives,
)
from llmc_attnmask.serving.kernels.cusparselt.plans import (
    Algorithm,
    Handle,
    Plan,
    Problem,
    weight_descriptor,
)

SEARCH_SECONDS = 20.0


@dataclass(frozen=True)
class _Prepared:
    """The plans for one problem."""

    buckets: list[int]  # ascending
    plans: dict[int, Plan]  # by bucket

    def pieces(self, tokens: int) -> Iterator[tuple[int, Plan]]:
        """Yield where each piece of the tokens starts, and its plan."""
        largest = self.buckets[-1]
        for start in range(0, tokens, largest):
            bucket = fitting(self.buckets, min(tokens - start, largest))
            yield start, self.plans[bucket]


class Engine:
    """2:4 products with one copy of the library.

    Layers of the same shape and type share plans, which live as long as the engine.
    """

    def __init__(
        self, library: lib.Library, search_seconds: float = SEARCH_SECONDS
    ) -> None:
        """
        :param search_seconds: after this many seconds of searching, no search starts
        """
        self.library = library
        self.seconds_left = search_seconds
        self._handles: dict[torch.device, Handle] = {}
        self._prepared: dict[Problem, _Prepared] = {}
        self._algorithms: dict[Problem, dict[int, Algorithm]] = {}

    def compress(self, weight: Tensor) -> Tensor:
        """Return the library's own form of a 2:4 weight.

        It is made without a plan, so it suits every algorithm.

        :param weight: [rows, K] in fp16, bf16, int8 or fp8, contiguous
        :return: [rows, as many columns as the library needs], in the weight's dtype
        :raises ValueError: for another dtype
        :raises CuSparseLtError: if the library refuses, as it does another shape
        """
        rows, columns = weight.shape
        with _on(weight.device), ExitStack() as made:
            handle = self._handle(weight.device)
            described = weight_descriptor(handle, rows, columns, weight.dtype, made)
            size, buffer_size = c_size_t(), c_size_t()
            handle.call(
                "cusparseLtSpMMACompressedSize2",
                *(described.address, byref(size), byref(buffer_size)),
            )
            width = -(-size.value // (rows * weight.itemsize))
            compressed = weight.new_empty(rows, width)
            buffer = weight.new_empty(buffer_size.value, dtype=torch.uint8)
            handle.call(
                "cusparseLtSpMMACompress2",
                *(described.address, 1, lib.AS_IT_IS, weight.data_ptr()),
                *(compressed.data_ptr(), buffer.data_ptr(), _stream(weight.device)),
            )
        return compressed

    def prepare(
        self,
        compressed: Tensor,
        columns: int,
        *,
        largest: int,
        fewest: int = 1,
        search: bool = True,
    ) -> None:
        """Make the plans for a weight of this shape and type, unless they exist.

        :param compressed: from ``compress``; only the search reads it
        :param columns: K
        :param largest: more tokens than this are multiplied in pieces
        :param fewest: fewer tokens than this are padded to this number's bucket
        :param search: whether to search for the fastest algorithms first
        :raises CuSparseLtError: if the library refuses
        :raises RuntimeError: while a CUDA graph is captured
        """
        problem = Problem(
            compressed.device, compressed.shape[0], columns, compressed.dtype
        )
        known = self._prepared.get(problem, _Prepared([], {})).plans
        missing = [n for n in buckets(fewest, largest) if n not in known]
        if not missing:
            return
        if compressed.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"cuSPARSELt plans for {problem} are needed while a CUDA graph is "
                "captured; call prepare when the model is loaded"
            )
        with _on(problem.device):
            handle = self._handle(problem.device)
            if search and problem not in self._algorithms:
                self._algorithms[problem] = dict(
                    self._search(handle, problem, compressed, missing)
                )
            algorithms = self._algorithms.get(problem, {})
            plans = {n: _plan(handle, problem, n, algorithms) for n in missing} | known
        self._prepared[problem] = _Prepared(sorted(plans), plans)

    def searched(self, compressed: Tensor, columns: int) -> list[int]:
        """Return the numbers of tokens that were searched for weights of this shape.

        :param compressed: from ``compress``
        :param columns: K
        """
        shape = compressed.device, compressed.shape[0], columns, compressed.dtype
        return sorted(self._algorithms.get(Problem(*shape), {}))

    def linear(
        self,
        x: Tensor,
        compressed: Tensor,
        channel_scale: Tensor | None,
        token_scale: Tensor | None,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Multiply; see ``cusparselt.linear``."""
        product = self._product(x.contiguous(), compressed, channel_scale)
        if token_scale is None:
            # The library cannot add the bias: it would store its address in the plan,
            # which layers share.
            return product if bias is None else product.add_(bias)
        # No value may depend on all tokens at once: in a CUDA graph some are padding,
        # with arbitrary memory contents.
        scale = token_scale[:, None]
        if product.dtype == out_dtype:
            out = product
        else:
            out = torch.empty_like(product, dtype=out_dtype)
        if bias is None:
            return torch.mul(product, scale, out=out)  # in fp32, rounded once
        return torch.addcmul(bias, product, scale, out=out)  # in fp32, rounded once

    def _product(self, x: Tensor, compressed: Tensor, scale: Tensor | None) -> Tensor:
        tokens, columns = x.shape
        problem = Problem(x.device, compressed.shape[0], columns, x.dtype)
        prepared = self._prepared.get(problem)
        if prepared is None:
            raise RuntimeError(
                f"no cuSPARSELt plan for {problem}; call prepare when the model is "
                "loaded"
            )
        if problem.scaled != (scale is not None):
            raise ValueError(
                f"scales with a weight of {x.dtype}: expected both with 8 bits, and "
                "none with 16"
            )
        pieces = list(prepared.pieces(tokens))
        out = x.new_empty(
            sum(plan.tokens for _, plan in pieces),
            problem.rows,
            dtype=problem.out_dtype,
        )
        with _on(x.device):
            for start, plan in pieces:
                end = start + plan.tokens
                part = _padded(x[start:end], plan.tokens)
                plan.multiply(compressed, part, scale, out[start:end])
        return out[:tokens]

    def _handle(self, device: torch.device) -> Handle:
        if device not in self._handles:
            self._handles[device] = Handle(self.library)
        return self._handles[device]

    def _search(
        self, handle: Handle, problem: Problem, compressed: Tensor, tokens: list[int]
    ) -> Iterator[tuple[int, Algorithm]]:
        """Find the fastest algorithm for some numbers of tokens, while time remains."""
        scale = None
        if problem.scaled:
            scale = compressed.new_ones(problem.rows, dtype=torch.float32)
        for bucket in representatives(tokens):
            if self.seconds_left <= 0:
                return
            start = time.monotonic()
            try:
                # as random as real tokens: zeros save power, which raises the clocks
                x = _random(bucket, problem)
                out = x.new_empty(bucket, problem.rows, dtype=problem.out_dtype)
                plan = Plan(handle, problem, bucket)
                algorithm = plan.searched(compressed, x, scale, out)
            except (lib.CuSparseLtError, torch.OutOfMemoryError) as error:
                lib.logger.warning(
                    "The algorithm search for %s with %d tokens failed: %s",
                    # as text: the error's frames hold tensors
                    *(problem, bucket, str(error)),
                )
                continue
            finally:
                self.seconds_left -= time.monotonic() - start
            yield bucket, algorithm


def _plan(
    handle: Handle, problem: Problem, tokens: int, algorithms: dict[int, Algorithm]
) -> Plan:
    """Make a plan with the algorithm of the nearest search, if the plan accepts it."""
    if algorithms:
        found = algorithms[nearest(list(algorithms), tokens)]
        # the configuration alone may work where the split of K does not
        configuration = tuple(item for item in found if item[0] == lib.CONFIGURATION)
        for algorithm in dict.fromkeys((found, configuration)):
            try:
                return Plan(handle, problem, tokens, algorithm)
            except lib.CuSparseLtError as error:
                lib.logger.info(
                    "%s with %d tokens cannot use the algorithm %s: %s",
                    *(problem, tokens, algorithm, str(error)),
                )
    return Plan(handle, problem, tokens)


def _padded(x: Tensor, tokens: int) -> Tensor:
    """Return x itself if it has this many tokens, or else a padded copy.

    Its extra rows are arbitrary and affect no other token.
    """
    if x.shape[0] == tokens and x.data_ptr() % lib.ALIGNMENT == 0:
        return x
    padded = x.new_empty(tokens, x.shape[1])
    padded[: x.shape[0]] = x
    return padded


def _random(tokens: int, problem: Problem) -> Tensor:
    device = problem.device
    # a separate generator, so that the global one is left alone
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(
        tokens,
        problem.columns,
        dtype=torch.bfloat16,
        device=device,
        generator=generator,
    )
    return (x * 40 if problem.dtype == torch.int8 else x).to(problem.dtype)


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_stream(device).cuda_stream
