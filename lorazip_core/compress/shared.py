"""Adapters that share bases: pack by pack, each stored when it is done, with a guarantee on the worst adapter."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..factorise import Shared, encode_shared
from ..progress import Advance, Progress
from ..updates import Updates
from ..workers import in_order
from .packs import Pack, Problem, packs
from .pieces import Pieces, note_left

# Factors are read in float32, their scale folded in: what that rounds off is unknown to the errors found here.
_UNSEEN = 2.0**-48

Labels = list[int | None]
"""The cluster of every adapter; None for one that is kept individually."""
LABELS = "labels"  # the piece that holds those that took long to find


@dataclass(frozen=True)
class SharedJob:
    """What encoding needs to know. ``ranks`` [n, M] has every adapter's rank in every module, 0 where it lacks it."""

    updates: Updates
    ranks: Tensor
    method: Literal["joint", "diag"]
    rank: int
    dtype: torch.dtype
    seed: int

    def sizes(self, labels: Labels) -> dict[Problem, int]:
        """The numbers in the factors of every problem: Σ r_i · (d_out + d_in); no entry where nobody has the module."""
        shared = torch.tensor([i for i, label in enumerate(labels) if label is not None], dtype=torch.int64)
        clusters = torch.tensor([label for label in labels if label is not None], dtype=torch.int64)
        count = int(clusters.max()) + 1 if len(clusters) else 0
        rows = torch.zeros(count, self.ranks.shape[1], dtype=torch.int64).index_add_(0, clusters, self.ranks[shared])
        widths = torch.tensor([d_out + d_in for d_out, d_in in self.updates.shapes], dtype=torch.int64)
        return {
            Problem(cluster, module): int(rows[cluster, module] * widths[module])
            for cluster, module in rows.nonzero().tolist()
        }


@dataclass(frozen=True)
class Generation:
    """Packs that are encoded for the same labels: all of them at first, then those that served an adapter too badly."""

    number: int
    labels: Labels
    packs: list[Pack]

    @classmethod
    def of(cls, job: SharedJob, labels: Labels) -> Generation:
        """The first one."""
        return cls(0, labels, packs(job.sizes(labels), job.updates.shapes))

    def after(self, job: SharedJob, labels: Labels, changed: set[int | None]) -> Generation:
        """The next one, of the clusters that have ``changed``."""
        sizes = {problem: size for problem, size in job.sizes(labels).items() if problem.cluster in changed}
        return Generation(self.number + 1, labels, packs(sizes, job.updates.shapes))

    def piece(self, pack: int) -> str:
        """The name of the piece that pack number ``pack`` becomes."""
        return f"pack-{self.number}-{pack}"

    @property
    def problems(self) -> int:
        return sum(map(len, self.packs))

    def places(self) -> dict[Problem, str]:
        """The piece in which every problem's solution is."""
        return {problem: self.piece(number) for number, pack in enumerate(self.packs) for problem in pack}


@dataclass(frozen=True)
class Encoded:
    """What is to be stored: who is in which cluster, and for every problem the piece that has its solution.

    A piece may have rows of adapters that have left its cluster since. ``lost`` [n, M] is ‖D_im − D̂_im‖² in float64,
    0 for adapters that are in no cluster.
    """

    labels: Labels
    places: dict[Problem, str]
    lost: Tensor


def encode_clusters(
    job: SharedJob, labels: Labels, max_error: float | None, pieces: Pieces, progress: Progress
) -> Encoded:
    """Encode every cluster of ``labels``; an adapter that would exceed ``max_error`` gets the label None instead.

    Bases that served such an adapter are fitted again without it, once. Solutions are stored as ``pieces``; those that
    are there already are taken as they are.
    """
    generation = Generation.of(job, labels)
    names = [generation.piece(number) for number in range(len(generation.packs))]
    note_left(pieces, [*([LABELS] if LABELS in pieces else []), *names], progress)
    with progress.stage("fitting bases", generation.problems) as advance:
        encode_packs(job, generation, range(len(generation.packs)), pieces, advance)
    encoded = read_encoded(job, labels, generation.places(), pieces)
    if max_error is None:
        return encoded
    for refit in (True, False):
        shares = job.updates.shares(encoded.lost.sum(1)).tolist()
        failing = {i for i, share in enumerate(shares) if max(share, _UNSEEN) > max_error} - _alone(labels)
        if not failing:
            break
        changed = {labels[i] for i in failing}
        labels = [None if i in failing else label for i, label in enumerate(labels)]
        places = encoded.places
        if refit:
            generation = generation.after(job, labels, changed)
            with progress.stage("fitting bases again", generation.problems) as advance:
                encode_packs(job, generation, range(len(generation.packs)), pieces, advance)
            places = places | generation.places()
        encoded = read_encoded(job, labels, places, pieces)
    return encoded


def encode_packs(
    job: SharedJob, generation: Generation, numbers: Iterable[int], pieces: Pieces, advance: Advance
) -> None:
    """Encode the packs of these ``numbers`` that are not there yet. ``advance`` is called with the problems of each."""
    for number in numbers:
        pack, name = generation.packs[number], generation.piece(number)
        if name not in pieces:
            tensors: dict[str, Tensor] = {}
            for problem, shared in encode_pack(job, pack, generation.labels).items():
                tensors |= _to_store(problem, shared)
            pieces.write(name, tensors)
        advance(len(pack))


def encode_pack(job: SharedJob, pack: Pack, labels: Labels) -> dict[Problem, Shared]:
    """Solve the problems of one pack."""
    clusters: dict[int, list[int]] = {}
    for problem in pack:
        clusters.setdefault(problem.module, []).append(problem.cluster)

    def encode_module(module: int) -> dict[Problem, Shared]:
        stack = job.updates.load(module)
        solved = {}
        for cluster in clusters[module]:
            own = stack.select({i for i in stack.members if labels[i] == cluster})
            weights = job.updates.weights[list(own.members), module]
            solved[Problem(cluster, module)] = encode_shared(
                own, weights, method=job.method, rank=job.rank, dtype=job.dtype, seed=job.seed
            )
        return solved

    together: dict[Problem, Shared] = {}
    with closing(in_order(encode_module, clusters, job.updates.device)) as results:
        for solved in results:
            together |= solved
    return together


def read_encoded(job: SharedJob, labels: Labels, places: dict[Problem, str], pieces: Pieces) -> Encoded:
    """What the pieces say of adapters with these ``labels``: who lost how much, and which bases are still of use."""
    lost = torch.zeros(job.ranks.shape, dtype=torch.float64)
    numbered = torch.tensor([-1 if label is None else label for label in labels], dtype=torch.int64)
    kept = {}
    for problem, name in places.items():
        reader = pieces.read(name)
        members = reader.tensor(tensor_name(problem, "members"))
        own = numbered[members] == problem.cluster
        if own.any():
            kept[problem] = name
            lost[members[own], problem.module] = reader.tensor(tensor_name(problem, "squared_errors"))[own]
    return Encoded(labels, kept, lost)


def tensor_name(problem: Problem, field: str) -> str:
    """What a tensor of a problem's solution is called in its piece; the fields are those of `Shared`."""
    return f"{problem.cluster}.{problem.module}.{field}"


def _to_store(problem: Problem, shared: Shared) -> dict[str, Tensor]:
    fields = {
        "u": shared.u,
        "v": shared.v,
        "cores": shared.cores,
        "members": torch.tensor(shared.members, dtype=torch.int64),
        "squared_errors": shared.squared_errors,
    }
    return {tensor_name(problem, field): tensor for field, tensor in fields.items()}


def _alone(labels: Labels) -> set[int]:
    return {i for i, label in enumerate(labels) if label is None}
