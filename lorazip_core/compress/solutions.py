"""The solutions of the problems of a pack, in one piece.

The tensors of all problems that have equal shapes are one tensor each, so that few things are written: ``SUFFIX.G`` for
group G of such problems. Beside them, problem by problem: cluster, module, group and number of adapters, [P, 4]; the
adapters; and their squared errors.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..bundle.tensor_file import TensorFileReader
from ..reading.packs import Problem
from ..schemes.scheme import Solution

_PROBLEMS, _MEMBERS, _ERRORS = "problems", "members", "squared_errors"


class StoredSolution(NamedTuple):
    """Where the solution of a problem is in its piece."""

    problem: Problem
    group: int
    position: int
    """Of its shared tensors, among those of the group."""
    row: int
    """The first one of its adapters' own tensors, among those of the group."""
    members: Tensor
    squared_errors: Tensor


def tensor_name(suffix: str, group: int) -> str:
    """What the tensor of a group of problems is called."""
    return f"{suffix}.{group}"


def to_tensors(solved: Mapping[Problem, Solution]) -> dict[str, Tensor]:
    """All solutions of a pack as the tensors of a piece."""
    groups: defaultdict[object, list[Problem]] = defaultdict(list)
    for problem, solution in solved.items():
        groups[_shapes(solution)].append(problem)
    tensors: dict[str, Tensor] = {}
    for group, problems in enumerate(groups.values()):
        own = [solved[problem] for problem in problems]
        for suffix in own[0].shared:
            tensors[tensor_name(suffix, group)] = torch.stack([solution.shared[suffix] for solution in own])
        for suffix in own[0].own:
            tensors[tensor_name(suffix, group)] = torch.cat([solution.own[suffix] for solution in own])
    order = [(group, problem) for group, problems in enumerate(groups.values()) for problem in problems]
    rows = [[*problem, group, len(solved[problem].members)] for group, problem in order]
    tensors[_PROBLEMS] = torch.tensor(rows)
    tensors[_MEMBERS] = torch.tensor([member for _, problem in order for member in solved[problem].members])
    tensors[_ERRORS] = torch.cat([solved[problem].squared_errors for _, problem in order])
    return tensors


def read_solutions(piece: TensorFileReader) -> Iterator[StoredSolution]:
    """What is in a piece, in its order."""
    problems = piece.tensor(_PROBLEMS).tolist()
    counts = [count for *_, count in problems]
    members, errors = (torch.split(piece.tensor(name), counts) for name in (_MEMBERS, _ERRORS))
    position: Counter[int] = Counter()
    row: Counter[int] = Counter()
    for (cluster, module, group, count), held, found in zip(problems, members, errors, strict=True):
        yield StoredSolution(Problem(cluster, module), group, position[group], row[group], held, found)
        position[group] += 1
        row[group] += count


def _shapes(solution: Solution) -> object:
    shared = tuple((suffix, tensor.shape) for suffix, tensor in solution.shared.items())
    return shared, tuple((suffix, tensor.shape[1:]) for suffix, tensor in solution.own.items())
