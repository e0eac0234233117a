"""Least-squares solvers that fail, in the two ways in which they can."""

import math

import pytest
import torch


def overflow(_hessian, _target, weight, *_):
    return weight * math.nan


def fail(*_):
    raise torch.linalg.LinAlgError("did not converge")


@pytest.fixture(params=[("solve", overflow), ("choose_mask", fail)])
def failing_solver(request, monkeypatch):
    function, fault = request.param
    monkeypatch.setattr(f"llmc_attnmask.solvers.least_squares.{function}", fault)
