"""Cores for bases that are given, against least squares on dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lorazip_core.maths.encode import Shared, project_diag, project_joint
from lorazip_core.maths.stack import ScaledStack, Stack

D_OUT, D_IN = 14, 11
RANKS = {7: 3, 2: 1, 5: 3, 0: 2}  # by the number of the adapter, which a stack orders by rank


def updates() -> tuple[ScaledStack, dict[int, np.ndarray]]:
    generator = torch.Generator().manual_seed(0)
    factors = [
        (torch.randn(D_OUT, r, generator=generator), torch.randn(r, D_IN, generator=generator)) for r in RANKS.values()
    ]
    stack = Stack.of(factors, list(RANKS))
    scales = torch.tensor([0.5 + adapter for adapter in stack.adapters], dtype=torch.float64)
    dense = {
        adapter: (0.5 + adapter) * b.double().numpy() @ a.double().numpy()
        for adapter, (b, a) in zip(RANKS, factors, strict=True)
    }
    return ScaledStack(stack, scales), dense


def bases(left: int, right: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(D_OUT, left, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(D_IN, right, generator=generator)).Q
    return u.to(dtype), v.to(dtype)  # not quite orthonormal any more


def check(found: Shared, dense: dict[int, np.ndarray], atoms: np.ndarray, dtype: torch.dtype) -> None:
    """``atoms`` [D_OUT · D_IN, cores] are what the numbers of a core are multiplied by."""
    assert found.members == tuple(sorted(RANKS))
    assert found.cores.dtype == dtype
    for row, adapter in enumerate(found.members):
        target = dense[adapter].ravel()
        best = np.linalg.lstsq(atoms, target, rcond=None)[0]
        core = found.cores[row].double().numpy().ravel()
        slack = max(torch.finfo(dtype).eps, 4e-6)  # the ridge that keeps the diagonal problem solvable
        np.testing.assert_allclose(core, best, rtol=0, atol=slack * abs(best).max())
        lost = np.square(target - atoms @ core).sum()
        np.testing.assert_allclose(float(found.squared_errors[row]), lost, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_cores_are_those_of_least_squares(dtype: torch.dtype) -> None:
    stack, dense = updates()
    u, v = bases(5, 4, dtype)
    atoms = np.kron(u.double().numpy(), v.double().numpy())
    check(project_joint(stack, u, v), dense, atoms, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diagonal_cores_are_those_of_least_squares(dtype: torch.dtype) -> None:
    stack, dense = updates()
    u, v = bases(6, 6, torch.float32)
    mixing = torch.eye(6) + 0.3 * torch.ones(6, 6)  # far from orthogonal, as the columns of a diagonal basis may be
    u, v = ((side @ mixing / (side @ mixing).norm(dim=0)).to(dtype) for side in (u, v))
    atoms = np.stack([np.outer(u[:, k].double().numpy(), v[:, k].double().numpy()).ravel() for k in range(6)], 1)
    check(project_diag(stack, u, v), dense, atoms, dtype)


def test_a_core_that_the_dtype_cannot_hold_has_no_error_to_speak_of() -> None:
    stack, _ = updates()
    huge = ScaledStack(stack.rows, stack.factors * 1e6)
    found = project_joint(huge, *bases(5, 4, torch.float16))
    assert found.squared_errors.isinf().all()
    assert not found.cores.any()
