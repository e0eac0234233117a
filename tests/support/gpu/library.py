"""Kernels that need a GPU, as plain torch with the same names and parameters.

Every call of the measuring scripts is bound to the real function's signature first, so
that a parameter that does not exist fails here.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from integration.gpu import kernels
from llmc_attnmask.serving.kernels import cuda_decode, cusparselt, nvrtc, packing
from llmc_attnmask.serving.kernels.cusparselt.engine import Engine


def product(weight: Tensor, given: dict[str, Any]) -> Tensor:
    out = given["x"].double() @ weight.double().t()
    if given["channel_scale"] is not None:
        out = out * given["channel_scale"].double()
        out = out * given["token_scale"].double()[:, None]
    assert given["bias"] is None
    return out.to(given["out_dtype"])


def compress(weight: Tensor) -> Tensor:
    """Values row by row, then the nibbles row by row."""
    values, nibbles = packing.kept(weight)
    both = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    stored = torch.cat([values.view(torch.uint8).view(-1), both.view(-1)])
    return stored.view(weight.dtype).view(len(weight), -1)


def expand(compressed: Tensor, columns: int) -> Tensor:
    values = cusparselt.kept_values(compressed, columns)
    stored = compressed.view(-1).view(torch.uint8)[values.nbytes :]
    both = stored.view(len(values), -1)
    nibbles = torch.stack([both & 15, both >> 4], dim=-1).view(len(values), -1)
    return packing.expand(values, nibbles)


def bound(real: Callable, made: Callable[[dict[str, Any]], Any]) -> Callable:
    """Wrap a function that takes the real one's parameters by name."""
    signature = inspect.signature(real)

    def called(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return made(given.arguments)

    return called


def _cusparselt(given: dict[str, Any]) -> Tensor:
    return product(expand(given["compressed"], given["x"].shape[1]), given)


def _cuda(given: dict[str, Any]) -> Tensor:
    assert given["arrived"].dtype == torch.int32
    return product(packing.expand(given["values"], given["metadata"]), given)


class Plans:
    """Stands in for ``Engine``."""

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        inspect.signature(Engine.prepare).bind(self, *args, **kwargs)

    def linear(self, *args: Any, **kwargs: Any) -> Tensor:
        return bound(Engine.linear, _cusparselt)(self, *args, **kwargs)

    def searched(self, *args: Any, **kwargs: Any) -> list[int]:
        inspect.signature(Engine.searched).bind(self, *args, **kwargs)
        return [32, 128]


def install(monkeypatch) -> None:
    """Replace what a GPU would run."""
    for module, name, made in (
        (cusparselt, "linear", _cusparselt),
        (cusparselt, "compress", lambda given: compress(given["weight"])),
        (cusparselt, "prepare", lambda given: None),
        (cusparselt, "why_not", lambda given: None),
        (cusparselt, "version", lambda given: "0.0.0"),
        (cuda_decode, "linear", _cuda),
        (cuda_decode, "pack", lambda given: packing.kept(given["weight"])),
        (nvrtc, "missing", lambda given: None),
    ):
        monkeypatch.setattr(module, name, bound(getattr(module, name), made))
    monkeypatch.setattr(kernels, "_unsearched", Plans)
    monkeypatch.setattr(cusparselt, "engine", Plans)
