"""What is worked on together: problems of one shape, cut into packs of bounded size.

A pack is the unit of work: it is loaded and solved at once, and stored as one piece. Which packs there are
depends on shapes, labels and a budget only, so that every run makes the same ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple


class Budget(NamedTuple):
    """How much one pack holds: elements of the factors of its problems, and modules."""

    elements: int
    modules: int


CPU_BUDGET = Budget(2**22, 16)  # as much as fits the caches well; several packs are in work at a time


class Problem(NamedTuple):
    """One module of one cluster: a shared basis and its cores are what is to be found."""

    cluster: int
    module: int


Pack = tuple[Problem, ...]


def cut_into_packs(sizes: Mapping[Problem, int], kinds: Sequence[Hashable], budget: Budget) -> list[Pack]:
    """Cut problems into packs within ``budget``; ``sizes`` has the elements in the factors of each of them.

    ``kinds`` has, of every module, what those in one pack have in common, like (d_out, d_in). A module is split between
    clusters if its problems exceed the budget together; a problem is never split, so one that exceeds the
    budget is a pack of its own. Problems go by module and then by cluster, packs by their first problem.
    """
    by_module: defaultdict[int, list[Problem]] = defaultdict(list)
    for problem in sorted(sizes, key=_by_module):
        by_module[problem.module].append(problem)
    by_kind: defaultdict[Hashable, list[list[Problem]]] = defaultdict(list)
    for module, problems in by_module.items():
        by_kind[kinds[module]].append(problems)
    found = [pack for modules in by_kind.values() for pack in _of_one_kind(modules, sizes, budget)]
    return sorted(found, key=lambda pack: _by_module(pack[0]))


def _of_one_kind(modules: list[list[Problem]], sizes: Mapping[Problem, int], budget: Budget) -> Iterator[Pack]:
    together: list[Problem] = []
    held = count = 0
    for problems in modules:
        size = sum(sizes[problem] for problem in problems)
        if together and (count == budget.modules or held + size > budget.elements):
            yield tuple(together)
            together, held, count = [], 0, 0
        if size > budget.elements:
            yield from _split(problems, sizes, budget.elements)
        else:
            together, held, count = together + problems, held + size, count + 1
    if together:
        yield tuple(together)


def _split(problems: list[Problem], sizes: Mapping[Problem, int], most: int) -> Iterator[Pack]:
    """The problems of one module that is too large for a pack."""
    part: list[Problem] = []
    held = 0
    for problem in problems:
        if part and held + sizes[problem] > most:
            yield tuple(part)
            part, held = [], 0
        part.append(problem)
        held += sizes[problem]
    yield tuple(part)


def _by_module(problem: Problem) -> tuple[int, int]:
    return problem.module, problem.cluster
