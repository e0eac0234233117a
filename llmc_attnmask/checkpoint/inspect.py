"""What is in a checkpoint, layer by layer, read from its safetensors files alone."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


@dataclass(frozen=True)
class LayerInfo:
    """One weight matrix on disk."""

    name: str  # module path
    format: str  # dtype of a dense weight; "packed" for integers packed in words
    shape: tuple[int, ...]
    sparsity: float | None  # share of entries that are zero; None if packed
    two_of_four: bool | None  # at most two non-zeros in every four inputs of a row
    bytes: int


def inspect(directory: str | Path) -> list[LayerInfo]:
    """Every weight matrix of a checkpoint, one tensor in memory at a time.

    :param directory: folder with .safetensors files
    :raises FileNotFoundError: if there are none
    :raises ValueError: if one cannot be read
    """
    directory = Path(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{directory} has no .safetensors file, so it is not a checkpoint"
        )
    layers: list[LayerInfo] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                layers.extend(
                    info
                    for name in sorted(tensors.keys())
                    if (info := _layer(name, tensors.get_tensor(name))) is not None
                )
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a readable safetensors file: {error}"
            ) from None
    return layers


def _layer(name: str, tensor: Tensor) -> LayerInfo | None:
    module, _, kind = name.rpartition(".")
    if tensor.ndim != 2 or kind not in ("weight", "weight_packed"):
        return None
    size = tensor.numel() * tensor.element_size()
    shape = tuple(tensor.shape)
    if kind == "weight_packed":
        return LayerInfo(module, "packed", shape, None, None, size)
    zero = _is_zero(tensor)
    sparsity = zero.sum().item() / zero.numel()
    two_of_four = shape[1] % 4 == 0 and bool(
        (zero.view(shape[0], -1, 4).sum(-1) >= 2).all()
    )
    dtype = str(tensor.dtype).removeprefix("torch.")
    return LayerInfo(module, dtype, shape, sparsity, two_of_four, size)


def _is_zero(tensor: Tensor) -> Tensor:
    # float8 has no comparison on every device
    return (tensor.float() if tensor.element_size() == 1 else tensor) == 0
