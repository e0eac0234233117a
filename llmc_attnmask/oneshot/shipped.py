"""A tiny model and recipes that the package ships."""

from pathlib import Path

_BUILTIN = Path(__file__).parents[1] / "builtin"

MODEL_DIR = _BUILTIN / "model"
"""The tiny Llama (GQA, RoPE) that ``scripts/train_tiny_model.py`` trained."""

# Recipes are next to the model in a wheel, and at the top level of a clone.
_PLACES = (_BUILTIN / "recipes", Path(__file__).parents[2] / "recipes")


def recipes() -> dict[str, Path]:
    """Return the recipes that the package ships: name -> file."""
    folder = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
