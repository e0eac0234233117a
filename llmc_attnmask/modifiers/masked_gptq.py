"""``MaskedGPTQModifier``: llm-compressor's GPTQ, changed to keep zeros."""

from typing import ClassVar

from compressed_tensors.distributed import is_distributed
from llmcompressor.core import active_session
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import nn

from llmc_attnmask.modifiers.base import StoredModifier
from llmc_attnmask.runlog.layer_work import layer_work
from llmc_attnmask.solvers.gptq import quantize_weight
from llmc_attnmask.upstream.gptq import quantizing_with


class MaskedGPTQModifier(GPTQModifier, StoredModifier):
    """
    GPTQ for pruned weights: exact zeros stay zero, and only survivors compensate for
    the survivors' rounding errors.

    Fields, schemes and life cycle are those of ``GPTQModifier``. A weight without zeros
    is quantized by ``GPTQModifier``'s own code, bit for bit.

    Sample yaml:

    ```yaml
    quant_stage:
      quant_modifiers:
        MaskedGPTQModifier:
          scheme: W8A8
          targets: [Linear]
          ignore: ["re:.*lm_head"]
    ```

    Lifecycle:

    - as ``GPTQModifier``, but
    - on_sequential_epoch_end
        - quantize_weight of ``llmc_attnmask.solvers.gptq``

    :param storage: how sparse layers are saved: "dense", "sparse-24-bitmask" or
        "sparse-bitmask". Defaults to the storage that another modifier of the recipe
        names, or else to "dense"
    """

    keeps_masks: ClassVar[bool] = True

    def compress_module_list(self, module_list: list[nn.Module]) -> None:
        if not module_list or is_distributed():  # ranks have different lists
            self._quantize(module_list)
            return
        others = f" and {len(module_list) - 1} more"
        layer = self._module_names[module_list[0]] + others
        with layer_work(active_session().state.model, self, layer) as work:
            if work.restored:
                for module in module_list:
                    del self._hessians[module], self._num_samples[module]
            else:
                self._quantize(module_list)
                work.changed = list(module_list)

    def _quantize(self, module_list: list[nn.Module]) -> None:
        with quantizing_with(quantize_weight):
            super().compress_module_list(module_list)
