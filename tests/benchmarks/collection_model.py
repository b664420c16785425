"""A random model of a collection of adapters, fitted to real ones: draws any number that share as much as those do.

Write D_i = Σ_k s_ik u_ik v_ikᵀ in each module. Left and right singular vectors are random directions, made
orthonormal in the order of k:

    u_k = Q diag(c_k)^½ g_k,    v_k = P diag(e_k)^½ h_k,

with random orthogonal Q, P and variances c_k, e_k that sum to 1. Few large variances mean that adapters share
directions. c_k mixes a spectrum that belongs to the first component, one of the second, one common to all others, and
the flat one; each is a power law (t + t₀)^−a, so that it has a tail that 32 adapters cannot show. The scores g_k and
h_k of an adapter are correlated with each other (adapters that share left directions share the matching right ones) and
with those of its other modules (tasks that are alike are alike everywhere):

    g = π f + (1−π²)^½ ε,    h = π f + (1−π²)^½ ε',    f = τ F + (1−τ²)^½ ε'',    F of the adapter, f of its module,

F uniform, the others normal.

All of it is set by unbiased estimates from pairs and triples of different adapters, which do not mistake the 1/n of
each adapter with itself for sharing: E (u_ik·u_jl)², E (v_ik·v_jl)², E (u_ik·u_jk)(v_ik·v_jk), and for the first
component E (x_i·x_j)(x_j·x_k)(x_k·x_i), the second and third moments of its spectrum. Making vectors unit and
orthogonal changes them, so the moments that go in are corrected until those that come out are right.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from real_adapters import Svds
from torch import Tensor

_ROUNDS = 6  # of correction
_TRIAL = 128  # adapters drawn in each
_EXPONENTS = torch.arange(0.5, 3.55, 0.1, dtype=torch.float64)


@dataclass(frozen=True)
class Moments:
    """What pairs (i ≠ j) and triples of adapters share in one module, in float64."""

    left: Tensor  # [r, r]: mean (u_ik·u_jl)²
    right: Tensor  # [r, r]: mean (v_ik·v_jl)²
    paired: Tensor  # [r]: mean (u_ik·u_jk)(v_ik·v_jk)
    left_triple: Tensor  # []: mean (u_i1·u_j1)(u_j1·u_k1)(u_k1·u_i1)
    right_triple: Tensor

    def parts(self) -> tuple[Tensor, ...]:
        return self.left, self.right, self.paired, self.left_triple, self.right_triple


@dataclass(frozen=True)
class ModuleModel:
    """Variances along Q and P for every component, [r, d_out] and [r, d_in], and π² [r]."""

    left: Tensor
    right: Tensor
    pairing: Tensor


def moments(u: Tensor, v: Tensor) -> Moments:
    """Of singular vectors u [n, d_out, r] and v [n, d_in, r], paired in sign."""
    n, rank = u.shape[0], u.shape[2]
    different = (~torch.eye(n, dtype=torch.bool))[:, :, None, None]
    left, right = (_products(x) * different for x in (u, v))  # [n, n, r, r]
    pairs = n * (n - 1)
    both = torch.stack([(left[:, :, k, k] * right[:, :, k, k]).sum() for k in range(rank)])
    first, second = (x.square().sum((0, 1)) / pairs for x in (left, right))
    third, fourth = (torch.linalg.matrix_power(x[:, :, 0, 0], 3).trace() / (pairs * (n - 2)) for x in (left, right))
    return Moments(first, second, both / pairs, third, fourth)


def fit(real: Svds, seed: int) -> ModuleModel:
    """The model whose draws have the moments of ``real``."""
    target = moments(real.u, real.v)
    going_in = target
    sizes = real.u.shape[1], real.v.shape[1]
    for step in range(_ROUNDS + 1):
        model = _model(going_in, *sizes, seed)
        if step == _ROUNDS:
            break
        generator = torch.Generator().manual_seed(seed + step)
        scores = draw_scores(_TRIAL, real.s.shape[1], max(sizes), generator)
        reached = moments(*draw(model, scores, 1.0, generator, rotate=False))
        damping = 1 / (1 + step / 2)  # the draws are noisy: corrections average over the rounds
        floors = 1 / sizes[0], 1 / sizes[1], 0.0, 0.0, 0.0
        triplets = zip(going_in.parts(), target.parts(), reached.parts(), floors, strict=True)
        going_in = Moments(*(_corrected(part, goal, got, floor, damping) for part, goal, got, floor in triplets))
    return model


def draw_scores(count: int, rank: int, size: int, generator: torch.Generator) -> Tensor:
    """F [count, rank, size], uniform in [−√3, √3]: no adapter has several times as much in common as others."""
    return (2 * torch.rand(count, rank, size, generator=generator) - 1) * math.sqrt(3)


def draw(
    model: ModuleModel, scores: Tensor, tau: float, generator: torch.Generator, *, rotate: bool = True
) -> tuple[Tensor, Tensor]:
    """Singular vectors [n, d_out, r] and [n, d_in, r] of adapters with ``scores`` F [n, r, ≥ d].

    Without ``rotate`` Q and P are the identity: enough for anything that depends on inner products alone.
    """
    count, rank = scores.shape[:2]
    sides = (model.left, model.right)
    shared = min(side.shape[1] for side in sides)
    own = torch.randn(count, rank, shared, generator=generator)
    f = tau * scores[:, :, :shared] + math.sqrt(1 - tau**2) * own
    paired = model.pairing.sqrt()[None, :, None]
    vectors = []
    for variances in sides:
        g = torch.randn(count, rank, variances.shape[1], generator=generator)
        g[:, :, :shared] = paired * f + (1 - paired.square()).sqrt() * g[:, :, :shared]
        q, r = torch.linalg.qr((g * variances.sqrt()).mT)
        vectors.append(q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :])  # the first vector stays as it is
    return vectors[0], vectors[1]


def rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix [size, size]."""
    q: Tensor = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed))).Q
    return q


def seed_of(*words: object) -> int:
    """A seed that depends on the words and on nothing else."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def power_law(square: float, cube: float | None, size: int) -> Tensor:
    """λ [size] ∝ (t + t₀)^−a with Σλ = 1, Σλ² = ``square`` and Σλ³ nearest to ``cube``; a = 1.2 without a cube."""
    exponents = _EXPONENTS if cube is not None else torch.tensor([1.2], dtype=torch.float64)
    low, high = torch.full_like(exponents, math.log(0.03)), torch.full_like(exponents, math.log(1e4))
    for _ in range(30):  # Σλ² falls with t₀
        middle = (low + high) / 2
        above = _laws(exponents, middle, size).square().sum(1) > square
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    laws = _laws(exponents, low, size)
    best = (laws.pow(3).sum(1) / cube).log().abs().argmin() if cube is not None else 0
    return laws[int(best)]


def _laws(exponents: Tensor, log_first: Tensor, size: int) -> Tensor:
    """(t + t₀)^−a of unit sum for every exponent a and ln t₀, [a, size]."""
    laws = (torch.arange(size, dtype=torch.float64) + log_first.exp()[:, None]) ** -exponents[:, None]
    return laws / laws.sum(1, keepdim=True)


def _products(x: Tensor) -> Tensor:
    """x_ik·x_jl of x [n, d, r], as [n, n, r, r] in float64."""
    n, _, rank = x.shape
    rows = x.mT.flatten(0, 1)
    return (rows @ rows.mT).double().reshape(n, rank, n, rank).transpose(1, 2)


def _corrected(going_in: Tensor, target: Tensor, reached: Tensor, floor: float, damping: float) -> Tensor:
    """``going_in`` times target / reached, both above what unrelated vectors share; a noisy ratio is bounded."""
    least = 0.02 * max(floor, float(target.abs().max()) * 0.01)
    ratio = (target - floor).clamp_min(least) / (reached - floor).clamp_min(least)
    return floor + (going_in - floor).clamp_min(least) * ratio.clamp(0.5, 2).pow(damping)


def _model(wanted: Moments, d_out: int, d_in: int, seed: int) -> ModuleModel:
    shared = min(d_out, d_in)
    generator = torch.Generator().manual_seed(seed)
    # Where the three spectra have their large variances: matching left and right directions have one number.
    orders = [torch.arange(shared), *(torch.randperm(shared, generator=generator) for _ in range(2))]
    left = _variances(wanted.left, float(wanted.left_triple), d_out, orders)
    right = _variances(wanted.right, float(wanted.right_triple), d_in, orders)
    most = (left[:, :shared] * right[:, :shared]).sum(1)  # E (u_i·u_j)(v_i·v_j) if g = h
    return ModuleModel(left.float(), right.float(), (wanted.paired / most).clamp(0, 1).sqrt().float())


def _variances(squares: Tensor, triple: float, size: int, orders: list[Tensor]) -> Tensor:
    """Variances [r, size] that give ``squares`` [r, r]: ⟨c_k, c_l⟩, if the three spectra are unrelated.

    With weights w_kt of spectrum t of Σλ² = m_t + 1/d, c_k = Σ_t w_kt λ_t + (1 − Σ_t w_kt)/d has ⟨c_k, c_l⟩ − 1/d =
    Σ_t w_kt w_lt m_t: a triangular factorisation for the first two, and the best rank-one one of what is left.
    """
    flat = 1 / size
    excess = squares - flat
    rank = len(squares)
    weights = torch.zeros(rank, 3, dtype=torch.float64)
    first = power_law(max(float(squares[0, 0]), 1.05 * flat), max(triple, flat**2), size)
    m = [float(first.square().sum()) - flat, 0.0, 0.0]
    spectra = [first]
    weights[0, 0] = 1
    if rank > 1:
        weights[1:, 0] = (excess[0, 1:] / m[0]).clamp(0, 0.9)
        weights[1, 1] = 1 - weights[1, 0]
        own = float(excess[1, 1] - weights[1, 0] ** 2 * m[0]) / float(weights[1, 1]) ** 2
        m[1] = min(max(own, 1e-4 * flat), 0.9)
        spectra.append(power_law(m[1] + flat, None, size))
    if rank > 2:
        rest = excess[1, 2:] - weights[1, 0] * weights[2:, 0] * m[0]
        room = (0.95 - weights[2:, 0]).clamp_min(0)
        weights[2:, 1] = torch.minimum((rest / (weights[1, 1] * m[1])).clamp_min(0), room)
        w0, w1 = weights[2:, 0], weights[2:, 1]
        left_over = excess[2:, 2:] - m[0] * torch.outer(w0, w0) - m[1] * torch.outer(w1, w1)
        share = left_over.mean(1).clamp_min(0)
        share = share / math.sqrt(max(float(share.mean()), 1e-12))  # left_over ≈ share shareᵀ
        root = max(float((share / (1 - w0 - w1).clamp_min(0.05)).max()), 1e-3)
        m[2] = min(root**2, 0.9)
        weights[2:, 2] = share / math.sqrt(m[2])
        spectra.append(power_law(m[2] + flat, None, size))
    variances = (1 - weights.sum(1, keepdim=True)).clamp_min(0) * flat
    variances = variances.repeat(1, size)
    for spectrum, order, weight in zip(spectra, orders, weights.T, strict=False):
        places = torch.cat([order, torch.arange(len(order), size)])
        placed = torch.zeros(size, dtype=torch.float64)
        placed[places] = spectrum
        variances += weight[:, None] * placed
    return variances / variances.sum(1, keepdim=True)
