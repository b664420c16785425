"""The standard normal distribution, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_EULER = 0.5772156649  # the mean of a Gumbel variable


def mass_below(x: Tensor) -> Tensor:
    """The share of numbers that are below x."""
    return 0.5 * (1 + torch.special.erf(x / math.sqrt(2)))


def density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def greatest(count: int) -> float:
    """About the greatest of the absolute values of so many numbers."""
    logarithm = math.log(2 * max(count, 2))
    most = math.sqrt(2 * logarithm)
    return most + (_EULER - 0.5 * (math.log(logarithm) + math.log(4 * math.pi))) / most
