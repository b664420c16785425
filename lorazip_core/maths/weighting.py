"""What second moments of a module's inputs say of an update: how much each direction of x counts, and in few numbers.

With H = E[x xᵀ], an error ΔW − ΔŴ changes the outputs by E‖(ΔW − ΔŴ) x‖² = tr (ΔW − ΔŴ) H (ΔW − ΔŴ)ᵀ. So for outputs,
rows of weights are compared by a H bᵀ where for weights alone it is a bᵀ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 0.3
"""What a direction counts that the inputs do not have, beside the mean of those that they do have."""

_OVERSAMPLED = 16
_POWER_STEPS = 3


class InputMoments(NamedTuple):
    """H = VᵀV + diag(rest) of the inputs of m modules, scaled so that the diagonal of each has a mean of 1."""

    directions: Tensor
    """V [m, k, d_in]"""
    rest: Tensor
    """[m, d_in], at least 0"""

    @classmethod
    def of(cls, diagonals: Tensor, directions: Tensor) -> InputMoments:
        """From the ``diagonals`` of H [m, d_in] and its leading directions V [m, k, d_in], in float64.

        What V has on the diagonal beyond that of H is rounding, and stays. An H of zeros stays one.
        """
        v = directions.double()
        rest = (diagonals.double() - v.square().sum(-2)).clamp_min(0)
        mean = (rest + v.square().sum(-2)).mean(-1, keepdim=True)
        scale = torch.where(mean > 0, mean, 1.0)
        return cls(v / scale.sqrt().unsqueeze(-1), rest / scale)

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        """x H yᵀ [m, i, j] of rows x [m, i, d_in] and y [m, j, d_in]."""
        v = self.directions.mT
        return (x @ v) @ (y @ v).mT + (x * self.rest.unsqueeze(-2)) @ y.mT

    def root(self, x: Tensor) -> Tensor:
        """Rows [..., m, i, k + d_in] whose products are those of x [..., m, i, d_in] under H: x H^½, turned."""
        return torch.cat([x @ self.directions.mT, x * self.rest.sqrt().unsqueeze(-2)], -1)


def leading_directions(moments: Tensor, rank: int) -> Tensor:
    """V [k, d_in] in float64 with VᵀV close to the best approximation of H [d_in, d_in] of rank k, ``rank`` or d_in.

    Rows are eigenvectors times the roots of their eigenvalues, descending, the largest entry of each positive. By
    random columns, a few times multiplied with H and made orthonormal (Halko, Martinsson and Tropp 2011), always the
    same ones; exact where k is not much smaller than d_in.
    """
    h = moments.double()
    size = h.shape[-1]
    columns = 2 * rank + _OVERSAMPLED
    if columns >= size:
        values, vectors = torch.linalg.eigh(h)
    else:
        random = torch.randn(size, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        basis = torch.linalg.qr(h @ random.to(h.device)).Q
        for _ in range(_POWER_STEPS):
            basis = torch.linalg.qr(h @ basis).Q
        values, inner = torch.linalg.eigh(basis.mT @ h @ basis)
        vectors = basis @ inner
    k = min(rank, size)
    top = (vectors[:, -k:] * values[-k:].clamp_min(0).sqrt()).flip(-1).mT
    sign = top.gather(-1, top.abs().argmax(-1, keepdim=True)).sign()
    return torch.where(sign == 0, 1.0, sign) * top
