"""linalg: factored norms, distances and SVDs against dense float64 matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazip_core.maths.factored import cholesky_qr, leading_subspaces, squared_distance, squared_norm, truncated_svd

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


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditioned(seed: int, size: int, count: int, condition: float) -> torch.Tensor:
    """[size, count] of singular values from 1 down to 1 / ``condition``, mixed over the columns."""
    left, right = (torch.linalg.qr(gaussian(seed + i, n, count)).Q for i, n in enumerate((size, count)))
    return left * torch.logspace(0, -np.log10(condition), count, dtype=torch.float64) @ right.mT


@few
@given(st.integers(1, 12), st.integers(0, 12), seeds)
def test_cholesky_qr_is_orthonormal_with_nested_spans(count: int, more: int, seed: int) -> None:
    x = gaussian(seed, 2, count + more, count)
    x[..., more % count] *= 1e-9  # columns may differ in size as they like
    q = cholesky_qr(x)
    torch.testing.assert_close(q.mT @ q, torch.eye(count, dtype=torch.float64).expand(2, -1, -1))
    upper = q.mT @ x
    torch.testing.assert_close(q @ upper, x)
    assert float((upper.tril(-1).abs() / x.norm(dim=-2, keepdim=True)).max()) < 1e-7


@pytest.mark.parametrize(("condition", "passes"), [(1e6, 2), (1e4, 1)])
def test_cholesky_qr_stands_columns_that_nearly_depend_on_each_other(condition: float, passes: int) -> None:
    x = conditioned(0, 40, 12, condition)
    q = cholesky_qr(x, passes)
    torch.testing.assert_close(
        q.mT @ q, torch.eye(12, dtype=torch.float64), atol=1e-6 if passes == 1 else 1e-12, rtol=0
    )
    torch.testing.assert_close(q @ (q.mT @ x), x, atol=1e-9, rtol=0)
    single = cholesky_qr(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.mT @ single, torch.eye(12), atol=1e-5, rtol=0)


def test_cholesky_qr_leaves_zero_columns_zero() -> None:
    x = gaussian(0, 3, 9, 5)
    x[0, :, 0] = x[1, :, [2, 4]] = 0
    x[2] = 0
    q = cholesky_qr(x)
    for matrix, own in zip(x, q, strict=True):
        there = matrix.abs().sum(0) > 0
        torch.testing.assert_close(own.mT @ own, torch.diag(there.double()))
        torch.testing.assert_close(own[:, there], cholesky_qr(matrix[:, there]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_qr_of_dependent_columns_is_finite_and_spans_them(dtype: torch.dtype) -> None:
    x = (gaussian(0, 4, 20, 3) @ gaussian(1, 4, 3, 8)).to(dtype)
    x[1, :, 5] = x[1, :, 0]
    x[2, :, 1:] = x[2, :, :1]
    q = cholesky_qr(x)
    assert bool(torch.isfinite(q).all())
    assert float(q.norm(dim=-2).max()) < 1 + 1e-5
    independent = q[[0, 1, 3], :, :3]
    torch.testing.assert_close(
        independent.mT @ independent, torch.eye(3, dtype=dtype).expand(3, -1, -1), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(independent @ (independent.mT @ x[[0, 1, 3]]), x[[0, 1, 3]], atol=1e-5, rtol=1e-4)


@few
@given(st.tuples(st.integers(5, 9), st.integers(5, 9), st.integers(1, 5)), seeds, st.integers(1, 7))
def test_leading_subspaces_are_those_of_the_svd(shape: tuple[int, int, int], seed: int, rank: int) -> None:
    b, a = pair(seed, *shape, 2)
    u, _, vh = np.linalg.svd(dense(b, a))
    kept = min(rank, shape[2])
    for found, exact in zip(leading_subspaces(b, a, rank), (u[..., :kept], vh[:, :kept].swapaxes(1, 2)), strict=True):
        assert found.shape == (2, exact.shape[1], kept)
        projector = (found @ found.mT).numpy()
        np.testing.assert_allclose(projector, exact @ exact.swapaxes(1, 2), atol=1e-6)


def test_directions_that_an_update_does_not_have_are_zero_columns() -> None:
    b, a = pair(0, 9, 8, 3)
    padded = torch.nn.functional.pad(b, (0, 2)), torch.nn.functional.pad(a, (0, 0, 0, 2))
    for full, found in zip(leading_subspaces(b, a, 3), leading_subspaces(*padded, 5), strict=True):
        torch.testing.assert_close(found @ found.mT, full @ full.mT)
        assert float(found.norm(dim=0)[3:].max()) == 0
    for found in leading_subspaces(torch.zeros(9, 3), torch.zeros(3, 8), 2):
        assert float(found.abs().max()) == 0
