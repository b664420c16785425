"""fit_diag: recovers what a diagonal core can hold, and never claims more than a full core could."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lorazip_core.maths import cp_search as diag
from lorazip_core.maths.cp import als_round, captured, prune, solve_diag, unit
from lorazip_core.maths.cp_search import fit_diag, own_components, polish
from lorazip_core.maths.stack import Stack
from lorazip_core.maths.tucker import Basis, fit_joint

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


def planted(seed: int, components: int, n: int, *, parallel: float) -> Factors:
    """An exact collection whose columns share a direction: cosines of about p²/(1 + p²) for p = ``parallel``."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.nn.functional.normalize(normal(generator, size, components), dim=0)
        + parallel * torch.nn.functional.normalize(normal(generator, size, 1), dim=0)
        for size in (24, 20)
    )
    return [((u * normal(generator, components)).float(), v.mT.float()) for _ in range(n)]


def alike(seed: int, n: int = 12, components: int = 8, own: float = 0.3) -> Factors:
    """Adapters that use some of the same rank-1 matrices, and have a part of their own: many local optima."""
    generator = torch.Generator().manual_seed(seed)
    u, v = normal(generator, 24, components), normal(generator, 20, components)
    chosen = [torch.randperm(components, generator=generator)[:3] for _ in range(n)]
    return [
        ((u[:, c] + own * normal(generator, 24, 3)).float(), (v[:, c].mT + own * normal(generator, 3, 20)).float())
        for c in chosen
    ]


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


# What the search and the polish promise.


def plain_als(factors: Factors, rank: int, seed: int, rounds: int = 150) -> float:
    """The relative squared error of dense ALS in numpy (Harshman 1970) from a random start."""
    tensor = np.stack([(b.double() @ a.double()).numpy() for b, a in factors])
    generator = np.random.default_rng(seed)
    u, v = (generator.standard_normal((size, rank)) for size in tensor.shape[1:])
    for _ in range(rounds):
        c = np.linalg.lstsq((u.T @ u) * (v.T @ v), np.einsum("nij,ir,jr->rn", tensor, u, v), rcond=None)[0].T
        u = np.linalg.lstsq((c.T @ c) * (v.T @ v), np.einsum("nij,nr,jr->ri", tensor, c, v), rcond=None)[0].T
        v = np.linalg.lstsq((c.T @ c) * (u.T @ u), np.einsum("nij,nr,ir->rj", tensor, c, u), rcond=None)[0].T
    return float(((tensor - np.einsum("nr,ir,jr->nij", c, u, v)) ** 2).sum() / (tensor**2).sum())


def gradient(factors: Factors, basis: Basis) -> float:
    """The norm of ∂f/∂(U, V) over that of its largest term, f = ½ Σ‖D_i − U diag(c_i) Vᵀ‖² at the best c_i; dense."""
    u, v = (side.double() for side in basis)
    dense = torch.stack([b.double() @ a.double() for b, a in factors])
    c = solve_diag(torch.einsum("nij,ir,jr->nr", dense, u, v), u, v, ridge=1e-14)
    rest = torch.einsum("nr,ir,jr->nij", c, u, v) - dense
    slopes = [torch.einsum("nij,nr,jr->ir", x, c, v) for x in (rest, dense)]
    slopes += [torch.einsum("nij,nr,ir->jr", x, c, u) for x in (rest, dense)]
    return float(torch.sqrt((slopes[0].square().sum() + slopes[2].square().sum()) / slopes[1].square().sum()))


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_result_is_stationary(seed: int, rank: int) -> None:
    factors = alike(seed)
    assert gradient(factors, fit_diag(stacked(factors), rank)) < 2e-3


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("rank", "own"), [(4, 0.3), (6, 1.0)])
def test_no_worse_than_plain_als_from_ten_random_starts(seed: int, rank: int, own: float) -> None:
    factors = alike(seed, own=own)
    best = min(plain_als(factors, rank, start) for start in range(10))
    assert error(factors, fit_diag(stacked(factors), rank)) <= best * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_every_seed_finds_the_same_optimum(seed: int) -> None:
    factors = alike(7, n=20, components=14)
    assert error(factors, fit_diag(stacked(factors), 6, seed=seed)) == pytest.approx(
        error(factors, fit_diag(stacked(factors), 6, seed=99)), rel=1e-4
    )


@pytest.mark.parametrize("parallel", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_decomposition_is_recovered_though_its_columns_are_nearly_parallel(
    seed: int, parallel: float
) -> None:
    factors = planted(seed, 6, n=15, parallel=parallel)
    assert error(factors, fit_diag(stacked(factors), 6)) < 1e-8


def test_a_nearly_diagonal_collection_loses_its_noise_and_no_more() -> None:
    """Orthogonal columns, strong ones, and a weak rest that no six components can hold."""
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(normal(generator, size, 6)).Q for size in (24, 20))
    clean = [((u * normal(generator, 6)), v.mT) for _ in range(15)]
    factors = [
        (torch.cat([b, 0.02 * normal(generator, 24, 2)], 1).float(), torch.cat([a, normal(generator, 2, 20)]).float())
        for b, a in clean
    ]
    lost = sum(float((x[0] @ x[1] - y[0] @ y[1]).square().sum()) for x, y in zip(clean, factors, strict=True))
    total = sum(float((b @ a).square().sum()) for b, a in factors)
    assert 0.5 * lost / total < error(factors, fit_diag(stacked(factors), 6)) <= lost / total


@pytest.mark.parametrize("rank", [3, 6, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_never_worse_than_the_diagonal_restriction_of_the_joint_solution(seed: int, rank: int) -> None:
    """Its cores made as diagonal as ALS on them can make them, in the joint basis."""
    factors = alike(seed, components=5)
    stack = stacked(factors).to(torch.float64)
    joint = fit_joint(stack, rank)
    inside = Stack(stack.bt @ joint.u, stack.a @ joint.v, stack.adapters, stack.groups)
    u, v = (torch.eye(rank, dtype=torch.float64)[None] for _ in range(2))
    for _ in range(300):
        _, u, v = als_round(inside, u, v)
    restricted = error(factors, Basis(joint.u @ u[0], joint.v @ v[0]))
    assert error(factors, fit_diag(stacked(factors), rank)) <= restricted * (1 + 1e-5)


def test_the_search_starts_from_the_joint_solution_too() -> None:
    """Nearly diagonal joint cores: the rotated joint bases alone are the answer, before any child is born."""
    generator = torch.Generator().manual_seed(5)
    u, v = (torch.linalg.qr(normal(generator, size, 8)).Q for size in (24, 20))
    factors = [((u * normal(generator, 8)).float(), v.mT.float()) for _ in range(30)]
    stack = stacked(factors)
    starts = diag._starts(stack, 8, 12, torch.Generator().manual_seed(0))
    lost = 1 - captured(stack, *starts) / stack.squared_norms().sum()
    warm, random = lost[1 : 1 + diag._WARM], lost[1 + diag._WARM :]
    assert float(warm.max()) < 1e-4 < 0.1 < float(random.min())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_search_starts_from_the_own_components_too(rank: int) -> None:
    """For one adapter these are its truncated SVD, the answer."""
    factors = noisy(15, n=1)
    u, v = diag._starts(stacked(factors), rank, 12, torch.Generator().manual_seed(0))
    values = np.linalg.svd((factors[0][0].double() @ factors[0][1].double()).numpy(), compute_uv=False)
    best = (values[rank:] ** 2).sum() / (values**2).sum()
    assert error(factors, Basis(u[0], v[0])) == pytest.approx(best, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("parallel", [0.0, 3.0])
def test_the_polish_never_falls(seed: int, parallel: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after every number of rounds, from a poor start, over swamps too."""
    stack = stacked(planted(seed, 8, n=10, parallel=parallel)).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    start = [unit(normal(generator, size, 5)) for size in (24, 20)]
    reached = [float(captured(stack, start[0][None], start[1][None]))]
    for rounds in range(1, 40):
        monkeypatch.setattr(diag, "_ROUNDS", rounds)
        u, v = polish(stack, *start)
        reached.append(float(captured(stack, u[None], v[None], ridge=1e-10)))
    total = float(stack.squared_norms().sum())
    assert all(after >= before - 1e-9 * total for before, after in itertools.pairwise(reached))
    assert reached[-1] > reached[0] + 0.1 * total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_polish_is_faster_than_plain_rounds_through_a_swamp(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What extrapolation is for: after as many rounds, a hundredth of the error is left."""
    stack = stacked(planted(seed, 6, n=10, parallel=3.0)).to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    start = [unit(normal(generator, size, 6)) for size in (24, 20)]
    monkeypatch.setattr(diag, "_ROUNDS", 80)
    u, v = (side[None] for side in start)
    for _ in range(80):
        _, u, v = als_round(stack, u, v, ridge=1e-10)
    total = float(stack.squared_norms().sum())
    plain, ours = (
        1 - float(captured(stack, side_u, side_v, ridge=1e-10)) / total
        for side_u, side_v in ((u, v), [side[None] for side in polish(stack, *start)])
    )
    assert ours < 0.01 * plain


def test_a_round_of_als_never_falls_and_solves_each_side() -> None:
    stack = stacked(noisy(10)).to(torch.float64)
    generator = torch.Generator().manual_seed(2)
    u, v = (unit(normal(generator, 3, size, 5)) for size in (24, 20))
    last = torch.zeros(3, dtype=torch.float64)
    for _ in range(20):
        reached, u, v = als_round(stack, u, v)
        assert bool((reached >= last * (1 - 1e-6)).all())
        last = reached


def test_pruning_takes_away_what_does_least_harm() -> None:
    """Eight components, three of them weak, in any order: the five strong ones stay."""
    generator = torch.Generator().manual_seed(4)
    u, v = unit(normal(generator, 2, 24, 8)), unit(normal(generator, 2, 20, 8))
    size = torch.tensor([1.0, 0.01, 1, 1, 0.02, 1, 0.03, 1], dtype=torch.float64)
    factors = [(u[0] * size * normal(generator, 8), v[0].mT) for _ in range(10)]
    kept_u, kept_v = prune(stacked(factors), u, v, 5)
    strong = size > 0.1
    assert kept_u.shape == (2, 24, 5)
    assert torch.equal(kept_u[0], u[0][:, strong])
    assert torch.equal(kept_v[0], v[0][:, strong])


def test_pruning_is_backward_elimination() -> None:
    """Step by step the same as solving again for every component that could go; dense least squares."""
    factors = noisy(16, n=6)
    generator = torch.Generator().manual_seed(7)
    u, v = (unit(normal(generator, size, 3) @ normal(generator, 3, 9)) for size in (24, 20))
    left = list(range(9))
    while len(left) > 3:
        without = [[column for column in left if column != gone] for gone in left]
        left = min(without, key=lambda columns: error(factors, Basis(u[:, columns], v[:, columns])))
    kept_u, kept_v = prune(stacked(factors).to(torch.float64), u[None], v[None], 3)
    assert torch.equal(kept_u[0], u[:, left])
    assert torch.equal(kept_v[0], v[:, left])


def test_pruning_twins_keeps_one_of_each() -> None:
    generator = torch.Generator().manual_seed(6)
    u, v = unit(normal(generator, 24, 4)), unit(normal(generator, 20, 4))
    factors = [(u * normal(generator, 4), v.mT) for _ in range(10)]
    kept, _ = prune(stacked(factors), torch.cat([u, u], 1)[None], torch.cat([v, v], 1)[None], 4)
    assert torch.linalg.matrix_rank(kept[0]) == 4


@pytest.mark.parametrize("rank", [12, 13, 40])
def test_lossless_from_the_stacked_rank_on(rank: int) -> None:
    factors = noisy(11, n=4)
    assert error(factors, fit_diag(stacked(factors), rank)) < 1e-10


def test_twins_are_no_trouble() -> None:
    factors = noisy(12, n=3) * 2
    for rank in (4, 9, 18):
        assert (
            error(factors, fit_diag(stacked(factors), rank))
            <= error(factors[:3], fit_diag(stacked(factors[:3]), rank)) * (1 + 1e-4) + 1e-9
        )


def test_mixed_ranks_are_one_collection() -> None:
    """A zero-padded adapter is the same adapter."""
    factors = [(b[:, : 1 + i % 3], a[: 1 + i % 3]) for i, (b, a) in enumerate(noisy(13))]
    padded = [
        (torch.nn.functional.pad(b, (0, 3 - b.shape[1])), torch.nn.functional.pad(a, (0, 0, 0, 3 - len(a))))
        for b, a in factors
    ]
    assert error(factors, fit_diag(stacked(factors), 5)) == pytest.approx(
        error(padded, fit_diag(stacked(padded), 5)), rel=1e-4
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_of_the_adapters_makes_no_difference(seed: int) -> None:
    factors = alike(seed)
    assert error(factors, fit_diag(stacked(factors[5:] + factors[:5][::-1]), 5)) == pytest.approx(
        error(factors, fit_diag(stacked(factors), 5)), rel=1e-4
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_transposed_updates_have_the_same_optimum(seed: int) -> None:
    factors = alike(seed)
    transposed = [(a.mT.contiguous(), b.mT.contiguous()) for b, a in factors]
    assert error(transposed, fit_diag(stacked(transposed), 5)) == pytest.approx(
        error(factors, fit_diag(stacked(factors), 5)), rel=1e-4
    )


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_growing_the_rank_never_hurts(seed: int) -> None:
    factors = alike(seed, n=9)
    errors = [error(factors, fit_diag(stacked(factors), rank)) for rank in (1, 2, 4, 6, 9, 13, 18, 27)]
    assert all(after <= before * (1 + 1e-4) + 1e-9 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-9


def test_own_components_are_the_largest_singular_triplets() -> None:
    factors = [(b * 10.0**-i, a) for i, (b, a) in enumerate(noisy(14, n=3))]
    u, v = own_components(stacked(factors), 4)
    left, _, right = torch.linalg.svd(factors[0][0] @ factors[0][1])
    torch.testing.assert_close((u[:, :3] * v[0, :3]).abs(), (left[:, :3] * right[:3, 0]).abs(), atol=1e-4, rtol=1e-3)
    assert u.shape == (24, 4)
