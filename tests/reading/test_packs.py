"""packs: every problem once, of one shape, within the budget, and the same wherever it runs."""

from __future__ import annotations

import random
from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from lorazip_core.reading.packs import Budget, Pack, Problem, cut_into_packs

SHAPES = [(8, 4), (2, 4), (4, 8)]
collections = st.lists(
    st.tuples(st.sampled_from(SHAPES), st.dictionaries(st.integers(0, 5), st.integers(1, 30), max_size=6)), max_size=12
)
budgets = st.integers(1, 120)
counts = st.integers(1, 4)
Collections = list[tuple[tuple[int, int], dict[int, int]]]


def problems(modules: Collections) -> dict[Problem, int]:
    return {
        Problem(cluster, module): size
        for module, (_, clusters) in enumerate(modules)
        for cluster, size in clusters.items()
    }


def cut(modules: Collections, budget: int, most: int) -> tuple[dict[Problem, int], list[Pack]]:
    sizes = problems(modules)
    return sizes, cut_into_packs(sizes, [shape for shape, _ in modules], Budget(budget, most))


@given(modules=collections, budget=budgets, most=counts)
def test_every_problem_is_in_one_pack_in_order(modules: Collections, budget: int, most: int) -> None:
    sizes, found = cut(modules, budget, most)
    together = [problem for pack in found for problem in pack]
    assert len(together) == len(set(together))
    assert set(together) == sizes.keys()
    assert all(pack for pack in found)
    for pack in found:
        assert list(pack) == sorted(pack, key=lambda problem: (problem.module, problem.cluster))
    firsts = [(pack[0].module, pack[0].cluster) for pack in found]
    assert firsts == sorted(firsts)


@given(modules=collections, budget=budgets, most=counts)
def test_a_pack_has_one_shape_and_keeps_the_budget(modules: Collections, budget: int, most: int) -> None:
    sizes, found = cut(modules, budget, most)
    for pack in found:
        assert len({modules[problem.module][0] for problem in pack}) == 1
        assert len({problem.module for problem in pack}) <= most
        assert len(pack) == 1 or sum(sizes[problem] for problem in pack) <= budget


@given(modules=collections, budget=budgets, most=counts)
def test_only_a_module_that_exceeds_the_budget_is_split(modules: Collections, budget: int, most: int) -> None:
    sizes, found = cut(modules, budget, most)
    for module, own in groupby(sorted(sizes, key=lambda problem: problem.module), key=lambda problem: problem.module):
        size = sum(sizes[problem] for problem in own)
        holding = [pack for pack in found if any(problem.module == module for problem in pack)]
        assert len(holding) == 1 or size > budget


@given(modules=collections, budget=budgets, most=counts, seed=st.integers(0, 9))
def test_the_order_of_the_sizes_makes_no_difference(modules: Collections, budget: int, most: int, seed: int) -> None:
    sizes, found = cut(modules, budget, most)
    mixed = list(sizes.items())
    random.Random(seed).shuffle(mixed)
    assert cut_into_packs(dict(mixed), [shape for shape, _ in modules], Budget(budget, most)) == found


def test_modules_of_one_shape_go_together() -> None:
    small, large = (8, 4), (4, 8)
    modules = [(small, {0: 3, 1: 2}), (large, {0: 20, 1: 20, 2: 9}), (small, {0: 4}), (small, {1: 2})]
    _, found = cut(modules, 30, 2)
    assert found == [
        (Problem(0, 0), Problem(1, 0), Problem(0, 2)),
        (Problem(0, 1),),
        (Problem(1, 1), Problem(2, 1)),
        (Problem(1, 3),),
    ]
