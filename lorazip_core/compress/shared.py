"""Adapters that share bases: pack by pack, each stored when it is done, with a guarantee on the worst adapter."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from threading import Lock
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..base import team
from ..base.progress import Advance, Progress, Share, part_of
from ..base.threads import in_order, loaded_ahead
from ..bundle.summary import is_adapter_within
from ..maths.stack import ScaledStack
from ..maths.tucker import QUICK, THOROUGH
from ..reading.packs import Pack, Problem, cut_into_packs
from ..reading.updates import Updates
from ..schemes.encode import Shared, encode_diag, encode_joint
from .pieces import Pieces, note_left

_MANY = 2**14  # updates in a collection: of more, the search for bases is the quick one
# Steps of progress, a problem: while it is solved, which takes minutes where adapters are many, and when it is stored.
_SOLVED, _STORED = 99, 1
_STEPS = _SOLVED + _STORED

Labels = list[int | None]
"""The cluster of every adapter; None for one that is kept individually."""
_CPU = torch.device("cpu")
_PROBLEMS, _MEMBERS, _ERRORS = "problems", "members", "squared_errors"
LABELS = "labels"  # the piece that holds those that took long to find


@dataclass(frozen=True)
class SharedJob:
    """What encoding needs to know. ``check`` raises for adapters that are not those any more that were scanned."""

    updates: Updates
    check: Callable[[Iterable[int]], None]
    method: Literal["joint", "diag"]
    rank: int
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
        return cls(0, labels, cut_into_packs(job.updates.sizes(labels), job.updates.shapes, job.updates.budget))

    def after(self, job: SharedJob, labels: Labels, changed: set[int | None]) -> Generation:
        """The next one, of the clusters that have ``changed``."""
        sizes = {problem: size for problem, size in job.updates.sizes(labels).items() if problem.cluster in changed}
        return Generation(self.number + 1, labels, cut_into_packs(sizes, job.updates.shapes, job.updates.budget))

    def piece(self, pack: int) -> str:
        """The name of the piece that pack number ``pack`` becomes."""
        return f"pack-{self.number}-{pack}"

    @property
    def own(self) -> range:
        """The numbers of the packs that are this process's work."""
        return team.dealt(len(self.packs))

    @property
    def problems(self) -> int:
        """How many problems these are."""
        return sum(len(self.packs[number]) for number in self.own)

    def places(self) -> dict[Problem, str]:
        """The piece in which every problem's solution is."""
        return {problem: self.piece(number) for number, pack in enumerate(self.packs) for problem in pack}


class Place(NamedTuple):
    """Where a problem's solution is: the piece, the shape of its bases there (a number), which of the bases of that
    shape, the first of its cores, and the adapters that these belong to, of whom some may have left since."""

    piece: str
    alike: int
    number: int
    row: int
    members: Tensor


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
        encode_packs(job, generation, generation.own, pieces, advance)
    pieces.wait()
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
                encode_packs(job, generation, generation.own, pieces, advance)
            pieces.wait()
            solved_in |= generation.places()
        encoded = read_encoded(job, labels, solved_in, pieces)
    return encoded


def encode_packs(
    job: SharedJob, generation: Generation, numbers: Iterable[int], pieces: Pieces, advance: Advance
) -> None:
    """Encode the packs of these ``numbers`` that are not there yet. ``advance`` is told `_STEPS` for every problem."""
    steps = _Steps(advance)
    missing: list[int] = []
    for number in numbers:
        if generation.piece(number) in pieces:
            steps.add(_STEPS * len(generation.packs[number]))
        else:
            missing.append(number)

    def load(number: int) -> PackInput:
        return load_pack(job.updates, generation.packs[number], generation.labels)

    def solve(number: int, loaded: PackInput) -> tuple[int, dict[Problem, Shared]]:
        pack = generation.packs[number]
        with part_of(steps.add, _SOLVED * len(pack)) as share:
            return number, encode_pack(job, pack, loaded, share)

    def store(solved: tuple[int, dict[Problem, Shared]]) -> int:
        number, of = solved
        job.check({member for shared in of.values() for member in shared.members})
        pieces.write(generation.piece(number), _to_store(of))
        return len(of)

    if job.updates.device.type == "cpu":
        done = in_order(lambda number: store(solve(number, load(number))), missing, _CPU)
    else:  # what is solved is stored by another thread, and what is slow to load is loaded by one
        inputs = map(load, missing) if job.updates.quick else loaded_ahead(load, missing)
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


class PackInput(NamedTuple):
    """The updates of the modules of a pack; for each of them, in the order of its stack, the problem that it belongs to
    as a number in the pack, −1 for none, and its weight."""

    stacks: list[ScaledStack]
    owners: list[Tensor]
    weights: list[Tensor]


def load_pack(updates: Updates, pack: Pack, labels: Labels) -> PackInput:
    """Load what the problems of a pack are about."""
    numbered = torch.tensor([-1 if label is None else label for label in labels])
    loaded = PackInput([], [], [])
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


def encode_pack(job: SharedJob, pack: Pack, loaded: PackInput, share: Share) -> dict[Problem, Shared]:
    """Solve the problems of one pack."""
    if job.method == "joint":
        many = int((job.updates.ranks > 0).sum()) > _MANY
        effort = QUICK if many else THOROUGH
        solved = encode_joint(
            *loaded, len(pack), rank=job.rank, dtype=job.dtype, seed=job.seed, effort=effort, share=share
        )
        return dict(zip(pack, solved, strict=True))
    found: dict[Problem, Shared] = {}
    for stack, owners, weights in zip(*loaded, strict=True):
        for number in torch.unique(owners[owners >= 0]).tolist():
            own = owners == number
            some = stack.select({stack.adapters[i] for i in own.nonzero()[:, 0].tolist()})
            with part_of(share, 1 / len(pack)) as of_one:
                found[pack[number]] = encode_diag(
                    some, weights[own], rank=job.rank, dtype=job.dtype, seed=job.seed, share=of_one
                )
    return found


def read_encoded(job: SharedJob, labels: Labels, names: dict[Problem, str], pieces: Pieces) -> Encoded:
    """What the pieces say of adapters with these ``labels``: who lost how much, and which bases are still of use.

    ``names`` are the pieces that have the solutions of the problems.
    """
    lost = torch.zeros(job.updates.ranks.shape, dtype=torch.float64)
    numbered = torch.tensor([-1 if label is None else label for label in labels], dtype=torch.int64)
    places = {}
    for name in dict.fromkeys(names.values()):
        reader = pieces.read(name)
        problems = reader.tensor(_PROBLEMS).tolist()
        counts = [count for *_, count in problems]
        members, errors = (torch.split(reader.tensor(each), counts) for each in (_MEMBERS, _ERRORS))
        index: Counter[int] = Counter()
        row: Counter[int] = Counter()
        for (cluster, module, alike, count), held, found in zip(problems, members, errors, strict=True):
            problem = Problem(cluster, module)
            own = numbered[held] == cluster
            if names.get(problem) == name and own.any():
                places[problem] = Place(name, alike, index[alike], row[alike], held)
                lost[held[own], module] = found[own]
            index[alike] += 1
            row[alike] += count
    return Encoded(labels, places, lost)


def tensor_name(field: Literal["u", "v", "cores"], alike: int) -> str:
    """What a tensor is called in a piece that has this field of all problems of one shape; the fields of `Shared`."""
    return f"{field}.{alike}"


def _to_store(solved: dict[Problem, Shared]) -> dict[str, Tensor]:
    """The bases and cores of all problems of one shape in one tensor each, so that few things are written.

    And, problem by problem, [P, 4] cluster, module, shape and number of adapters, the adapters, and their errors.
    """
    alike: defaultdict[tuple[torch.Size, torch.Size, torch.Size], list[Problem]] = defaultdict(list)
    for problem, shared in solved.items():
        alike[shared.u.shape, shared.v.shape, shared.cores.shape[1:]].append(problem)
    tensors: dict[str, Tensor] = {}
    lines: list[list[int]] = []
    members: list[int] = []
    errors: list[Tensor] = []
    for number, problems in enumerate(alike.values()):
        own = [solved[problem] for problem in problems]
        tensors[tensor_name("u", number)] = torch.stack([shared.u for shared in own])
        tensors[tensor_name("v", number)] = torch.stack([shared.v for shared in own])
        tensors[tensor_name("cores", number)] = torch.cat([shared.cores for shared in own])
        for problem, shared in zip(problems, own, strict=True):
            lines.append([*problem, number, len(shared.members)])
            members += shared.members
            errors.append(shared.squared_errors)
    tensors[_PROBLEMS], tensors[_MEMBERS] = torch.tensor(lines), torch.tensor(members)
    tensors[_ERRORS] = torch.cat(errors)
    return tensors


def _alone(labels: Labels) -> set[int]:
    return {i for i, label in enumerate(labels) if label is None}
