"""The command ``llmc-attnmask``."""

from llmc_attnmask.cli.commands import app
from llmc_attnmask.cli.main import main

__all__ = ["app", "main"]
