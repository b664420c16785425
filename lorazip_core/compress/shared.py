"""Adapters that share bases: cluster by cluster, module by module, with a guarantee on the worst adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..factorise import Shared, encode_diag, encode_joint
from ..joint import QUICK, THOROUGH
from ..progress import Advance
from ..updates import Updates
from ..workers import in_order

# Factors are read in float32, their scale folded in: what that rounds off is unknown to the errors found here.
_UNSEEN = 2.0**-48
_MANY = 2**14  # updates in a collection: of more, the search for bases is the quick one


@dataclass(frozen=True)
class SharedJob:
    """What encoding needs to know."""

    updates: Updates
    method: Literal["joint", "diag"]
    rank: int
    dtype: torch.dtype
    seed: int

    def shares(self, encoded: Encoded) -> Tensor:
        """The squared error of every adapter over all modules, [n]; 0 where it is in no cluster or all zero."""
        lost = torch.zeros_like(self.updates.norms)
        for (_, module), shared in encoded.items():
            lost[list(shared.members), module] = shared.squared_errors
        return self.updates.shares(lost.sum(1))


Encoded = dict[tuple[int, int], Shared]
"""What is stored, by (cluster, module); nothing where no adapter of the cluster has the module."""


def encode_clusters(
    job: SharedJob, labels: list[int | None], max_error: float | None, advance: Advance
) -> tuple[Encoded, list[int | None]]:
    """Encode every cluster of ``labels``; an adapter that would exceed ``max_error`` gets the label None instead.

    Bases that served such an adapter are fitted again without it, once. ``advance`` is called with 1 for each module.
    """
    encoded = _encode(job, labels, set(labels) - {None}, advance)
    if max_error is None:
        return encoded, labels
    for refit in (True, False):
        failing = {i for i, share in enumerate(job.shares(encoded).tolist()) if max(share, _UNSEEN) > max_error}
        if not failing:
            break
        changed = {labels[i] for i in failing}
        labels = [None if i in failing else label for i, label in enumerate(labels)]
        kept = {i for i, label in enumerate(labels) if label is not None}
        if refit:
            again = _encode(job, labels, changed, lambda steps: None)
            encoded = {key: shared for key, shared in encoded.items() if key[0] not in changed} | again
        else:
            encoded = {key: shared.only(kept) for key, shared in encoded.items()}
    return {key: shared for key, shared in encoded.items() if shared.members}, labels


def _encode(job: SharedJob, labels: list[int | None], clusters: set[int | None], advance: Advance) -> Encoded:
    """Whole modules, for the clusters that are wanted."""
    numbers = torch.tensor([-1 if label is None or label not in clusters else label for label in labels])
    together: Encoded = {}
    if not clusters:
        return together
    for group, encoded in zip(
        job.updates.groups(),
        in_order(lambda group: encode_modules(job, group, numbers), job.updates.groups(), job.updates.device),
        strict=True,
    ):
        together |= encoded
        advance(len(group))
    return together


def encode_modules(job: SharedJob, modules: list[int], labels: Tensor) -> Encoded:
    """Encode modules of one shape for the clusters in ``labels`` [n], −1 for adapters that are in none."""
    stacks = [job.updates.load(module) for module in modules]
    count = int(labels.max()) + 1
    problems: dict[tuple[int, int], int] = {}
    owners = []
    for module, stack in zip(modules, stacks, strict=True):
        own = labels[list(stack.members)]
        for cluster in torch.unique(own[own >= 0]).tolist():
            problems[cluster, module] = len(problems)
        number = torch.tensor([problems.get((cluster, module), -1) for cluster in (*range(count), -1)])
        owners.append(number[own])
    weights = [job.updates.weights[list(stack.members), module] for module, stack in zip(modules, stacks, strict=True)]
    if job.method == "joint":
        many = int((job.updates.ranks > 0).sum()) > _MANY
        encoded = encode_joint(
            stacks,
            owners,
            weights,
            len(problems),
            rank=job.rank,
            dtype=job.dtype,
            seed=job.seed,
            effort=QUICK if many else THOROUGH,
        )
        return dict(zip(problems, encoded, strict=True))
    found: Encoded = {}
    for stack, owner, weight, module in zip(stacks, owners, weights, modules, strict=True):
        for (cluster, _), problem in ((key, number) for key, number in problems.items() if key[1] == module):
            kept = owner == problem
            some = stack.select({stack.members[i] for i in kept.nonzero()[:, 0].tolist()})
            found[cluster, module] = encode_diag(some, weight[kept], rank=job.rank, dtype=job.dtype, seed=job.seed)
    return found
