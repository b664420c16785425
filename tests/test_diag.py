"""fit_diag: recovers what a diagonal core can hold, and never claims more than a full core could."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lorazip_core.cp import solve_diag
from lorazip_core.diag import fit_diag
from lorazip_core.joint import Basis, fit_joint
from lorazip_core.stack import Stack

Factors = list[tuple[torch.Tensor, torch.Tensor]]


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def exact(seed: int, components: int, n: int, d_out: int = 24, d_in: int = 20) -> Factors:
    """n updates U diag(c_i) Vᵀ of the same ``components`` rank-1 matrices, which are not orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    u, v = normal(generator, d_out, components), normal(generator, d_in, components)
    return [((u * normal(generator, components)).float(), v.mT.float()) for _ in range(n)]


def noisy(seed: int, n: int = 10, d_out: int = 24, d_in: int = 20, rank: int = 3) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return [(normal(generator, d_out, rank).float(), normal(generator, rank, d_in).float()) for _ in range(n)]


def stacked(factors: Factors) -> Stack:
    return Stack.of(factors, list(range(len(factors))))


def error(factors: Factors, basis: Basis) -> float:
    """Σ‖D_i − U diag(c_i) Vᵀ‖² / Σ‖D_i‖² with the best c_i by dense least squares in float64."""
    u, v = (side.double().numpy() for side in basis)
    columns = np.stack([np.outer(u[:, r], v[:, r]).ravel() for r in range(u.shape[1])], axis=1)
    dense = np.stack([(b.double() @ a.double()).numpy().ravel() for b, a in factors], axis=1)
    rest = dense - columns @ np.linalg.lstsq(columns, dense, rcond=None)[0]
    return float((rest**2).sum() / (dense**2).sum())


def joint_error(factors: Factors, rank: int) -> float:
    u, v = (side.double() for side in fit_joint(stacked(factors), rank))
    dense = torch.stack([b.double() @ a.double() for b, a in factors])
    return float((dense - u @ (u.mT @ dense @ v) @ v.mT).square().sum() / dense.square().sum())


@pytest.mark.parametrize("components", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_exact_collection_is_recovered(components: int, seed: int) -> None:
    factors = exact(seed, components, n=12)
    assert error(factors, fit_diag(stacked(factors), components)) < 1e-6


@pytest.mark.parametrize(("n", "rank"), [(1, 2), (4, 3), (10, 8), (10, 30), (3, 64)])
def test_columns_have_unit_norm(n: int, rank: int) -> None:
    for side, size in zip(fit_diag(stacked(noisy(0, n)), rank), (24, 20), strict=True):
        assert side.shape == (size, min(rank, 3 * n))
        torch.testing.assert_close(side.norm(dim=0), torch.ones(side.shape[1]))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rank", [1, 4, 10])
def test_a_diagonal_core_cannot_beat_a_full_one(seed: int, rank: int) -> None:
    factors = noisy(seed)
    found = error(factors, fit_diag(stacked(factors), rank))
    assert joint_error(factors, rank) * (1 - 1e-4) <= found < 1


def test_a_larger_rank_is_better() -> None:
    factors = noisy(3)
    errors = [error(factors, fit_diag(stacked(factors), rank)) for rank in (1, 2, 4, 8, 16)]
    assert all(after < before for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("rank", [1, 2, 3, 7])
def test_one_adapter_gets_its_truncated_svd(rank: int) -> None:
    factors = noisy(4, n=1)
    values = np.linalg.svd((factors[0][0].double() @ factors[0][1].double()).numpy(), compute_uv=False)
    best = (values[rank:] ** 2).sum() / (values**2).sum()
    assert error(factors, fit_diag(stacked(factors), rank)) == pytest.approx(best, rel=1e-3, abs=1e-6)


def test_a_rank_above_the_dimensions_is_of_use() -> None:
    """Up to 30 components in 12 × 10: far more than orthogonal columns could be, and far better."""
    factors = noisy(5, n=10, d_out=12, d_in=10)
    at_ten, at_thirty = (error(factors, fit_diag(stacked(factors), rank)) for rank in (10, 30))
    assert at_thirty < 0.3 * at_ten


@pytest.mark.parametrize("rank", [1, 3, 30])
def test_all_zero_updates_get_unit_columns_and_zero_cores(rank: int) -> None:
    stack = stacked([(torch.zeros(24, 3), torch.randn(3, 20)) for _ in range(4)])
    u, v = fit_diag(stack, rank)
    torch.testing.assert_close(u.norm(dim=0), torch.ones(u.shape[1]))
    torch.testing.assert_close(v.norm(dim=0), torch.ones(v.shape[1]))
    cores = solve_diag(stack.sums((stack.bt @ u) * (stack.a @ v)), u, v)
    assert float(cores.abs().max()) == 0


def test_zero_updates_among_others_change_nothing() -> None:
    factors = exact(6, 3, n=6)
    zeros = [(torch.zeros(24, 2), torch.randn(2, 20))]
    assert error(factors, fit_diag(stacked(factors + zeros), 3)) < 1e-6


@pytest.mark.parametrize("exponent", [-30, 30])
def test_the_size_of_all_updates_makes_no_difference(exponent: int) -> None:
    factors = noisy(7)
    scaled = [(b * 2.0**exponent, a) for b, a in factors]
    before, after = (error(each, fit_diag(stacked(each), 4)) for each in (factors, scaled))
    assert after == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_way_of_writing_the_factors_makes_no_difference(seed: int) -> None:
    factors = exact(seed, 4, n=8)
    generator = torch.Generator().manual_seed(seed)
    turned = []
    for b, a in factors:
        turn = torch.linalg.qr(normal(generator, 4, 4)).Q * torch.linspace(0.5, 2, 4, dtype=torch.float64)
        turned.append(((b.double() @ turn).float(), torch.linalg.solve(turn, a.double()).float()))
    assert error(turned, fit_diag(stacked(turned), 4)) < 1e-6


def test_the_same_seed_gives_the_same_bits() -> None:
    stack = stacked(noisy(8))
    first, second = fit_diag(stack, 4, seed=5), fit_diag(stack, 4, seed=5)
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.v, second.v)


def test_solve_diag_is_the_least_squares_solution() -> None:
    factors = noisy(9)
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.nn.functional.normalize(normal(generator, size, 5), dim=0) for size in (24, 20))
    stack = stacked(factors).to(torch.float64)
    cores = solve_diag(stack.sums((stack.bt @ u) * (stack.a @ v)), u, v)
    columns = np.stack([np.outer(u[:, r], v[:, r]).ravel() for r in range(5)], axis=1)
    dense = np.stack([(b.double() @ a.double()).numpy().ravel() for b, a in factors], axis=1)
    expected = np.linalg.lstsq(columns, dense, rcond=None)[0].T
    np.testing.assert_allclose(cores.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
