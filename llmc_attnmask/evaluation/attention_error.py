"""Measure the attention error of a pruned model, layer by layer."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmc_attnmask.attention.capture import AttentionReplica
from llmc_attnmask.attention.matrix import attention_error, attention_norms
from llmc_attnmask.attention.projections import attention_modules
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.evaluation.batches import batches


def attention_errors(
    dense: PreTrainedModel, pruned: PreTrainedModel, windows: Tensor
) -> dict[str, float]:
    """Return ||A - A~||_F^2 / ||A||_F^2 of every attention module.

    Both modules see the inputs from the dense model, so a layer's error does not
    include the errors of the layers before it.

    :param windows: int64 [windows, length]
    :return: module name -> relative error
    """
    return DenseAttention(dense, windows).errors(pruned)


class DenseAttention:
    """A dense model's attention on some text, with which pruned models are compared.

    Its inputs are collected once, and kept on the CPU.

    :param windows: int64 [windows, length]
    """

    def __init__(self, dense: PreTrainedModel, windows: Tensor):
        self._dense = dense
        self._inputs = attention_inputs(dense, windows)

    @torch.no_grad()
    def errors(self, pruned: PreTrainedModel) -> dict[str, float]:
        """Return the errors of a pruned model, as ``attention_errors`` does."""
        errors = {}
        for name, collected in self._inputs.items():
            if not len(collected):  # text does not reach a vision tower
                continue
            replicas = [
                AttentionReplica(model.get_submodule(name))
                for model in (self._dense, pruned)
            ]
            error = norm = 0.0
            for batch in collected.batches(range(len(collected)), 8):
                args, kwargs = collected.batch(batch, replicas[0].device, torch.float32)
                reference, changed = (replica(args, kwargs) for replica in replicas)
                error += attention_error(reference, changed.query, changed.key).item()
                norm += attention_norms(reference).matrix
            errors[name] = error / norm
        return errors


@torch.no_grad()
def attention_inputs(
    model: PreTrainedModel, windows: Tensor
) -> dict[str, ModuleInputs]:
    """Collect the inputs of every attention module of a model, on the CPU."""
    inputs = {name: ModuleInputs() for name in attention_modules(model)}

    def collector(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs[name].append(args, kwargs)

        return hook

    handles = [
        module.register_forward_pre_hook(collector(name), with_kwargs=True)
        for name, module in attention_modules(model).items()
    ]
    device = next(model.parameters()).device
    try:
        for batch in batches(windows):
            model(input_ids=batch.to(device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return inputs
