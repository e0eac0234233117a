"""What the package ships so that nothing need be downloaded: a tiny model, text."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The tiny Llama (GQA, RoPE) that ``scripts/train_tiny_model.py`` trained."""
