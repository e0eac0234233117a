"""``python -m llmc_attnmask.cli``, as ``python -m llmc_attnmask``."""

from llmc_attnmask.cli.main import main

main()
