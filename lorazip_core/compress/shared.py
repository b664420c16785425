"""Adapters that share bases: cluster by cluster, module by module, with a guarantee on the worst adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..factorise import Shared, encode_shared
from ..progress import Advance
from ..updates import Updates
from ..workers import in_order

# Factors are read in float32, their scale folded in: what that rounds off is unknown to the errors found here.
_UNSEEN = 2.0**-48


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
    def encode_module(module: int) -> Encoded:
        encoded: Encoded = {}
        stack = job.updates.load(module)
        for cluster in sorted(label for label in clusters if label is not None):
            own = stack.select({i for i in stack.members if labels[i] == cluster})
            if own.members:
                encoded[cluster, module] = encode_shared(
                    own,
                    job.updates.weights[list(own.members), module],
                    method=job.method,
                    rank=job.rank,
                    dtype=job.dtype,
                    seed=job.seed,
                )
        return encoded

    together: Encoded = {}
    for encoded in in_order(encode_module, range(len(job.updates.shapes)), job.updates.device):
        together |= encoded
        advance(1)
    return together
