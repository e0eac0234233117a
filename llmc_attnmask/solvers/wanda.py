"""Wanda's scores (arXiv 2306.11695), where masks start and what they fall back to."""

from torch import Tensor


def wanda_scores(weight: Tensor, hessian: Tensor) -> Tensor:
    """|W| * ||x||, [rows, columns].

    :param weight: [rows, columns]
    :param hessian: X^T X [columns, columns]
    """
    return weight.abs() * hessian.diagonal().sqrt()
