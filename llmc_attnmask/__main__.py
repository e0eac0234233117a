"""``python -m llmc_attnmask``: the command, for torchrun to start."""

from llmc_attnmask.cli import main

main()
