"""Wanda's scores (arXiv 2306.11695): the start and the fallback of the solvers."""

from torch import Tensor


def wanda_scores(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return Wanda's scores, |W| * ||x||, [rows, columns].

    :param weight: [rows, columns]
    :param hessian: X^T X [columns, columns]
    """
    return weight.abs() * hessian.diagonal().sqrt()
