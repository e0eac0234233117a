"""What the package ships so that nothing need be downloaded: a tiny model, text."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The tiny Llama (GQA, RoPE) that ``scripts/train_tiny_model.py`` trained."""

# Beside this file in a wheel, at the top of a clone.
_PLACES = (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes")


def recipes() -> dict[str, Path]:
    """The recipes that the package ships, name -> file."""
    folder = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
