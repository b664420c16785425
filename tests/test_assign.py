"""assign_clusters: planted groups are found, no cluster is empty, and nothing depends on names or on luck."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorazip_core import cluster
from lorazip_core.adapter import open_collection
from lorazip_core.cluster import assign_clusters
from lorazip_core.joint import fit_joint
from lorazip_core.stack import Stack

REAL = Path(__file__).parents[2] / "shared/data/smollm2-r16"
CPU = torch.device("cpu")
SHAPES = [(24, 20), (16, 24), (10, 20), (20, 20), (16, 14)]
Updates = list[dict[int, tuple[Tensor, Tensor]]]
"""Per adapter, the factors of the modules that it has."""


def groups(sizes: list[int], *, seed: int = 0, own: float = 0.3, rank: int = 4) -> tuple[Updates, list[int]]:
    """Adapters of planted groups, each with its own 5 directions a side in every module, and their groups."""
    generator = torch.Generator().manual_seed(seed)
    updates: Updates = []
    planted = []
    for group, size in enumerate(sizes):
        bases = [
            (torch.randn(d_out, 5, generator=generator), torch.randn(5, d_in, generator=generator))
            for d_out, d_in in SHAPES
        ]
        for _ in range(size):
            planted.append(group)
            updates.append({})
            for module, (left, right) in enumerate(bases):
                b = left @ torch.randn(5, rank, generator=generator)
                a = torch.randn(rank, 5, generator=generator) @ right
                b = b + own * torch.randn(b.shape, generator=generator)
                a = a + own * torch.randn(a.shape, generator=generator)
                updates[-1][module] = b * float(torch.rand(1, generator=generator) * 5 + 0.1), a
    return updates, planted


def run(
    updates: Updates, clusters: int, *, rank: int = 5, seed: int = 0, counted: list[int] | None = None
) -> list[int]:
    modules = len(SHAPES)

    def load(module: int) -> Stack:
        members = [i for i, update in enumerate(updates) if module in update]
        return Stack.of([updates[i][module] for i in members], members)

    norms = torch.zeros(len(updates), modules, dtype=torch.float64)
    for module in range(modules):
        stack = load(module)
        norms[list(stack.members), module] = stack.squared_norms().double()
    energy = norms.sum(1, keepdim=True)
    weights = torch.where(energy > 0, 1 / energy, 0.0).expand_as(norms)
    advance = (counted if counted is not None else []).append
    return assign_clusters(load, weights, norms, clusters, rank, seed=seed, device=CPU, advance=advance)


def same_partition(labels: list[int], other: list[int]) -> bool:
    return len(set(zip(labels, other, strict=True))) == len(set(labels)) == len(set(other))


def shuffled(updates: Updates, seed: int) -> tuple[Updates, list[int]]:
    order = torch.randperm(len(updates), generator=torch.Generator().manual_seed(seed)).tolist()
    return [updates[i] for i in order], order


def rewritten(updates: Updates, seed: int = 0) -> Updates:
    """The same updates as (B R, R⁻¹ A)."""
    generator = torch.Generator().manual_seed(seed)

    def turn(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        rank = a.shape[0]
        r = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
        r = r * torch.linspace(0.5, 2, rank, dtype=torch.float64)
        return (b.double() @ r).float(), torch.linalg.solve(r, a.double()).float()

    return [{module: turn(*factors) for module, factors in update.items()} for update in updates]


@pytest.mark.parametrize(("sizes", "seed"), [([6, 6], 0), ([10, 5, 3], 1), ([8, 2, 4, 3], 2)])
def test_planted_groups_are_recovered(sizes: list[int], seed: int) -> None:
    updates, planted = groups(sizes, seed=seed)
    assert same_partition(run(updates, len(sizes)), planted)
    mixed, order = shuffled(rewritten(updates), seed)
    assert same_partition(run(mixed, len(sizes)), [planted[i] for i in order])


def test_clusters_are_numbered_by_their_first_adapter() -> None:
    updates, _ = groups([4, 4, 4])
    labels = run(shuffled(updates, 3)[0], 3)
    assert [labels.index(number) for number in range(3)] == sorted(labels.index(number) for number in range(3))
    assert set(labels) == {0, 1, 2}


def test_adapters_without_some_of_the_modules_find_their_group() -> None:
    updates, planted = groups([8, 8])
    for i, update in enumerate(updates):
        for module in range(len(SHAPES)):
            if (module + i) % 3 == 0:
                del update[module]
    assert same_partition(run(updates, 2), planted)


@pytest.mark.parametrize("clusters", [1, 5, 12])
def test_no_cluster_is_empty(clusters: int) -> None:
    updates, _ = groups([6, 6], own=1.0)
    assert set(run(updates, clusters)) == set(range(clusters))


@pytest.mark.parametrize("clusters", [3, 8])
def test_no_cluster_is_empty_when_all_adapters_are_one(clusters: int) -> None:
    updates, _ = groups([1])
    assert set(run(updates * 8, clusters)) == set(range(clusters))


@pytest.mark.parametrize("zeros", [1, 5, 8])
def test_no_cluster_is_empty_when_adapters_are_zero(zeros: int) -> None:
    updates, _ = groups([8])
    for update in updates[:zeros]:
        for module, (b, a) in update.items():
            update[module] = torch.zeros_like(b), a
    for clusters in (3, 8):
        assert set(run(updates, clusters)) == set(range(clusters))


def test_zero_adapters_do_not_disturb_the_others() -> None:
    updates, planted = groups([6, 6])
    zero = {module: (torch.zeros_like(b), a) for module, (b, a) in updates[0].items()}
    assert same_partition(run([zero, *updates, zero], 2)[1:-1], planted)


def test_the_same_seed_gives_the_same_clusters() -> None:
    updates, _ = groups([6, 6], own=2.0)
    assert run(updates, 4, seed=7) == run(updates, 4, seed=7)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_the_adapters_makes_no_difference(seed: int) -> None:
    """Nothing is planted, so that every choice is a close one."""
    updates, _ = groups([1] * 10, seed=seed, own=1.0)
    labels = run(updates, 4)
    mixed, order = shuffled(updates, seed)
    assert same_partition(run(mixed, 4), [labels[i] for i in order])


@pytest.mark.parametrize("seed", [2, 3])
def test_the_way_of_writing_the_factors_makes_no_difference(seed: int) -> None:
    updates, _ = groups([1] * 10, seed=seed, own=1.0)
    assert same_partition(run(rewritten(updates, seed), 4), run(updates, 4))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_objective_never_rises(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A third of the adapters start misplaced; the error is that of the assignment the bases were fitted for."""
    runs: list[list[float]] = []
    alternate, reassign, medoids = cluster._alternate, cluster._reassign, cluster._medoids

    def recorded_alternate(*arguments: Any) -> Any:
        runs.append([])
        labels, reached = alternate(*arguments)
        assert reached <= runs[-1][-1]
        return labels, reached

    def recorded_reassign(errors: Tensor, labels: Tensor) -> Tensor:
        runs[-1].append(float(errors.gather(1, labels[:, None]).sum()))
        return reassign(errors, labels)

    def misplaced(*arguments: Any) -> Tensor:
        labels = medoids(*arguments)
        labels[::3] = 1 - labels[::3]
        return labels

    monkeypatch.setattr(cluster, "_alternate", recorded_alternate)
    monkeypatch.setattr(cluster, "_reassign", recorded_reassign)
    monkeypatch.setattr(cluster, "_medoids", misplaced)
    run(groups([12, 12], seed=seed, rank=2, own=0.6)[0], 2, rank=2)
    assert any(len(objectives) > 1 for objectives in runs)
    for objectives in runs:
        for before, after in itertools.pairwise(objectives):
            assert after <= before * (1 + 1e-6)


def test_an_emptied_cluster_gets_the_adapter_that_is_served_worst() -> None:
    errors = torch.tensor([[0.1, 0.5, 0.9], [0.2, 0.4, 0.9], [0.7, 0.3, 0.9], [0.1, 0.6, 0.8]], dtype=torch.float64)
    moved = cluster._reassign(errors, torch.tensor([0, 0, 1, 2]))
    assert moved.tolist() in ([0, 2, 1, 0], [2, 0, 1, 0])
    assert moved.tolist() == [0, 2, 1, 0]


def test_a_gain_that_is_noise_moves_nobody() -> None:
    errors = torch.tensor([[0.5, 0.5 - 1e-9], [0.3, 0.6]], dtype=torch.float64)
    assert cluster._reassign(errors, torch.tensor([0, 0])).tolist() != [1, 1]
    assert cluster._reassign(errors.repeat(2, 1), torch.tensor([0, 0, 1, 0])).tolist() == [0, 0, 1, 0]


def test_more_clusters_serve_better_than_a_random_partition() -> None:
    updates, _ = groups([7, 7, 7], own=0.5)
    labels = run(updates, 3)
    assert total_error(updates, labels) < 0.5 * total_error(updates, [i % 3 for i in range(21)])


def total_error(updates: Updates, labels: list[int]) -> float:
    """Σ over modules of the joint error of every cluster, each update weighted alike."""
    total = 0.0
    for module in range(len(SHAPES)):
        for label in set(labels):
            own = [update[module] for update, mine in zip(updates, labels, strict=True) if mine == label]
            stack = Stack.of(own, list(range(len(own))))
            stack = stack.scaled(stack.squared_norms().rsqrt())
            captured = stack.cores(*fit_joint(stack, 5)).square().sum()
            total += len(own) - float(captured)
    return total


def test_every_module_that_is_read_is_counted() -> None:
    counted: list[int] = []
    run(groups([6, 6])[0], 2, counted=counted)
    assert set(counted) == {1}
    assert len(counted) >= len(SHAPES)
    counted.clear()
    run(groups([6, 6])[0], 1, counted=counted)
    assert counted == []


@pytest.mark.skipif(not REAL.is_dir(), reason="the real adapters are not here (../shared/data/smollm2-r16)")
def test_real_adapters_do_not_end_in_one_big_cluster_and_loners() -> None:
    collection = open_collection(REAL)
    names = [module.name for module in collection.modules][4::15]
    parts = dict(enumerate(names))
    updates = [{number: adapter.factors(name) for number, name in parts.items()} for adapter in collection.adapters]
    norms = torch.stack(
        [torch.stack([(b @ a).double().square().sum() for b, a in update.values()]) for update in updates]
    )

    def load(module: int) -> Stack:
        return Stack.of([update[module] for update in updates], list(range(len(updates))))

    weights = (1 / norms.sum(1, keepdim=True)).expand_as(norms)
    labels = assign_clusters(load, weights, norms, 4, 16, seed=0, device=CPU, advance=lambda steps: None)
    sizes = sorted(Counter(labels).values())
    print("sizes of 4 clusters of 32 real adapters:", sizes)
    assert sizes[-1] <= 16
    assert sizes[0] >= 2
