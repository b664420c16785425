"""Stack: every batched product equals a loop over dense updates, with ragged ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazip_core.maths import stack as module
from lorazip_core.maths.stack import Stack

D_OUT, D_IN = 7, 5
collections = st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=7), st.integers(0, 2**32))
few = settings(max_examples=40, deadline=None, derandomize=True)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(ranks: list[int], seed: int) -> tuple[Stack, list[torch.Tensor]]:
    """A stack of adapters numbered 10, 13, 16, … and their dense updates in the order of the stack."""
    factors = [(normal(seed + i, D_OUT, r), normal(seed + 100 + i, r, D_IN)) for i, r in enumerate(ranks)]
    members = [10 + 3 * i for i in range(len(ranks))]
    stack = Stack.of(factors, members)
    return stack, [factors[(member - 10) // 3][0] @ factors[(member - 10) // 3][1] for member in stack.adapters]


def rows_of(stack: Stack) -> list[slice]:
    ends = torch.tensor(stack.ranks).cumsum(0).tolist()
    return [slice(end - rank, end) for end, rank in zip(ends, stack.ranks, strict=True)]


@few
@given(collections)
def test_products_equal_loops_over_dense_updates(collection: tuple[list[int], int]) -> None:
    ranks, seed = collection
    stack, dense = make(ranks, seed)
    u, v = normal(1, D_OUT, 3), normal(2, D_IN, 4)
    close = torch.testing.assert_close
    close(stack.cores(u, v), torch.stack([u.mT @ d @ v for d in dense]))
    close(stack.squared_norms(), torch.stack([d.square().sum() for d in dense]))
    rows = rows_of(stack)
    x = normal(3, len(stack.a), 3)
    close(stack.sums(x), torch.stack([x[own].sum(0) for own in rows]))
    each = normal(6, len(dense), 2)
    close(stack.per_row(each), torch.cat([each[i].expand(own.stop - own.start, -1) for i, own in enumerate(rows)]))


@few
@given(collections)
def test_members_come_by_rank_then_number_with_all_of_their_rows(collection: tuple[list[int], int]) -> None:
    ranks, seed = collection
    stack, dense = make(ranks, seed)
    numbered = sorted((rank, 10 + 3 * i) for i, rank in enumerate(ranks))
    assert list(zip(stack.ranks, stack.adapters, strict=True)) == numbered
    seen = torch.zeros(len(dense))
    for b, a, positions in stack.factors():
        torch.testing.assert_close(b @ a, torch.stack(dense[positions]))
        seen[positions] += 1
    assert seen.tolist() == [1] * len(dense)


def test_the_order_of_the_input_makes_no_difference() -> None:
    ranks = [3, 1, 3, 2, 1]
    factors = [(normal(i, D_OUT, r), normal(50 + i, r, D_IN)) for i, r in enumerate(ranks)]
    there = Stack.of(factors, list(range(5)))
    turned = Stack.of(factors[::-1], list(range(5))[::-1])
    assert there.adapters == turned.adapters
    assert torch.equal(there.bt, turned.bt)
    assert torch.equal(there.a, turned.a)


@few
@given(collections, st.data())
def test_select_keeps_the_wanted_adapters(collection: tuple[list[int], int], data: st.DataObject) -> None:
    ranks, seed = collection
    stack, dense = make(ranks, seed)
    wanted = data.draw(st.sets(st.sampled_from(stack.adapters), min_size=1)) | {999}
    chosen = stack.select(wanted)
    assert chosen.adapters == tuple(member for member in stack.adapters if member in wanted)
    kept = [d for member, d in zip(stack.adapters, dense, strict=True) if member in wanted]
    u, v = torch.eye(D_OUT, dtype=torch.float64), torch.eye(D_IN, dtype=torch.float64)
    torch.testing.assert_close(chosen.cores(u, v), torch.stack(kept))
    assert chosen.ranks == [r for r, member in zip(stack.ranks, stack.adapters, strict=True) if member in wanted]


def test_select_of_nobody_is_an_empty_stack() -> None:
    stack, _ = make([2, 1], 0)
    nobody = stack.select({999})
    assert nobody.adapters == ()
    assert len(nobody.a) == len(nobody.bt) == 0


@few
@given(collections)
def test_scaled_multiplies_every_update_by_its_own_factor(collection: tuple[list[int], int]) -> None:
    ranks, seed = collection
    stack, dense = make(ranks, seed)
    factors = normal(9, len(ranks)).abs()
    eye_u, eye_v = torch.eye(D_OUT, dtype=torch.float64), torch.eye(D_IN, dtype=torch.float64)
    expected = torch.stack([f * d for f, d in zip(factors, dense, strict=True)])
    torch.testing.assert_close(stack.scaled(factors).cores(eye_u, eye_v), expected)
    torch.testing.assert_close(stack.cores(eye_u, eye_v), torch.stack(dense))  # the stack itself is as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_changes_the_dtype_only(dtype: torch.dtype) -> None:
    stack, _ = make([2, 3, 2], 4)
    other = stack.to(dtype)
    assert (other.bt.dtype, other.a.dtype) == (dtype, dtype)
    assert (other.adapters, other.groups) == (stack.adapters, stack.groups)


@few
@given(collections, st.integers(1, 5), st.sampled_from([1, 40, 2**22]))
def test_captured_is_what_each_basis_captures(collection: tuple[list[int], int], bases: int, at_once: int) -> None:
    """However many bases are done at a time."""
    stack, _ = make(*collection)
    u, v = normal(1, bases, D_OUT, 3), normal(2, bases, D_IN, 4)
    expected = torch.stack([stack.cores(u[c], v[c]).square().sum((1, 2)) for c in range(bases)], 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AT_ONCE", {"cpu": at_once})
        torch.testing.assert_close(stack.captured(u, v), expected)
        single = stack.to(torch.float32).captured(u.float(), v.float())
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-4)
