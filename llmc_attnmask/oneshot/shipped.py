"""A tiny model and recipes that the package ships."""

from pathlib import Path

_BUILTIN = Path(__file__).parents[1] / "builtin"

MODEL_DIR = _BUILTIN / "model"
"""The tiny Llama (GQA, RoPE) that ``scripts/train_tiny_model.py`` trained."""

# Beside the model in a wheel, at the top of a clone.
_PLACES = (_BUILTIN / "recipes", Path(__file__).parents[2] / "recipes")


def recipes() -> dict[str, Path]:
    """The recipes that the package ships: name -> file."""
    folder = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
