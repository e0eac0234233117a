"""Pack and unpack whole checkpoints, with their report and model card."""

import warnings
from pathlib import Path

from llmc_attnmask.checkpoint import convert
from llmc_attnmask.checkpoint.config import PackedStorage
from llmc_attnmask.checkpoint.convert import Conversion
from llmc_attnmask.checkpoint.selection import CheckpointWarning
from llmc_attnmask.report.mark import CARD, PAGE, REPORT, is_ours


def pack(
    directory: str | Path,
    output: str | Path,
    *,
    storage: PackedStorage = "sparse-24-bitmask",
    only_2of4: bool = False,
) -> Conversion:
    """Store the sparse layers of a checkpoint without their zeros.

    With "sparse-24-bitmask", these are the layers that the config's marker names as
    2:4, or without a marker, every Linear of the decoder layers. They must be exactly
    2:4, with +0.0 as every pruned entry. Layers that servers fuse (q, k and v; gate and
    up) are packed together or stay dense together, with a warning.

    With "sparse-bitmask", they are all Linears of the decoder layers in which at least
    an eighth of the entries is +0.0, wherever.

    Report and model card are updated.

    :param directory: dense-stored checkpoint of any origin
    :param output: folder to create; must not exist or must be empty
    :param storage: "sparse-24-bitmask" or "sparse-bitmask"
    :param only_2of4: pack as "sparse-24-bitmask" whatever is 2:4, named or not, and
        leave the others dense
    :raises NotTwoOfFourError: for a layer that is not 2:4, unless ``only_2of4``
    :raises NothingToPackError: if no layer can be packed
    :raises ValueError: if files cannot be read or are already packed, or if the output
        is inside the input
    :raises FileExistsError: if the output folder exists and is not empty
    :raises OSError: if it cannot be written; no partial output is left
    """
    conversion = convert.to_packed(
        directory, output, storage=storage, only_2of4=only_2of4
    )
    _update_report(Path(output))
    return conversion


def unpack(directory: str | Path, output: str | Path) -> Conversion:
    """Store the packed layers of a checkpoint dense, with zeros in place.

    The marker in the config names these layers. Report and model card are updated.

    :param directory: packed checkpoint of any origin
    :param output: folder to create; must not exist or must be empty
    :raises ValueError: if it is not packed, its parts do not fit together, files cannot
        be read, or the output is inside the input
    :raises FileExistsError: if the output folder exists and is not empty
    :raises OSError: if it cannot be written; no partial output is left
    """
    conversion = convert.to_dense(directory, output)
    _update_report(Path(output))
    return conversion


def _update_report(output: Path) -> None:
    """Render the copied report and card again: they describe the other storage."""
    if not (output / REPORT).is_file():
        return
    try:
        from llmc_attnmask.report.files import render

        render(output)
    except Exception as error:
        # a serving environment has no plotly; a wrong page is worse than none
        (output / PAGE).unlink(missing_ok=True)
        card = output / CARD
        if card.is_file() and is_ours(card.read_text(encoding="utf-8")):
            card.unlink()
        warnings.warn(
            f"report and model card are left out: {error}",
            CheckpointWarning,
            stacklevel=3,
        )
