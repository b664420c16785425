"""linalg: factored norms, distances and SVDs against dense float64 matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazip_core.linalg import orthonormal, squared_distance, squared_norm, truncated_svd

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
seeds = st.integers(0, 2**32)
few = settings(max_examples=40, deadline=None, derandomize=True)


def pair(seed: int, d_out: int, d_in: int, rank: int, *batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(*batch, d_out, rank, generator=generator, dtype=torch.float64)
    return b, torch.randn(*batch, rank, d_in, generator=generator, dtype=torch.float64)


def dense(b: torch.Tensor, a: torch.Tensor) -> np.ndarray:
    return b.double().numpy() @ a.double().numpy()


@few
@given(shapes, seeds)
def test_squared_norm_and_distance_are_those_of_dense_matrices(shape: tuple[int, int, int], seed: int) -> None:
    d_out, d_in, rank = shape
    x, y = pair(seed, d_out, d_in, rank, 2), pair(seed + 1, d_out, d_in, rank + 3, 2)
    assert squared_norm(*x).numpy() == pytest.approx((dense(*x) ** 2).sum((1, 2)))
    assert squared_distance(x, y).numpy() == pytest.approx(((dense(*x) - dense(*y)) ** 2).sum((1, 2)))


def test_norm_and_distance_do_not_depend_on_the_dtype_of_the_factors() -> None:
    x = tuple(factor.float() for factor in pair(0, 8, 7, 3))
    y = tuple(factor.bfloat16() for factor in pair(1, 8, 7, 2))
    assert squared_norm(*y).dtype == squared_distance(x, y).dtype == torch.float64
    assert float(squared_norm(*y)) == pytest.approx((dense(*y) ** 2).sum(), rel=1e-12)
    assert float(squared_distance(x, y)) == pytest.approx(((dense(*x) - dense(*y)) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("exponent", [-2, -6, -10, -13, -16, -20])
def test_distance_keeps_six_digits_when_it_nearly_cancels(exponent: int) -> None:
    b, a = pair(3, 24, 20, 4, 3)
    extra_b, extra_a = pair(4, 24, 20, 2, 3)
    size = (10.0**exponent * squared_norm(b, a) / squared_norm(extra_b, extra_a)).sqrt()
    step = extra_b * size[:, None, None]
    turn = torch.linalg.qr(pair(5, 4, 4, 4)[0]).Q  # y = x + step, with x written in other factors
    y = torch.cat([b @ turn, step], -1), torch.cat([turn.mT @ a, extra_a], -2)
    truth = squared_norm(step, extra_a)
    relative = 1e-6 if exponent >= -16 else 1e-2
    torch.testing.assert_close(squared_distance((b, a), y), truth, rtol=relative, atol=0.0)


def test_distance_judges_each_matrix_of_a_batch_on_its_own() -> None:
    x, y = pair(0, 9, 8, 3, 4), pair(1, 9, 8, 3, 4)
    y[0][1], y[1][1] = x[0][1], x[1][1]
    y[0][3] = x[0][3] * (1 + 1e-7)
    y[1][3] = x[1][3]
    expected = ((dense(*x) - dense(*y)) ** 2).sum((1, 2))
    got = squared_distance(x, y)
    assert float(got[1]) <= 1e-28 * float(squared_norm(*x)[1])
    assert got[[0, 2, 3]].numpy() == pytest.approx(expected[[0, 2, 3]], rel=1e-6)


def test_distance_from_and_to_zero() -> None:
    x = pair(0, 6, 5, 2)
    zero = torch.zeros(6, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    assert float(squared_distance(x, zero)) == pytest.approx(float(squared_norm(*x)))
    assert float(squared_distance(zero, x)) == pytest.approx(float(squared_norm(*x)))
    assert float(squared_distance(zero, zero)) == 0
    assert float(squared_norm(*zero)) == 0


@few
@given(shapes, seeds, st.integers(1, 14))
def test_truncated_svd_is_the_best_of_its_rank(shape: tuple[int, int, int], seed: int, rank: int) -> None:
    b, a = pair(seed, *shape)
    us, vt = truncated_svd(b, a, rank)
    values = np.linalg.svd(dense(b, a), compute_uv=False)
    kept = min(rank, *shape)
    assert us.shape == (shape[0], kept)
    assert vt.shape == (kept, shape[1])
    lost = ((dense(b, a) - dense(us, vt)) ** 2).sum()
    assert lost == pytest.approx((values[rank:] ** 2).sum(), abs=1e-12 * (values**2).sum())  # Eckart and Young
    np.testing.assert_allclose(us.norm(dim=0).numpy(), values[:kept], rtol=1e-9, atol=1e-9 * values[0])
    np.testing.assert_allclose((vt @ vt.mT).numpy(), np.eye(kept), atol=1e-12)


def test_truncated_svd_fixes_signs_whatever_the_factors() -> None:
    b, a = pair(7, 12, 9, 4)
    turn = pair(8, 4, 4, 4)[0]
    us, vt = truncated_svd(b, a, 3)
    for other_b, other_a in [(-b, -a), (b @ turn, torch.linalg.solve(turn, a)), (b.flip(1), a.flip(0))]:
        other_us, other_vt = truncated_svd(other_b, other_a, 3)
        torch.testing.assert_close(other_us, us)
        torch.testing.assert_close(other_vt, vt)
    largest = vt.gather(1, vt.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())
    torch.testing.assert_close(truncated_svd(-b, a, 3)[0], -us)


def test_truncated_svd_of_a_batch_is_that_of_each() -> None:
    b, a = pair(9, 10, 7, 4, 2, 3)
    us, vt = truncated_svd(b, a, 2)
    for i in range(2):
        for j in range(3):
            one_us, one_vt = truncated_svd(b[i, j], a[i, j], 2)
            torch.testing.assert_close(us[i, j], one_us)
            torch.testing.assert_close(vt[i, j], one_vt)


def test_truncated_svd_of_zero_is_zero_with_orthonormal_rows() -> None:
    us, vt = truncated_svd(torch.zeros(2, 6, 3), torch.randn(2, 3, 5), 2)
    assert float(us.abs().max()) == 0
    torch.testing.assert_close(vt @ vt.mT, torch.eye(2).expand(2, 2, 2))
    us, vt = truncated_svd(torch.zeros(6, 3), torch.zeros(3, 5), 3)
    assert bool(torch.isfinite(vt).all())
    assert float(us.abs().max()) == 0


def test_orthonormal_spans_the_columns_even_when_they_are_dependent() -> None:
    x = pair(0, 9, 4, 2)[0] @ pair(0, 9, 4, 2)[1]  # four columns of rank 2
    basis = orthonormal(x)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(basis @ (basis.mT @ x), x)
