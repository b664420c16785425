"""What second moments of a module's inputs say of an update: how much each direction of x counts, and in few numbers.

With H = E[x xᵀ], an error ΔW − ΔŴ changes the outputs by E‖(ΔW − ΔŴ) x‖² = ‖(ΔW − ΔŴ) H^½‖_F². So with W close to H^½,
the truncated SVD of ΔW W times W⁻¹ is the best ΔŴ of its rank for outputs, as that of ΔW is for weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLED = 16
_POWER_STEPS = 3


def weighting(moments: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """W = (H / h̄ + λ I)^½ and W⁻¹, both [..., d_in, d_in], symmetric, in float64, for H of that shape.

    h̄ is the mean of the diagonal of H, so that the scale of the inputs does not count; a zero H gives √λ I. λ =
    ``damping`` > 0 is what a direction counts which the inputs do not have: the larger, the closer to a plain SVD. By
    the eigenvalues of H, of which those below 0 are rounding and count as 0. Raises ValueError for a λ not above 0.
    """
    if not damping > 0:
        raise ValueError(f"the damping has to be above 0, not {damping}")
    h = moments.double()
    h = (h + h.mT) / 2
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
    scale = torch.where(mean > 0, mean, 1.0)
    values, vectors = torch.linalg.eigh(h / scale[..., None, None])
    root = (values.clamp_min(0) + damping).sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


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
