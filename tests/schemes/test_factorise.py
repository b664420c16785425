"""The encoder: what it says that it stores costs exactly that, and nothing stored beside it would cost less."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lorazip_core.maths.batch import Batch
from lorazip_core.maths.encode import Shared, encode_diag, encode_individual, encode_joint
from lorazip_core.maths.stack import ScaledStack, Stack

Method = Literal["joint", "diag"]
Factors = list[tuple[torch.Tensor, torch.Tensor]]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
METHODS: list[Method] = ["joint", "diag"]


def collection(seed: int = 0, ranks: tuple[int, ...] = (3, 1, 4, 3, 2, 4), d_out: int = 24, d_in: int = 20) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)) for rank in ranks
    ]


def dense(factors: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    return factors[0].double().numpy() @ factors[1].double().numpy()


def encode(
    factors: Factors, method: Method, rank: int, dtype: torch.dtype, weights: torch.Tensor | None = None
) -> Shared:
    stack = Stack.of(factors, list(range(len(factors))))
    weights = 1 / stack.squared_norms().double() if weights is None else weights[list(stack.adapters)]
    if method == "diag":
        return encode_diag(ScaledStack.of(stack), weights, rank=rank, dtype=dtype, seed=0)
    alone = torch.zeros(len(factors), dtype=torch.int64)
    return encode_joint([ScaledStack.of(stack)], [alone], [weights], 1, rank=rank, dtype=dtype, seed=0)[0]


def stored_update(shared: Shared, row: int) -> np.ndarray:
    u, v, core = (x.double().numpy() for x in (shared.u, shared.v, shared.cores[row]))
    return (u * core if core.ndim == 1 else u @ core) @ v.T


def true_errors(shared: Shared, factors: Factors) -> np.ndarray:
    rows = enumerate(shared.members)
    return np.array([((dense(factors[member]) - stored_update(shared, row)) ** 2).sum() for row, member in rows])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_shared_errors_are_those_of_what_is_stored(method: Method, dtype: torch.dtype, rank: int) -> None:
    factors = collection()
    shared = encode(factors, method, rank, dtype)
    assert shared.members == (0, 1, 2, 3, 4, 5)
    assert {shared.u.dtype, shared.v.dtype, shared.cores.dtype} == {dtype}
    np.testing.assert_allclose(shared.squared_errors.numpy(), true_errors(shared, factors), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_in", [20, 40])
def test_shared_errors_that_are_rounding_themselves_are_exact_too(dtype: torch.dtype, d_in: int) -> None:
    """At the stacked rank only rounding is left: 1e-15 of the energy in float32."""
    factors = collection(1, d_in=d_in)
    shared = encode(factors, "joint", 64, dtype)
    truth = true_errors(shared, factors)
    energy = np.array([(dense(each) ** 2).sum() for each in factors])
    assert float((truth / energy).max()) < {torch.bfloat16: 1e-4, torch.float16: 1e-6, torch.float32: 1e-13}[dtype]
    np.testing.assert_allclose(shared.squared_errors.numpy(), truth, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cores_are_optimal_for_the_rounded_bases(method: Method, dtype: torch.dtype) -> None:
    """The stored core is the least squares solution, rounded: nothing is lost that the rounded bases could hold."""
    factors = collection(2)
    shared = encode(factors, method, 5, dtype)
    u, v = shared.u.double().numpy(), shared.v.double().numpy()
    columns = np.einsum("ir,js->ijrs", u, v).reshape(24 * 20, -1)
    if method == "diag":
        columns = columns[:, ::6]  # r = s
    for row, member in enumerate(shared.members):
        best = np.linalg.lstsq(columns, dense(factors[member]).ravel(), rcond=None)[0]
        core = shared.cores[row].double().numpy().ravel()
        step = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}[dtype]
        # solve_diag adds a ridge of 1e-6 to its Gram matrix
        slack = 1e-9 if method == "joint" else 1e-4
        np.testing.assert_allclose(core, best, rtol=1.01 * step + slack, atol=slack * np.abs(best).max())


@pytest.mark.parametrize("method", METHODS)
def test_no_other_core_is_better(method: Method) -> None:
    factors = collection(3)
    shared = encode(factors, method, 5, torch.float32)
    generator = torch.Generator().manual_seed(0)
    before = true_errors(shared, factors)
    for _ in range(20):
        step = torch.randn(shared.cores.shape, generator=generator) * 0.05 * shared.cores.abs().mean()
        moved = Shared(shared.u, shared.v, shared.cores + step, shared.members, shared.squared_errors)
        assert bool((true_errors(moved, factors) > before).all())


@pytest.mark.parametrize("method", METHODS)
def test_a_heavier_adapter_is_served_better(method: Method) -> None:
    factors = collection(4, (4,) * 8)
    light = encode(factors, method, 4, torch.float32, torch.tensor([1.0] * 8))
    heavy = encode(factors, method, 4, torch.float32, torch.tensor([1.0] * 5 + [1e4] + [1.0] * 2))
    assert float(heavy.squared_errors[5]) < 0.2 * float(light.squared_errors[5])


def test_a_weight_of_zero_takes_no_part_in_the_fit() -> None:
    factors = collection(5, (4, 4, 4))
    alone = encode(factors[:1], "joint", 4, torch.float32)
    beside = encode(factors, "joint", 4, torch.float32, torch.tensor([1.0, 0.0, 0.0]))
    assert float(beside.squared_errors[0]) < 1e-10 * float((dense(factors[0]) ** 2).sum())
    torch.testing.assert_close(alone.u @ alone.u.mT, beside.u @ beside.u.mT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_update_is_stored_as_zero(method: Method) -> None:
    factors = [*collection(6), (torch.zeros(24, 3), torch.randn(3, 20, generator=torch.Generator().manual_seed(0)))]
    shared = encode(factors, method, 5, torch.bfloat16, torch.tensor([1.0] * 6 + [0.0]))
    assert float(shared.cores[6].abs().max()) == 0
    assert float(shared.squared_errors[6]) == 0
    nothing = encode(factors[6:], method, 2, torch.bfloat16, torch.tensor([0.0]))
    assert float(nothing.cores.abs().max()) == 0
    assert bool(torch.isfinite(nothing.u.float()).all())


@pytest.mark.parametrize("method", METHODS)
def test_a_core_that_float16_cannot_hold_costs_infinitely_much(method: Method) -> None:
    """It is for the caller to keep that adapter in another way; the others do not suffer from it."""
    factors = collection(7)
    factors[2] = (factors[2][0] * 1e6, factors[2][1])
    shared = encode(factors, method, 4, torch.float16)
    assert shared.squared_errors.isinf().tolist() == [False, False, True, False, False, False]
    assert bool(shared.cores.isfinite().all())
    assert bool(encode(factors, method, 4, torch.bfloat16).squared_errors.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_individual_errors_are_those_of_what_is_stored(dtype: torch.dtype, rank: int) -> None:
    b, a = (
        torch.stack(side).double() for side in zip(*collection(9, (4, 4, 4)), strict=True)
    )  # as compress reads them
    (stored_b, stored_a), errors = encode_individual(b, a, rank, dtype)
    kept = min(rank, 4)
    assert (stored_b.shape, stored_a.shape) == ((3, 24, kept), (3, kept, 20))
    assert {stored_b.dtype, stored_a.dtype} == {dtype}
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}[dtype]
    for i in range(3):
        update = dense((b[i], a[i]))
        values = np.linalg.svd(update, compute_uv=False)
        truth = ((update - dense((stored_b[i], stored_a[i]))) ** 2).sum()
        assert float(errors[i]) == pytest.approx(truth, rel=1e-6)
        best = (values[rank:] ** 2).sum()
        assert best * (1 - 1e-9) <= truth <= best + 50 * step**2 * (values**2).sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_individual_b_is_optimal_for_the_rounded_a(dtype: torch.dtype) -> None:
    ((b, a),) = collection(10, (4,))
    (stored_b, stored_a), _ = encode_individual(b, a, 3, dtype)
    best = np.linalg.lstsq(stored_a.double().numpy().T, dense((b, a)).T, rcond=None)[0].T
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}[dtype]
    np.testing.assert_allclose(stored_b.double().numpy(), best, rtol=1.01 * step, atol=step * 1e-3)


def test_individual_handles_zero_low_rank_and_overflow() -> None:
    zero = torch.zeros(24, 4), torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    (stored_b, _), error = encode_individual(*zero, 2, torch.bfloat16)
    assert float(stored_b.abs().max()) == float(error) == 0
    ((b, a),) = collection(11, (4,))
    b[:, 2:] = 0  # a rank of 2 in factors of 4
    _, error = encode_individual(b, a, 4, torch.float32)
    assert float(error) < 1e-13 * float((dense((b, a)) ** 2).sum())
    (stored_b, _), error = encode_individual(b * 1e6, a, 2, torch.float16)
    assert float(error) == float("inf")
    assert bool(stored_b.isfinite().all())


@pytest.mark.parametrize("rank", [3, 30])
def test_one_batch_is_held_at_a_time(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the basis is fitted to is freed before the cores are solved for; also with nothing to search, at rank 30."""
    made: list[weakref.ref[Batch]] = []
    usual = Batch._built

    def only(*args: Any) -> Batch:
        assert [each() for each in made] == [None] * len(made)
        batch = usual(*args)
        made.append(weakref.ref(batch))
        return batch

    monkeypatch.setattr(Batch, "_built", only)
    stacks = [ScaledStack.of(Stack.of(collection(seed), list(range(6)))) for seed in (0, 1)]
    owners = [torch.full((6,), problem) for problem in (0, 1)]
    encode_joint(stacks, owners, [torch.ones(6)] * 2, 2, rank=rank, dtype=torch.float32, seed=0)
    assert len(made) == 2
