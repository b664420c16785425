"""The weighting that second moments give, by the properties that define it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorazip_core.maths.factored import truncated_svd
from lorazip_core.maths.weighting import leading_directions, weighting


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(size: int, seed: int, rank: int | None = None) -> Tensor:
    """Of inputs whose directions differ much in size."""
    x = random(size, rank or 3 * size, seed=seed)
    x = x * torch.logspace(2, -2, size, dtype=torch.float64)[:, None]
    return x @ x.mT


@given(size=st.integers(1, 12), rank=st.integers(1, 20), seed=st.integers(0, 99), damping=st.floats(1e-4, 1e3))
@settings(max_examples=60, deadline=None)
def test_it_is_the_root_and_its_inverse(size: int, rank: int, seed: int, damping: float) -> None:
    h = moments(size, seed, rank)
    w, inverse = weighting(h.float(), damping)
    eye = torch.eye(size, dtype=torch.float64)
    h = h.float().double()
    expected = h / h.diagonal().mean() + damping * eye
    assert w.dtype == inverse.dtype == torch.float64
    torch.testing.assert_close(w, w.mT)
    torch.testing.assert_close(w @ w, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(w @ inverse, eye, rtol=0, atol=1e-7)


def test_neither_scale_nor_batching_show() -> None:
    batch = torch.stack([moments(9, seed) for seed in range(3)])
    both = weighting(batch, 0.1)
    for number, h in enumerate(batch):
        for stacked, single in zip(both, weighting(1e-6 * h, 0.1), strict=True):
            torch.testing.assert_close(stacked[number], single, rtol=1e-9, atol=1e-9)


def test_no_inputs_count_all_directions_alike() -> None:
    w, inverse = weighting(torch.zeros(4, 4), 0.25)
    torch.testing.assert_close(w, 0.5 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(inverse, 2 * torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_without_damping_there_is_no_inverse(damping: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        weighting(torch.eye(2), damping)


def lost(update: Tensor, approximation: Tensor, h: Tensor) -> float:
    """E‖(ΔW − ΔŴ) x‖²."""
    rest = update - approximation
    return float((rest @ h * rest).sum())


@given(seed=st.integers(0, 999), rank=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_the_weighted_svd_loses_least_of_the_outputs(seed: int, rank: int) -> None:
    b, a, h = random(10, 5, seed=seed), random(5, 12, seed=seed + 1), moments(12, seed)
    h = h / h.diagonal().mean()
    w, inverse = weighting(h, 1e-9)
    u, v = truncated_svd(b, a @ w, rank)
    best = lost(b @ a, u @ v @ inverse, h)
    plain_u, plain_v = truncated_svd(b, a, rank)
    assert best <= lost(b @ a, plain_u @ plain_v, h) * (1 + 1e-6)
    for other in range(5):
        moved = u @ v @ inverse + 0.01 * random(10, 1, seed=other) @ random(1, 12, seed=other + 50)
        again_u, again_v = truncated_svd(moved, torch.eye(12, dtype=torch.float64), rank)
        assert best <= lost(b @ a, again_u @ again_v, h) * (1 + 1e-6)


def test_much_damping_is_a_plain_svd() -> None:
    b, a = random(10, 5), random(5, 12, seed=1)
    w, inverse = weighting(moments(12, 2), 1e8)
    u, v = truncated_svd(b, a @ w, 2)
    plain_u, plain_v = truncated_svd(b, a, 2)
    torch.testing.assert_close(u @ v @ inverse, plain_u @ plain_v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "rank"), [(1, 4), (20, 5), (20, 40), (150, 8)])
def test_leading_directions_are_those_of_the_largest_eigenvalues(size: int, rank: int) -> None:
    h = moments(size, 3)
    v = leading_directions(h, rank)
    assert v.shape == (min(rank, size), size)
    values = torch.linalg.eigvalsh(h).flip(0)[: len(v)]
    torch.testing.assert_close(v.square().sum(-1), values, rtol=1e-6, atol=1e-9 * float(values[0]))
    torch.testing.assert_close(h @ v.mT, v.mT * values, rtol=1e-4, atol=1e-5 * float(values[0]) ** 1.5)
    assert torch.equal(v, leading_directions(h, rank))
    assert (v.gather(-1, v.abs().argmax(-1, keepdim=True)) >= 0).all()
