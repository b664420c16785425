"""fit_joint: properties that any solver of the problem has, and optima that it has to find."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazip_core.maths import tucker as joint
from lorazip_core.maths.factored import truncated_svd
from lorazip_core.maths.stack import Stack
from lorazip_core.maths.tucker import Basis, climb, fit_joint, hosvd

Factors = list[tuple[torch.Tensor, torch.Tensor]]


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def collection(seed: int, n: int = 8, d_out: int = 24, d_in: int = 20, rank: int = 4, own: float = 1.0) -> Factors:
    """n updates that share a part of ``rank`` directions a side; ``own`` is the size of the rest."""
    generator = torch.Generator().manual_seed(seed)
    left, right = normal(generator, d_out, rank), normal(generator, rank, d_in)
    return [
        (
            (left @ normal(generator, rank, rank) + own * normal(generator, d_out, rank)).float(),
            (normal(generator, rank, rank) @ right + own * normal(generator, rank, d_in)).float(),
        )
        for _ in range(n)
    ]


def stacked(factors: Factors) -> Stack:
    return Stack.of(factors, list(range(len(factors))))


def error(factors: Factors, basis: Basis) -> float:
    """Σ‖D_i − U UᵀD_iV Vᵀ‖² / Σ‖D_i‖² by dense float64 matrices."""
    u, v = (side.double().numpy() for side in basis)
    lost = total = 0.0
    for b, a in factors:
        dense = b.double().numpy() @ a.double().numpy()
        lost += ((dense - u @ (u.T @ dense @ v) @ v.T) ** 2).sum()
        total += (dense**2).sum()
    return lost / total if total else 0.0


def fitted(factors: Factors, rank: int, seed: int = 0) -> float:
    return error(factors, fit_joint(stacked(factors), rank, seed=seed))


def plain_hooi(factors: Factors, rank: int, generator: np.random.Generator, rounds: int = 500) -> float:
    """The relative squared error of Tucker-2 by HOOI (De Lathauwer et al. 2000) from a random start, dense float64."""
    updates = np.stack([b.double().numpy() @ a.double().numpy() for b, a in factors])
    v = np.linalg.qr(generator.standard_normal((updates.shape[2], rank)))[0]
    total, last = (updates**2).sum(), 0.0
    for _ in range(rounds):
        half = updates @ v
        u = np.linalg.eigh(np.einsum("nik,njk->ij", half, half))[1][:, -rank:]
        half = updates.transpose(0, 2, 1) @ u
        values, vectors = np.linalg.eigh(np.einsum("nik,njk->ij", half, half))
        v, captured = vectors[:, -rank:], values[-rank:].sum()
        if captured - last < 1e-11 * total:
            break
        last = captured
    return 1 - captured / total


@pytest.mark.parametrize("rank", [1, 3, 7, 19, 20, 22, 24, 64])
def test_columns_are_orthonormal_and_fit_the_sides(rank: int) -> None:
    for side, size in zip(fit_joint(stacked(collection(0)), rank), (24, 20), strict=True):
        assert side.shape == (size, min(rank, size))
        torch.testing.assert_close(side.mT @ side, torch.eye(side.shape[1]), atol=1e-5, rtol=0)


def test_a_larger_rank_is_never_worse() -> None:
    factors = collection(1)
    errors = [fitted(factors, rank) for rank in (1, 2, 4, 6, 8, 12, 16, 20, 24)]
    assert all(after <= before + 1e-7 for before, after in itertools.pairwise(errors))
    assert errors[0] > 0.3 > 0.01 > errors[6]


@pytest.mark.parametrize(
    ("n", "d_out", "d_in", "rank"),
    [(3, 24, 20, 12), (3, 24, 20, 64), (20, 24, 20, 64), (20, 24, 20, 24), (3, 40, 9, 12)],
)
def test_lossless_from_the_stacked_rank_on(n: int, d_out: int, d_in: int, rank: int) -> None:
    """The stacked rank is at most 4 n, and at most the larger side."""
    assert fitted(collection(2, n, d_out, d_in), rank) < 1e-10


@pytest.mark.parametrize(("n", "rank"), [(16, 4), (16, 5), (6, 4)])
def test_an_exactly_low_rank_collection_is_found_though_its_stack_is_taller(n: int, rank: int) -> None:
    assert fitted(collection(3, n, own=0.0), rank) < 1e-10


def test_the_dominant_part_of_a_planted_basis_is_found() -> None:
    """A strong shared 4-dimensional part over a weak rest: at rank 4 what is lost is the rest."""
    factors = collection(4, 30, own=0.02)
    planted = collection(4, 30, own=0.0)
    lost = sum(float((b @ a - c @ d).square().sum()) for (b, a), (c, d) in zip(factors, planted, strict=True))
    total = sum(float((b @ a).square().sum()) for b, a in factors)
    assert fitted(factors, 4) <= lost / total


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 6))
def test_the_way_of_writing_the_factors_makes_no_difference(seed: int, n: int, rank: int) -> None:
    factors = collection(seed, n, 10, 9)
    generator = torch.Generator().manual_seed(seed + 1)
    turned = []
    for b, a in factors:
        turn = torch.linalg.qr(normal(generator, 4, 4)).Q * torch.linspace(0.3, 3, 4, dtype=torch.float64)
        turned.append(((b.double() @ turn).float(), torch.linalg.solve(turn, a.double()).float()))
    assert fitted(turned, rank) == pytest.approx(fitted(factors, rank), rel=1e-4, abs=1e-7)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_the_order_of_the_adapters_makes_no_difference(seed: int, rank: int) -> None:
    factors = collection(seed, 9, 10, 9)
    assert fitted(factors[4:] + factors[:4][::-1], rank) == pytest.approx(fitted(factors, rank), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("exponent", [-20, -8, 8, 20])
def test_the_size_of_all_updates_makes_no_difference(exponent: int) -> None:
    factors = collection(5)
    scaled = [(b * 2.0**exponent, a) for b, a in factors]
    assert fitted(scaled, 6) == pytest.approx(fitted(factors, 6), rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_transposed_updates_have_the_same_optimum(seed: int) -> None:
    factors = collection(seed, 10)
    transposed = [(a.mT.contiguous(), b.mT.contiguous()) for b, a in factors]
    assert fitted(transposed, 5) == pytest.approx(fitted(factors, 5), rel=1e-4)


@pytest.mark.parametrize(
    ("seed", "n", "d_out", "d_in", "rank", "own"),
    [
        (0, 8, 24, 20, 2, 1.0),
        (1, 8, 24, 20, 5, 1.0),
        (2, 30, 24, 20, 4, 3.0),
        (3, 12, 16, 48, 8, 1.0),
        (4, 5, 32, 32, 3, 10.0),
        (5, 40, 12, 12, 1, 10.0),
        (6, 20, 40, 30, 12, 2.0),
    ],
)
def test_no_worse_than_plain_hooi_from_ten_random_starts(
    seed: int, n: int, d_out: int, d_in: int, rank: int, own: float
) -> None:
    factors = collection(seed, n, d_out, d_in, own=own)
    generator = np.random.default_rng(seed)
    best = min(plain_hooi(factors, rank, generator) for _ in range(10))
    assert fitted(factors, rank) <= best * (1 + 1e-5)


def test_all_zero_updates_get_a_basis() -> None:
    factors = [(torch.zeros(24, 4), torch.randn(4, 20)) for _ in range(6)]
    for rank in (3, 64):
        for side in fit_joint(stacked(factors), rank):
            torch.testing.assert_close(side.mT @ side, torch.eye(side.shape[1]), atol=1e-5, rtol=0)


def test_zero_updates_among_others_change_nothing() -> None:
    factors = collection(6, 6)
    zeros = [(torch.zeros(24, 4), torch.randn(4, 20)), (torch.zeros(24, 2), torch.zeros(2, 20))]
    assert fitted(factors + zeros, 4) == pytest.approx(fitted(factors, 4), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_one_adapter_gets_its_truncated_svd(rank: int) -> None:
    factors = collection(7, 1)
    (b, a) = factors[0]
    us, vt = truncated_svd(b.double(), a.double(), rank)
    lost = float((b.double() @ a.double() - us @ vt).square().sum() / (b.double() @ a.double()).square().sum())
    assert fitted(factors, rank) == pytest.approx(lost, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("n", [1, 5])
def test_one_dimension_is_enough_for_updates_of_one_row_or_column(n: int) -> None:
    assert fitted(collection(8, n, 1, 20), 20) < 1e-10
    assert fitted(collection(8, n, 24, 1), 24) < 1e-10
    basis = fit_joint(stacked(collection(8, n, 24, 1)), 3)
    assert [tuple(side.shape) for side in basis] == [(24, min(3, 4 * n)), (1, 1)]


def test_mixed_ranks_are_one_collection() -> None:
    """A zero-padded adapter is the same adapter."""
    factors = [(b[:, : 1 + i % 4], a[: 1 + i % 4]) for i, (b, a) in enumerate(collection(9, 8))]
    padded = [
        (torch.nn.functional.pad(b, (0, 4 - b.shape[1])), torch.nn.functional.pad(a, (0, 0, 0, 4 - a.shape[0])))
        for b, a in factors
    ]
    assert fitted(padded, 5) == pytest.approx(fitted(factors, 5), rel=1e-4)


def test_the_same_seed_gives_the_same_bits() -> None:
    factors = collection(10)
    first, second = fit_joint(stacked(factors), 5, seed=3), fit_joint(stacked(factors), 5, seed=3)
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.v, second.v)


@pytest.mark.parametrize("rank", [1, 4, 9, 20])
def test_climbing_never_loses(rank: int) -> None:
    stack = stacked(collection(11, 20))
    generator = torch.Generator().manual_seed(0)
    start = Basis(*(torch.linalg.qr(torch.randn(size, min(rank, size), generator=generator)).Q for size in (24, 20)))
    for basis in (start, hosvd(stack, rank)):
        bases = [climb(stack, basis, rounds=rounds) for rounds in (0, 1, 2, 8)]
        reached = [float(stack.cores(*found).double().square().sum()) for found in bases]
        assert all(torch.equal(*sides) for sides in zip(bases[0], basis, strict=True))
        assert all(after >= before * (1 - 1e-6) for before, after in itertools.pairwise(reached))


def test_of_bases_that_span_the_same_the_better_one_goes_on() -> None:
    """Whatever columns they have: the third is the first, turned; the fourth shares only its V."""
    generator = torch.Generator().manual_seed(0)
    first, second, other = (torch.linalg.qr(normal(generator, 12, 4)).Q for _ in range(3))
    turned = first @ torch.linalg.qr(normal(generator, 4, 4)).Q
    u, v = torch.stack([first, second, turned, other])[None], torch.stack([first, second, turned, first])[None]
    reached = torch.tensor([[1.0, 2.0, 3.0, 0.5]])
    best, _ = joint._best_distinct(u, v, reached, 3)
    assert torch.equal(best[0], torch.stack([turned, second, other]))


def test_of_bases_that_differ_by_rounding_the_first_goes_on() -> None:
    generator = torch.Generator().manual_seed(1)
    bases = torch.stack([torch.linalg.qr(normal(generator, 12, 4)).Q for _ in range(3)])[None]
    best, _ = joint._best_distinct(bases, bases, torch.tensor([[1.0, 2.0, 2.0 + 1e-7]]), 1)
    assert torch.equal(best[0, 0], bases[0, 1])
