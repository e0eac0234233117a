"""Triton kernels on CPU: Triton reads the variable once, when it is imported first."""

import os

import pytest

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs TRITON_INTERPRET=1 before Triton is imported first",
)
