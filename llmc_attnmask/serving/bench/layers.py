"""Load a layer as vLLM would, with this package's kernels or without.

Written for vLLM 0.26, 0.32 and 0.33.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.plugins import load_general_plugins
from vllm.utils.torch_utils import set_default_torch_dtype

from llmc_attnmask.checkpoint.io.files import Checkpoint
from llmc_attnmask.checkpoint.linears import output_layer
from llmc_attnmask.serving.bench.groups import Group
from llmc_attnmask.serving.config import SparseConfig
from llmc_attnmask.serving.kernels import select
from llmc_attnmask.serving.recognise import METHOD
from llmc_attnmask.serving.table import KernelTable, Row
from llmc_attnmask.serving.versions import SUPPORTED


class _Rows(KernelTable):
    """Keeps the row of the last layer instead of logging a table."""

    last: Row | None = None

    def add(self, layer: str, row: Row) -> None:
        self.last = row


@contextmanager
def single_process(directory: Path) -> Iterator[VllmConfig]:
    """Prepare this process like one that vLLM would serve the checkpoint in.

    :raises ValueError: if config.json names no sparse layers, or the plugin is off
    """
    load_general_plugins()
    if METHOD not in QUANTIZATION_METHODS:
        raise ValueError(
            f"this package's plugin is off in vLLM {vllm.__version__} here: use "
            f"version {SUPPORTED} or later, and leave the plugin in VLLM_PLUGINS"
        )
    config = EngineArgs(model=str(directory), enforce_eager=True).create_engine_config()
    if not isinstance(config.quant_config, SparseConfig):
        raise ValueError(
            f"{directory}: config.json names no sparse layers, so there is nothing to "
            "gain; prune the model with llmc-attnmask first"
        )
    with (
        tempfile.TemporaryDirectory() as folder,
        set_current_vllm_config(config),
        set_default_torch_dtype(config.model_config.dtype),
    ):
        init_distributed_environment(
            1, 0, f"file://{folder}/store", 0, _backend(config)
        )
        initialize_model_parallel(1, 1)
        try:
            yield config
        finally:
            cleanup_dist_env_and_memory()


def _backend(config: VllmConfig) -> str:
    return "nccl" if config.device_config.device_type == "cuda" else "gloo"


def load(
    group: Group, checkpoint: Checkpoint, config: VllmConfig, *, dense: bool
) -> tuple[nn.Module, Row | None]:
    """Load a layer from a checkpoint.

    :param dense: take the kernel that vLLM has for this layer
    :return: the layer, called with [tokens, inputs]; what the log's table would say of
        it, unless it is not sparse
    :raises ValueError: if its tensors do not fit together
    """
    quantization: Any = config.quant_config
    quantization.table = table = _Rows()
    modules = [part.module for part in group.parts]
    # vLLM's names of fused layers do not matter; those of their parts do
    fused = {group.kind: [module.rpartition(".")[2] for module in modules]}
    quantization.packed_modules_mapping = fused
    # the device is not the default elsewhere: that would slow down every call
    with _kernel("dense" if dense else None), torch.device(config.device_config.device):
        layer = MergedColumnParallelLinear(
            group.columns,
            [part.shape[0] for part in group.parts],
            bias=False,
            quant_config=quantization,
            prefix=f"{group.parent}.{group.kind}",
        )
        for name, parameter in list(layer.named_parameters()):
            for i, module in enumerate(modules):
                tensor = checkpoint.tensors.get(f"{module}.{name}")
                if tensor is not None:
                    parameter.weight_loader(parameter, tensor.load(), i)
                elif "scale" in name:
                    raise ValueError(
                        f"{checkpoint.directory} has no {module}.{name}, which its "
                        "quantization needs; the checkpoint is incomplete"
                    )
        layer.quant_method.process_weights_after_loading(layer)
    return layer, table.last


def load_head(checkpoint: Checkpoint, config: VllmConfig) -> nn.Module | None:
    """Load the output layer, or None if there is none by a usual name.

    :return: called with [tokens, inputs]
    """
    for tensor in output_layer(checkpoint).values():
        with torch.device(config.device_config.device):
            head = ParallelLMHead(*tensor.shape)
            head.weight.weight_loader(head.weight, tensor.load())
            head.quant_method.process_weights_after_loading(head)
        return head
    return None


def sparse_bytes(layer: Any) -> int | None:
    """Return the bytes of a weight's sparse form, or None if the layer stays dense."""
    served = getattr(layer.quant_method, "served", None)
    return None if served is None else int(served.nbytes)


@contextmanager
def _kernel(wish: str | None) -> Iterator[None]:
    """Let the environment request a kernel; None leaves it as the user has it."""
    before = os.environ.get(select.VARIABLE)
    if wish is not None:
        os.environ[select.VARIABLE] = wish
    try:
        yield
    finally:
        if before is not None:
            os.environ[select.VARIABLE] = before
        elif wish is not None:
            del os.environ[select.VARIABLE]
