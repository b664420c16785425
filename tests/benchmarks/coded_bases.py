"""Would bases and cores of few bits pay? `joint` and `diag` bundles with all their numbers coded as `coded` codes.

Not a scheme of lorazip: a measurement, for `frontier.py`. Of a bundle, the columns of U and V are rounded, each with a
scale of its own; then cores are solved again by least squares against the rounded bases, and rounded too. Codes go into
the streams of a `coded` file (several in a byte, deflate), scales and numbers of streams are deflated as its index is,
all clusters together. Besides these it is given the bytes that a `coded` bundle of the same adapters has besides codes,
so that the two can be compared; no header, and nothing for clusters, is counted.

Steps are chosen in two ways:

- **bits**: 8 or 4 for a code, −127 … 127 or −7 … 7. The step of a column is the one that loses least, and so is that of
  a row of a core. Diagonals are divided by what they are over all adapters first, which goes into the scales of bases.
- **one step** Δ for all that a cluster has of a module, as `coded` has for the components of an adapter. With weights
  w_i = 1/‖ΔW_i‖² and E_k = Σ_i w_i ‖row k of Σ_i‖², an error δ of column k of U costs E_k ‖δ‖², one of a core w_i ‖δ‖².
  So E_k^½ u_k, the same of V, and w_i^½ Σ_i are all rounded to multiples of Δ: reverse water-filling between what is
  shared and what is own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from competitors import Point
from numpy.typing import NDArray
from torch import Tensor

from lorazip_core.adapter.collection import Collection
from lorazip_core.bundle.reader import Bundle
from lorazip_core.bundle.size import bytes_besides_updates
from lorazip_core.maths.factored import TINY
from lorazip_core.maths.stack import Stack
from lorazip_core.schemes.registry import SCHEMES
from lorazip_core.schemes.streams import assign_streams, deflate, measure, pack_streams

OCTAVE = 32  # scales are powers of 2 with this denominator in the exponent, as those of coded
_RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # steps that are tried, as shares of the one that reaches the largest number
_MOST = 127
_RIDGE = 1e-9  # of the largest entry of a Gram matrix: columns that all round to zero stay solvable


class Bits(NamedTuple):
    """Codes of so many bits."""

    bases: int
    cores: int

    @property
    def kind(self) -> str:
        return f"{self.bases} bits"

    def __str__(self) -> str:
        return f"{self.bases} and {self.cores} bits"


class OneStep(NamedTuple):
    """The step, in deviations of an entry of the mean column of both bases."""

    step: float
    kind: str = "one step"

    def __str__(self) -> str:
        return f"step {self.step:g}"


Rounding = Bits | OneStep
ROUNDINGS: tuple[Rounding, ...] = (Bits(8, 8), Bits(4, 8), Bits(4, 4), *map(OneStep, (0.125, 0.25, 0.5, 1.0, 2.0)))


class Problem(NamedTuple):
    """One module of one cluster, in float64."""

    u: Tensor  # [d_out, R]
    v: Tensor  # [d_in, R]
    stack: Stack  # updates, in the order of their numbers in the collection
    weights: Tensor  # [n]: 1 / ‖ΔW_i‖² over all modules of an adapter
    diagonal: bool

    @property
    def members(self) -> Tensor:
        return torch.tensor(self.stack.adapters)


class Coded(NamedTuple):
    """What a module of a cluster becomes: vectors of codes, the exponents of their scales, and ‖ΔW − ΔŴ‖² [n]."""

    vectors: list[NDArray[np.int8]]
    exponents: NDArray[np.int64]
    lost: Tensor


def points(path: Path, collection: Collection, setting: str) -> list[Point]:
    """The bundle at ``path``, of ``collection``, with every rounding of `ROUNDINGS`.

    Raises ValueError for a bundle that has adapters in no cluster.
    """
    bundle = Bundle(path)
    if any(adapter.cluster is None for adapter in bundle.manifest.adapters):
        raise ValueError(f"{path}: not all adapters are in clusters")
    labels = np.array([adapter.cluster for adapter in bundle.manifest.adapters], np.uint8)
    energies = torch.tensor([adapter.squared_norm for adapter in bundle.manifest.adapters], dtype=torch.float64)
    found: dict[Rounding, list[Coded]] = {rounding: [] for rounding in ROUNDINGS}
    lost = {rounding: torch.zeros_like(energies) for rounding in ROUNDINGS}
    for problem in problems(bundle, collection, energies):
        for rounding in ROUNDINGS:
            coded = code(problem, rounding)
            lost[rounding].index_add_(0, problem.members, coded.lost)
            found[rounding].append(coded)
    method = bundle.manifest.clusters[0].method
    besides = bytes_besides_updates(collection, SCHEMES["coded"]) + len(deflate(labels, alone=False))
    result = []
    for rounding in ROUNDINGS:
        errors = lost[rounding].clamp_min(0) / energies.clamp_min(TINY)
        size = packed_bytes(found[rounding]) + besides
        name = f"{method}, {rounding.kind}"
        result.append(Point(name, f"{setting}, {rounding}", size, float(errors.mean()), float(errors.max())))
    return result


def problems(bundle: Bundle, collection: Collection, energies: Tensor) -> Iterator[Problem]:
    """Every module of every cluster of a bundle."""
    weights = 1 / energies.clamp_min(TINY)
    for module in bundle.manifest.modules:
        for number, cluster in enumerate(bundle.manifest.clusters):
            having = [
                i
                for i, adapter in enumerate(bundle.manifest.adapters)
                if adapter.cluster == number and module.name in collection.adapters[i].parts
            ]
            if not having:
                continue
            shared = bundle.shared(cluster, module.name)
            stack = Stack.of([collection.adapters[i].factors(module.name) for i in having], having).to(torch.float64)
            diagonal = cluster.method == "diag"
            own = weights[list(stack.adapters)]
            yield Problem(shared["U"].double(), shared["V"].double(), stack, own, diagonal)


def code(problem: Problem, rounding: Rounding) -> Coded:
    """Round the bases, solve for the cores, round these."""
    exact = fitted(problem, problem.u, problem.v)
    weighted = exact.square() * problem.weights.view(-1, *[1] * (exact.ndim - 1))
    rows, columns = (weighted.sum(0),) * 2 if problem.diagonal else (weighted.sum((0, 2)), weighted.sum((0, 1)))
    if isinstance(rounding, Bits):
        u, v = (rounded(x.mT, rounding.bases) for x in (problem.u, problem.v))
    else:
        # One Δ for what has an energy of Σ_k E_k / R in a column: its entries have a deviation of (Σ E / R / d)^½.
        sides = sum(problem.u.shape[:1] + problem.v.shape[:1]) / 2
        step = rounding.step * math.sqrt(max(float(rows.sum()) / len(rows) / sides, TINY))
        u, v = (
            stepped(x.mT, step / energy.clamp_min(TINY).sqrt())
            for x, energy in ((problem.u, rows), (problem.v, columns))
        )
    near_u, near_v = u.values.mT, v.values.mT
    cores = fitted(problem, near_u, near_v)
    if isinstance(rounding, Bits):
        # What numbers of diagonals are over all adapters is a matter of the scales of the bases.
        even = rows.sqrt().clamp_min(1e-6 * float(rows.max().sqrt())) if problem.diagonal else torch.ones(1)
        own = rounded((cores / even).flatten(0, -2), rounding.cores)
        kept = own.values.view_as(cores) * even
    else:
        own = stepped(cores.flatten(1), step / problem.weights.sqrt())
        kept = own.values.view_as(cores)
    # By row of the cores, which are alike over adapters.
    by_row = own.codes.view(len(cores), cores.shape[1], -1).transpose(0, 1).flatten(1)
    vectors = [*u.codes, *v.codes, *by_row]
    exponents = torch.cat([u.exponents, v.exponents, own.exponents])
    return Coded([each.numpy() for each in vectors], exponents.numpy(), _lost(problem, near_u, near_v, kept))


class Codes(NamedTuple):
    """Rows of whole numbers [m, d] of int8, each with a scale 2^(exponent / 32), [m]; ``values`` are their products."""

    codes: Tensor
    exponents: Tensor
    values: Tensor


def rounded(x: Tensor, bits: int) -> Codes:
    """Rows of ``x`` [m, d] in codes of ``bits``, with the scales that lose least."""
    most = 2 ** (bits - 1) - 1
    largest = x.abs().amax(1) / most
    best: Codes | None = None
    least = torch.full(x.shape[:1], math.inf, dtype=x.dtype)
    for ratio in _RATIOS:
        found = _coded(x, ratio * largest, most)
        lost = (found.values - x).square().sum(1)
        if best is None:
            best, least = found, lost
            continue
        better = lost < least
        least = torch.where(better, lost, least)
        best = Codes(
            *(torch.where(better.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(best, found, strict=True))
        )
    assert best is not None
    return best


def stepped(x: Tensor, steps: Tensor) -> Codes:
    """Rows of ``x`` [m, d] as multiples of ``steps`` [m], or of coarser ones where a code would not fit into a byte."""
    return _coded(x, torch.maximum(steps, x.abs().amax(1) / _MOST), _MOST)


def _coded(x: Tensor, steps: Tensor, most: int) -> Codes:
    exponents = (steps.clamp_min(TINY).log2() * OCTAVE).ceil().long()
    scales = torch.exp2(exponents.double() / OCTAVE)[:, None]
    codes = (x / scales).round().clamp(-most, most)
    return Codes(codes.to(torch.int8), exponents, codes * scales)


def fitted(problem: Problem, u: Tensor, v: Tensor) -> Tensor:
    """The cores with the least ‖ΔW_i − U Σ_i Vᵀ‖²: [n, R, R], or their diagonals [n, R]."""
    inner = problem.stack.cores(u, v)
    gram_u, gram_v = (_ridged(x.mT @ x) for x in (u, v))
    if problem.diagonal:
        both = _ridged((u.mT @ u) * (v.mT @ v))
        return torch.linalg.solve(both, inner.diagonal(dim1=1, dim2=2).mT).mT
    return torch.linalg.solve(gram_u, torch.linalg.solve(gram_v, inner.mT).mT)


def _ridged(gram: Tensor) -> Tensor:
    ridge = _RIDGE * gram.diagonal().max().clamp_min(TINY)
    return gram + ridge * torch.eye(len(gram), dtype=gram.dtype)


def _lost(problem: Problem, u: Tensor, v: Tensor, cores: Tensor) -> Tensor:
    """‖ΔW_i − U Σ_i Vᵀ‖², [n]."""
    full = torch.diag_embed(cores) if problem.diagonal else cores
    inner = (problem.stack.cores(u, v) * full).sum((1, 2))
    norms = ((u.mT @ u @ full) * (full @ (v.mT @ v))).sum((1, 2))
    return problem.stack.squared_norms() - 2 * inner + norms


def packed_bytes(every: Sequence[Coded]) -> int:
    """Bytes of all codes, their scales, and what says which stream is whose."""
    vectors = [vector for coded in every for vector in coded.vectors]
    codes, lengths = np.concatenate(vectors), np.array(list(map(len, vectors)), np.int64)
    streams, kinds = assign_streams(lengths, measure(codes, lengths))
    exponents = np.concatenate([coded.exponents for coded in every])
    apart = exponents - int(np.median(exponents))
    index = [streams, (apart & 255).astype(np.uint8), (apart >> 8 & 255).astype(np.uint8)]
    small = sum(min(len(deflate(column, alone=alone)) for alone in (True, False)) for column in index)
    return len(pack_streams(codes, lengths, streams, kinds)) + len(kinds) + small
