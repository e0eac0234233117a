"""Pack and unpack whole checkpoints, with their report and model card."""

import warnings
from pathlib import Path

from llmc_attnmask.checkpoint import convert
from llmc_attnmask.checkpoint.convert import CheckpointWarning, Conversion
from llmc_attnmask.report.mark import CARD, PAGE, REPORT, is_ours


def pack(
    directory: str | Path, output: str | Path, *, only_2of4: bool = False
) -> Conversion:
    """Store the 2:4 layers of a checkpoint as sparse-24-bitmask.

    They are those that the config's marker names, or without a marker, every Linear of
    the decoder layers. They must be exactly 2:4, with +0.0 as every pruned entry.
    Layers that servers fuse (q, k and v; gate and up) are packed together or stay dense
    together, with a warning. Report and model card are updated.

    :param directory: dense-stored checkpoint of any origin
    :param output: folder to create; must not exist or must be empty
    :param only_2of4: pack whatever is 2:4, named or not, and leave the others dense
    :raises NotTwoOfFourError: for a layer that is not 2:4, unless ``only_2of4``
    :raises NothingToPackError: if no layer can be packed
    :raises ValueError: if files cannot be read or are already packed, or if the output
        is inside the input
    :raises FileExistsError: if the output folder exists and is not empty
    :raises OSError: if it cannot be written; no partial output is left
    """
    conversion = convert.to_packed(directory, output, only_2of4=only_2of4)
    _update_report(Path(output))
    return conversion


def unpack(directory: str | Path, output: str | Path) -> Conversion:
    """Store the sparse-24-bitmask layers of a checkpoint dense, with zeros in place.

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
