"""Linear algebra on updates kept as factors: ΔW = B A with B [..., d_out, r] and A [..., r, d_in].

No function forms a dense ΔW. All of them take leading batch dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]

TINY = torch.finfo(torch.float64).tiny
"""The least normal number: energies are divided by no less, and of less than that the inverse overflows."""

# Below this share of ‖X‖² the Gram form of a squared distance has lost half of float64's digits to cancellation.
_CANCELLED = 1e-9
_SHIFT = 1e-14  # of a squared column: keeps the Cholesky factor of a singular Gram matrix finite


def squared_norm(b: Tensor, a: Tensor) -> Tensor:
    """‖B A‖_F² = Σ (BᵀB ∘ AAᵀ), in float64, of shape [...]."""
    b, a = b.double(), a.double()
    return ((b.mT @ b) * (a @ a.mT)).sum((-2, -1)).clamp_min(0)


def squared_distance(x: Factors, y: Factors) -> Tensor:
    """‖X − Y‖_F² of two factored matrices of equal shape, in float64, of shape [...]."""
    return squared_norm_and_distance(x, y)[1]


def squared_norm_and_distance(x: Factors, y: Factors) -> tuple[Tensor, Tensor]:
    """‖X‖_F² and ‖X − Y‖_F² of two factored matrices of equal shape, in float64, each of shape [...].

    ‖X − Y‖² = ‖X‖² − 2 Σ (B_xᵀB_y ∘ A_xA_yᵀ) + ‖Y‖², and where that cancels the norm of [B_x, −B_y] [A_x; A_y] by QR of
    both sides. Equal factors are at distance 0 exactly. ``y`` may lack leading dimensions, along which it is the same.
    """
    (b_x, a_x), (b_y, a_y) = ((b.double(), a.double()) for b, a in (x, y))
    norm = squared_norm(b_x, a_x)
    inner = ((b_x.mT @ b_y) * (a_x @ a_y.mT)).sum((-2, -1))
    distance = (norm - 2 * inner + squared_norm(b_y, a_y)).clamp_min(0)
    close = distance <= _CANCELLED * norm
    if close.any():
        b_y, a_y = (z.expand(*distance.shape, *z.shape[-2:]) for z in (b_y, a_y))
        r_b = torch.linalg.qr(torch.cat([b_x[close], -b_y[close]], dim=-1), mode="r").R
        r_a = torch.linalg.qr(torch.cat([a_x[close], a_y[close]], dim=-2).mT, mode="r").R
        distance[close] = (r_b @ r_a.mT).square().sum((-2, -1))
        if b_x.shape == b_y.shape:
            equal = (b_x == b_y).all(-1).all(-1) & (a_x == a_y).all(-1).all(-1)
            distance.masked_fill_(equal, 0.0)
    return norm, distance


def truncated_svd(b: Tensor, a: Tensor, rank: int) -> Factors:
    """The best approximation of B A of rank at most ``rank``: (U Σ [..., d_out, k], Vᵀ [..., k, d_in]).

    Exact, through QR of both factors and the SVD of an r×r matrix; singular values descend. The sign of each pair of
    singular vectors is fixed by making the largest entry of v positive.
    """
    q_b, r_b = _thin_qr(b)
    q_a, r_a = _thin_qr(a.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
    v = q_a @ vh.mT
    sign = v.gather(-2, v.abs().argmax(-2, keepdim=True)).sign()
    sign[sign == 0] = 1
    return q_b @ (u * s.unsqueeze(-2)) * sign, (v * sign).mT


def singular_values(b: Tensor, a: Tensor) -> Tensor:
    """Those of B A [..., r], descending, in float64; one below 10⁻⁷ of the largest may be anything below that.

    The eigenvalues of (BᵀB) (AAᵀ), made symmetric: products of r columns and rows alone, no decomposition of long ones.
    """
    b, a = b.double(), a.double()
    return _of_products(b.mT @ b, a @ a.mT)


def squared_norm_and_singular_values(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """`squared_norm` and `singular_values`, for less than both; of an update that is not finite, these are any."""
    b, a = b.double(), a.double()
    gram_b, gram_a = b.mT @ b, a @ a.mT
    norm = (gram_b * gram_a).sum((-2, -1)).clamp_min(0)
    finite = norm.isfinite()[..., None, None]  # others have no decomposition
    return norm, _of_products(torch.where(finite, gram_b, 0.0), torch.where(finite, gram_a, 0.0))


def _of_products(gram_b: Tensor, gram_a: Tensor) -> Tensor:
    """Singular values from BᵀB = H Hᵀ: the roots of the eigenvalues of Hᵀ (AAᵀ) H."""
    half, info = torch.linalg.cholesky_ex(gram_b)
    singular = info > 0  # columns of B depend on each other: eigenvectors, which take longer, give a root as well
    if singular.any():
        energies, vectors = torch.linalg.eigh(gram_b[singular])
        half[singular] = vectors * energies.clamp_min(0).sqrt().unsqueeze(-2)
    return torch.linalg.eigvalsh(half.mT @ gram_a @ half).clamp_min(0).sqrt().flip(-1)


def leading_subspaces(b: Tensor, a: Tensor, rank: int) -> Factors:
    """Orthonormal bases [..., d_out, k] and [..., d_in, k] of the leading singular vectors of B A, k = ``rank`` or r.

    A direction that the update does not have is a zero column.
    """
    u, v = cholesky_qr(b), cholesky_qr(a.mT)
    if rank >= b.shape[-1]:
        return u, v
    left, _, right = torch.linalg.svd((u.mT @ b) @ (a @ v), full_matrices=False)
    return u @ left[..., :rank], v @ right[..., :rank, :].mT


def cholesky_qr(x: Tensor, passes: int = 2) -> Tensor:
    """Orthonormal columns [..., d, k] in place of those of ``x`` [..., d, k], k ≤ d; the first j span the first j of x.

    Shifted Cholesky QR in float64, twice (Fukaya et al. 2020): products alone, so that many small ones are quick on a
    GPU. One pass is enough for a condition number of some 10⁴. A zero column stays zero, and one that depends on others
    becomes what rounding left of it.
    """
    exact = x.double()
    for _ in range(passes):
        exact, _ = _cholesky_step(exact)
    return exact.to(x.dtype)


def _cholesky_step(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R with Q R = x, in float64; the columns of Q are the more orthonormal the better conditioned x is."""
    gram = x.mT @ x
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.mul_(1 + _SHIFT).add_(diagonal == 0)
    factor = torch.linalg.cholesky_ex(gram).L
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    return x @ torch.linalg.solve_triangular(factor, eye, upper=False).mT, factor.mT


def _thin_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q [..., d, k] and R [..., k, k] with Q R = x. On a GPU by products, which are quick there for many small ones.

    There, directions in which x has no energy to speak of may not be orthogonal to the others: what is built on them
    is right as a product, and has no weight in a sum of squares.
    """
    if x.device.type != "cuda" or x.dtype != torch.float64 or x.shape[-2] < x.shape[-1]:
        q, r = torch.linalg.qr(x)
        return q, r
    first, upper = _cholesky_step(x)
    q, r = _cholesky_step(first)
    return q, r @ upper
