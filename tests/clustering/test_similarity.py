"""How alike adapters are, against dense linear algebra in float64."""

from __future__ import annotations

import pytest
import torch
from testing.planted import SHAPES, Adapters, collected, groups, rewritten

from lorazip_core.base.progress import Silent
from lorazip_core.clustering import similarity
from lorazip_core.clustering.similarity import held_out_errors, near_duplicates, similarity_of_all, subspace_similarity
from lorazip_core.maths.chunks import ELEMENTS_AT_ONCE
from lorazip_core.maths.stack import ScaledStack
from lorazip_core.maths.tucker import climb, hosvd


def dense(adapters: Adapters, i: int, module: int) -> torch.Tensor:
    b, a = adapters[i].get(module, (torch.zeros(SHAPES[module][0], 1), torch.zeros(1, SHAPES[module][1])))
    return b.double() @ a.double()


def energy(adapters: Adapters, i: int) -> float:
    return sum(float(dense(adapters, i, m).square().sum()) for m in range(len(SHAPES)))


def test_similarity_is_the_share_in_the_leading_subspaces() -> None:
    adapters, _ = groups([3, 3], rank=4)
    del adapters[1][2]
    found = subspace_similarity(collected(adapters), 3)
    for i in range(6):
        for j in range(6):
            captured = 0.0
            for module in range(len(SHAPES)):
                if module not in adapters[j]:
                    continue
                u, _, vh = torch.linalg.svd(dense(adapters, j, module))
                captured += float((u[:, :3].mT @ dense(adapters, i, module) @ vh[:3].mT).square().sum())
            assert float(found[i, j]) == pytest.approx(captured / energy(adapters, i), abs=1e-5)


def test_similarity_is_high_within_groups_and_depends_on_the_updates_alone() -> None:
    adapters, planted = groups([4, 4], own=0.1)
    found = subspace_similarity(collected(adapters), 4)
    same = torch.tensor(planted)[:, None] == torch.tensor(planted)
    assert float(found[same].min()) > 2 * float(found[~same].max())
    assert torch.allclose(found, subspace_similarity(collected(rewritten(adapters)), 4), atol=1e-4)


def test_similarity_of_some_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, _ = groups([4, 4])
    del adapters[1][2], adapters[6][2], adapters[3][0]
    updates = collected(adapters)
    every = subspace_similarity(updates, 3)
    rows, columns = torch.tensor([0, 3, 4]), torch.tensor([1, 6])
    assert torch.allclose(subspace_similarity(updates, 3, rows, columns), every[rows][:, columns], atol=1e-6)
    monkeypatch.setattr(similarity, "_PAIRS_AT_ONCE", 3)
    monkeypatch.setitem(ELEMENTS_AT_ONCE, "cpu", 1)
    assert torch.allclose(similarity_of_all(updates, 3), every.float(), atol=1e-6)


@pytest.mark.parametrize("most_elements", [2**24, 0])
def test_held_out_error_is_that_of_a_basis_fitted_without_the_adapter(
    monkeypatch: pytest.MonkeyPatch, most_elements: int
) -> None:
    """Closely in a small cluster; about so where a single half-step must do, as in large ones."""
    monkeypatch.setattr(similarity, "_HELD_OUT_ELEMENTS", most_elements)
    adapters, _ = groups([8], own=0.15)
    updates = collected(adapters)
    found = held_out_errors(updates, [0] * 8, 5, seed=0)
    for i in range(8):
        lost = 0.0
        for module in range(len(SHAPES)):
            scaled = updates.load(module)
            stack = scaled.scaled(updates.weights[list(scaled.adapters), module].sqrt())
            others = stack.select(set(range(8)) - {i})
            u, v = (side.double() for side in climb(others, hosvd(others, 5)))
            update = dense(adapters, i, module)
            lost += float(update.square().sum() - (u.mT @ update @ v).square().sum())
        assert float(found[i]) == pytest.approx(lost / energy(adapters, i), rel=0.05 if most_elements else 0.3)


def test_a_stranger_is_held_out_by_all_the_others() -> None:
    adapters, _ = groups([7], own=0.15)
    found = held_out_errors(collected([*adapters, *groups([1], seed=9)[0]]), [0] * 8, 5, seed=0)
    assert float(found[:7].max()) < 0.5
    assert float(found[7]) > 0.8


def test_an_adapter_that_is_alone_is_held_out_by_nobody() -> None:
    adapters, _ = groups([3, 1])
    found = held_out_errors(collected(adapters), [0, 0, 0, 1], 5, seed=0)
    assert float(found[3]) == pytest.approx(1, abs=1e-6)


def test_of_two_the_other_alone_is_the_basis() -> None:
    """Rank 3 in bases of rank 6: the empty columns that are left over serve nobody."""
    adapters, _ = groups([1, 1], rank=3)
    found = held_out_errors(collected(adapters), [0, 0], 6, seed=0)
    alike = subspace_similarity(collected(adapters), 6)
    assert float(found[0]) == pytest.approx(1 - float(alike[0, 1]), abs=0.02)


def perturbed(adapter: dict[int, tuple[torch.Tensor, torch.Tensor]], size: float, seed: int) -> Adapters:
    """An adapter that differs by about ``size``² of its energy."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            module: (b + size * b.norm() / b.numel() ** 0.5 * torch.randn(b.shape, generator=generator), a)
            for module, (b, a) in adapter.items()
        }
    ]


@pytest.mark.parametrize("at_once", [1024, 4])
def test_near_duplicates_are_found_and_measured(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(similarity, "_PAIRS_AT_ONCE", at_once)
    adapters, _ = groups([4, 4])
    adapters += rewritten([adapters[2]])  # 8: the same update, other factors
    adapters += perturbed(adapters[5], 0.2, 1)  # 9
    adapters += perturbed(adapters[6], 0.6, 2)  # 10: too far
    found = near_duplicates(collected(adapters), seed=0, progress=Silent())
    assert [(near.first, near.second) for near in found] == [(2, 8), (5, 9)]
    assert found[0].squared_distance < 1e-10
    distance = sum(
        float((dense(adapters, 5, m) - dense(adapters, 9, m)).square().sum()) for m in range(len(SHAPES))
    ) / max(energy(adapters, 5), energy(adapters, 9))
    assert 0.02 < distance < 0.08
    assert found[1].squared_distance == pytest.approx(distance, rel=1e-4)


def test_of_many_alike_each_is_paired_with_one_earlier() -> None:
    adapters, _ = groups([1])
    found = near_duplicates(collected(adapters * 5), seed=0, progress=Silent())
    assert sorted(near.second for near in found) == [1, 2, 3, 4]
    assert all(near.first < near.second and near.squared_distance == 0 for near in found)


def test_a_missing_module_is_a_difference() -> None:
    """Of all of that module's energy, which is little here."""
    adapters, _ = groups([1])
    adapters[0][0] = (0.3 * adapters[0][0][0], adapters[0][0][1])
    short = {module: factors for module, factors in adapters[0].items() if module != 0}
    own = float(dense(adapters, 0, 0).square().sum()) / energy(adapters, 0)
    assert 0.005 < own < 0.1
    (found,) = near_duplicates(collected([adapters[0], short]), seed=0, progress=Silent())
    assert found.squared_distance == pytest.approx(own, rel=1e-5)


def test_zero_adapters_are_nobodys_duplicates() -> None:
    adapters, _ = groups([2])
    zero = {module: (torch.zeros_like(b), a) for module, (b, a) in adapters[0].items()}
    assert near_duplicates(collected([zero, *adapters, zero]), seed=0, progress=Silent()) == []


def test_similarity_and_held_out_errors_of_mixed_ranks() -> None:
    low, high = groups([3], rank=2)[0], groups([3], rank=5, seed=1)[0]
    updates = collected(low + high)
    assert isinstance(updates.load(0), ScaledStack)
    assert len(updates.load(0).rows.groups) == 2
    found = subspace_similarity(updates, 5)
    assert torch.allclose(found.diagonal(), torch.ones(6, dtype=torch.float64), atol=1e-5)
    assert float(held_out_errors(updates, [0] * 6, 5, seed=0).max()) <= 1
