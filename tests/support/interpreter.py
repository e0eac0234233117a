"""Triton kernels on the CPU; Triton reads the variable once, at its first import."""

import os

import pytest

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs TRITON_INTERPRET=1 before Triton's first import",
)
