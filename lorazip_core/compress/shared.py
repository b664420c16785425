"""Adapters that share bases: pack by pack, each stored when it is done, with a guarantee on the worst adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.progress import Advance, Progress, Share, part_of
from ..base.threads import in_order
from ..bundle.summary import is_adapter_within
from ..reading.packs import Pack, Problem, cut_into_packs
from ..reading.updates import Updates
from ..schemes.scheme import Problems, SharedScheme, Solution
from .pieces import Pieces, note_left
from .solutions import StoredSolution, read_solutions, to_tensors

# Steps of progress, a problem: while it is solved, which takes minutes where adapters are many, and when it is stored.
_SOLVED, _STORED = 99, 1
_STEPS = _SOLVED + _STORED

Labels = list[int | None]
"""The cluster of every adapter; None for one that is kept individually."""
_CPU = torch.device("cpu")
LABELS = "labels"  # the piece that holds those that took long to find


@dataclass(frozen=True)
class SharedJob:
    """What encoding needs to know. ``check`` raises for adapters that are not those any more that were scanned."""

    updates: Updates
    check: Callable[[Iterable[int]], None]
    scheme: SharedScheme
    ranks: Sequence[int]
    """Of every module."""
    dtype: torch.dtype
    seed: int


@dataclass(frozen=True)
class Generation:
    """Packs that are encoded for the same labels: all of them at first, then those that served an adapter too badly."""

    number: int
    labels: Labels
    packs: list[Pack]

    @classmethod
    def of(cls, job: SharedJob, labels: Labels) -> Generation:
        """The first one."""
        return cls(0, labels, _packs(job, job.updates.sizes(labels)))

    def after(self, job: SharedJob, labels: Labels, changed: set[int | None]) -> Generation:
        """The next one, of the clusters that have ``changed``."""
        sizes = {problem: size for problem, size in job.updates.sizes(labels).items() if problem.cluster in changed}
        return Generation(self.number + 1, labels, _packs(job, sizes))

    def piece(self, pack: int) -> str:
        """The name of the piece that pack number ``pack`` becomes."""
        return f"pack-{self.number}-{pack}"

    @property
    def problems(self) -> int:
        """How many problems these are."""
        return sum(map(len, self.packs))

    def places(self) -> dict[Problem, str]:
        """The piece in which every problem's solution is."""
        return {problem: self.piece(number) for number, pack in enumerate(self.packs) for problem in pack}


def _packs(job: SharedJob, sizes: Mapping[Problem, int]) -> list[Pack]:
    """Problems are solved together whose modules have one shape and one rank."""
    return cut_into_packs(sizes, list(zip(job.updates.shapes, job.ranks, strict=True)), job.updates.budget)


class Place(NamedTuple):
    """The piece that a solution is in, and where it is there. Of its adapters some may have left since."""

    piece: str
    solution: StoredSolution


@dataclass(frozen=True)
class Encoded:
    """What is to be stored: who is in which cluster, and where the solution of every problem is.

    ``lost`` [n, M] is ‖D_im − D̂_im‖² in float64, 0 for adapters that are in no cluster.
    """

    labels: Labels
    places: dict[Problem, Place]
    lost: Tensor


def encode_clusters(
    job: SharedJob, labels: Labels, max_error: float | None, pieces: Pieces, progress: Progress
) -> Encoded:
    """Encode every cluster of ``labels``; an adapter that would exceed ``max_error``, or whose cores the dtype cannot
    hold, gets the label None instead.

    Bases that served such an adapter are fitted again without it, once. Solutions are stored as ``pieces``; those that
    are there already are taken as they are.
    """
    generation = Generation.of(job, labels)
    names = [generation.piece(number) for number in range(len(generation.packs))]
    note_left(pieces, [*([LABELS] if LABELS in pieces else []), *names], progress)
    with progress.stage("fitting bases", _STEPS * generation.problems) as advance:
        encode_packs(job, generation, pieces, advance)
    encoded = read_encoded(job, labels, generation.places(), pieces)
    for refit in (True, False):
        errors = zip(encoded.lost.tolist(), job.updates.norms.tolist(), strict=True)
        failing = {i for i, (lost, norms) in enumerate(errors) if not is_adapter_within(lost, norms, max_error)}
        failing -= _alone(labels)
        if not failing:
            break
        changed = {labels[i] for i in failing}
        labels = [None if i in failing else label for i, label in enumerate(labels)]
        solved_in = {problem: place.piece for problem, place in encoded.places.items()}
        if refit:
            generation = generation.after(job, labels, changed)
            with progress.stage("fitting bases again", _STEPS * generation.problems) as advance:
                encode_packs(job, generation, pieces, advance)
            solved_in |= generation.places()
        encoded = read_encoded(job, labels, solved_in, pieces)
    return encoded


def encode_packs(job: SharedJob, generation: Generation, pieces: Pieces, advance: Advance) -> None:
    """Encode the packs that are not there yet. ``advance`` is told `_STEPS` for every problem."""
    steps = _Steps(advance)
    missing: list[int] = []
    for number in range(len(generation.packs)):
        if generation.piece(number) in pieces:
            steps.add(_STEPS * len(generation.packs[number]))
        else:
            missing.append(number)

    def load(number: int) -> Problems:
        return load_pack(job.updates, generation.packs[number], generation.labels)

    def solve(number: int, loaded: Problems) -> tuple[int, dict[Problem, Solution]]:
        pack = generation.packs[number]
        with part_of(steps.add, _SOLVED * len(pack)) as share:
            return number, encode_pack(job, pack, loaded, share)

    def store(solved: tuple[int, dict[Problem, Solution]]) -> int:
        number, of = solved
        job.check({member for solution in of.values() for member in solution.members})
        pieces.write(generation.piece(number), to_tensors(of))
        return len(of)

    if job.updates.device.type == "cpu":
        done = in_order(lambda number: store(solve(number, load(number))), missing, _CPU)
    else:  # what is solved is stored by another thread, and what is slow to load is loaded by one
        inputs = map(load, missing) if job.updates.quick else in_order(load, missing, _CPU, workers=1)
        done = in_order(store, map(solve, missing, inputs), _CPU, workers=1)
    with closing(done):
        for problems in done:
            steps.add(_STORED * problems)


class _Steps:
    """Steps of progress, which several threads take in parts, told as whole ones and one after another."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._one_at_a_time = Lock()
        self._taken, self._told = 0.0, 0

    def add(self, steps: float) -> None:
        with self._one_at_a_time:
            self._taken += steps
            whole = int(self._taken + 1e-3) - self._told  # what rounding takes from the sum is no step
            if whole:
                self._told += whole
                self._advance(whole)


def load_pack(updates: Updates, pack: Pack, labels: Labels) -> Problems:
    """Load what the problems of a pack are about."""
    numbered = torch.tensor([-1 if label is None else label for label in labels])
    loaded = Problems([], [], [], len(pack))
    for module, problems in groupby(enumerate(pack), key=lambda each: each[1].module):
        number = torch.full((int(numbered.max()) + 2,), -1)  # the last is that of −1
        for position, problem in problems:
            number[problem.cluster] = position
        owner = number[numbered]
        wanted = ((owner >= 0) & (updates.ranks[:, module] > 0)).nonzero()[:, 0].tolist()
        stack = updates.load(module, wanted)
        members = list(stack.adapters)
        loaded.stacks.append(stack)
        loaded.owners.append(owner[members])
        loaded.weights.append(updates.weights[members, module])
    return loaded


def encode_pack(job: SharedJob, pack: Pack, loaded: Problems, share: Share) -> dict[Problem, Solution]:
    """Solve the problems of one pack."""
    rank = job.ranks[pack[0].module]
    solved = job.scheme.encode(loaded, rank, dtype=job.dtype, seed=job.seed, share=share)
    return dict(zip(pack, solved, strict=True))


def read_encoded(job: SharedJob, labels: Labels, names: dict[Problem, str], pieces: Pieces) -> Encoded:
    """What the pieces say of adapters with these ``labels``: who lost how much, and which bases are still of use.

    ``names`` are the pieces that have the solutions of the problems.
    """
    lost = torch.zeros(job.updates.ranks.shape, dtype=torch.float64)
    numbered = torch.tensor([-1 if label is None else label for label in labels], dtype=torch.int64)
    places = {}
    for name in dict.fromkeys(names.values()):
        for found in read_solutions(pieces.read(name)):
            own = numbered[found.members] == found.problem.cluster
            if names.get(found.problem) == name and own.any():
                places[found.problem] = Place(name, found)
                lost[found.members[own], found.problem.module] = found.squared_errors[own]
    return Encoded(labels, places, lost)


def _alone(labels: Labels) -> set[int]:
    return {i for i, label in enumerate(labels) if label is None}
