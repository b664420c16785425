"""The weighting that second moments give, by the properties that define it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorazip_core.maths.weighting import InputMoments, leading_directions


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(size: int, seed: int, rank: int | None = None) -> Tensor:
    """Of inputs whose directions differ much in size."""
    x = random(size, rank or 3 * size, seed=seed)
    x = x * torch.logspace(2, -2, size, dtype=torch.float64)[:, None]
    return x @ x.mT


def kept(h: Tensor, k: int) -> InputMoments:
    """What a file of moments keeps of H [m, d, d], with k directions."""
    directions = torch.stack([leading_directions(each, k) for each in h])
    return InputMoments.of(h.diagonal(dim1=-2, dim2=-1), directions)


def dense(inputs: InputMoments) -> Tensor:
    return inputs.directions.mT @ inputs.directions + torch.diag_embed(inputs.rest)


@given(size=st.integers(1, 12), k=st.integers(1, 14), seed=st.integers(0, 99), scale=st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_it_is_h_with_a_diagonal_of_mean_1(size: int, k: int, seed: int, scale: float) -> None:
    h = torch.stack([moments(size, seed), moments(size, seed + 1)])
    inputs = kept(scale * h, k)
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    found = dense(inputs)
    torch.testing.assert_close(
        found.diagonal(dim1=-2, dim2=-1), (h / mean).diagonal(dim1=-2, dim2=-1), rtol=1e-6, atol=1e-9
    )
    if k >= size:
        torch.testing.assert_close(found, h / mean, rtol=1e-6, atol=1e-8 * size)


@given(size=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_products_are_those_of_h(size: int, seed: int) -> None:
    inputs = kept(torch.stack([moments(size, seed), moments(size, seed + 1)]), 3)
    x, y = random(2, 4, size, seed=seed), random(2, 3, size, seed=seed + 5)
    expected = x @ dense(inputs) @ y.mT
    torch.testing.assert_close(inputs.between(x, y), expected)
    torch.testing.assert_close(inputs.root(x) @ inputs.root(y).mT, expected)


def test_no_inputs_are_of_no_weight() -> None:
    inputs = InputMoments.of(torch.zeros(1, 4), torch.zeros(1, 2, 4))
    assert not dense(inputs).any()


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
