"""Singular components quantised for a fixed number of bits a code, as `quantise` does it for entropy coded ones.

The entries of s·u are rounded to 2^b equally spaced levels about 0: ±1, ±3, …, ±(2^b − 1), spaced so that Gaussian
entries lose least; those of s·v likewise. With 8 bits there are 255 levels, 0 among them, up to the largest entry. A
component has the pair of bits, for u and v, with the least ‖ΔW − ΔŴ‖² + λ · bits, or is dropped: reverse water-filling
on energy per bit.

λ is that of fine rounding with one step Δ, whose Δ²/12 an entry would be a quarter with one bit more. So steps mean
about what they mean there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from .factored import TINY
from .gaussian import density, greatest, mass_below
from .quantise import LOST_BY_SCALES, MOST, Codes, Components, Losses, fitted, last

BITS_OF_COMPONENT = 64
"""What a component takes besides its codes: where they begin, how many bits they have, and its scale."""
FINEST = 8
"""The most bits of a code."""
_PER_SQUARED_STEP = math.log(2) / 6  # λ / Δ²
_SPACINGS = (-6.0, 1.0, 4096)  # as powers of 2: 0.1% apart, from those of 7 bits to those of 1


_Point = tuple[int, float, tuple[int, ...]]  # bits of a component, the share of its energy that is kept, the pair


class Choice(NamedTuple):
    """How components of one size may be quantised, in ascending bits: dropped, then every pair that is best for a λ."""

    pairs: Tensor
    """[p, 2]: the bits of a code of u and of v"""
    bits: Tensor
    """[p] in float64: of a component in all"""
    kept: Tensor
    """[p] in float64: the share of its energy that is kept"""
    worth: Tensor
    """[p − 1] in float64, ascending: the s² / λ from which on the next pair is better"""

    def of(self, s: Tensor, step: float | Tensor) -> Tensor:
        """The position of the best pair for components with these singular values."""
        return torch.searchsorted(self.worth, (s / step).square() / _PER_SQUARED_STEP, right=True)


def quantise(components: Components, step: float) -> Codes:
    """Quantise every component with the bits that it is worth at ``step``."""
    d_out, d_in = components.b.shape[-2], components.a.shape[-1]
    choice = choice_for(d_out, d_in)
    chosen = choice.of(components.spectrum.strengths, step)
    most = last((chosen > 0).any(0).tolist())
    pairs, s = choice.pairs[chosen[..., :most]].to(components.s.device), components.s[..., :most]
    u = _rounded(components.b @ components.x[..., :most], s / math.sqrt(d_out), pairs[..., 0], -2)
    v = _rounded(
        (components.y[..., :most, :] * s.unsqueeze(-1)) @ components.a,
        s * components.lengths[..., :most] / math.sqrt(d_in),
        pairs[..., 1],
        -1,
    )
    return fitted(components, u, v, pairs[..., 0] > 0)


def predicted_of(s: Tensor, d_out: int, d_in: int, step: float | Tensor) -> tuple[Tensor, Tensor]:
    """What `quantise` will lose of the energy of every component, a share [..., r], and the bits of updates [...].

    From the `Components.strengths` ``s`` [..., r] alone, on the CPU, in float64.
    """
    choice = choice_for(d_out, d_in)
    chosen = choice.of(s, step)
    return 1 - choice.kept[chosen], choice.bits[chosen].sum(-1)


def losses_of(components: Sequence[Components]) -> Losses:
    """What `quantise` will lose of all updates, about."""
    spectra = []
    for each in components:
        s = each.spectrum.s.flatten()
        spectra.append((s.clamp_min(TINY).log2(), s.square(), choice_for(each.b.shape[-2], each.a.shape[-1])))

    def losses(steps: Tensor) -> Tensor:
        lost = torch.zeros_like(steps)
        for logarithms, energies, choice in spectra:
            lost += (1 - choice.kept[choice.of((logarithms - steps[:, None]).exp2(), 1.0)]) @ energies
        return lost

    return losses


@cache
def choice_for(d_out: int, d_in: int) -> Choice:
    """The upper convex hull of what is kept over bits."""
    options: list[_Point] = []
    for pair in product(range(1, FINEST + 1), repeat=2):
        sizes = list(zip(pair, (d_out, d_in), strict=True))
        bits = BITS_OF_COMPONENT + sum(8 * math.ceil(bits * length / 8) for bits, length in sizes)
        kept = (1 - LOST_BY_SCALES) * math.prod(1 - _left(bits, length) for bits, length in sizes)
        options.append((bits, kept, pair))
    hull: list[_Point] = [(0, 0.0, (0, 0))]
    for point in sorted(options):
        while len(hull) > 1 and _gain(hull[-2], point) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        if point[1] > hull[-1][1]:
            hull.append(point)
    worth = [1 / _gain(one, other) for one, other in pairwise(hull)]
    in_all, kept_of, pairs = zip(*hull, strict=True)
    bits_of, shares, worths = (torch.tensor(each, dtype=torch.float64) for each in (in_all, kept_of, worth))
    return Choice(torch.tensor(pairs), bits_of, shares, worths)


def _gain(one: _Point, other: _Point) -> float:
    """What is kept for a bit, from one point to another."""
    return (other[1] - one[1]) / (other[0] - one[0]) if other[0] > one[0] else math.inf


def _left(bits: int, length: int) -> float:
    """The share of the energy of Gaussian entries that is lost."""
    if bits < FINEST:
        return _levels(bits)[1]
    return (greatest(length) / MOST) ** 2 / 12


@cache
def _levels(bits: int) -> tuple[float, float]:
    """The best distance of 2^bits levels, in deviations, and the share of the energy that is lost with it."""
    low, high, count = _SPACINGS
    spacing = torch.linspace(low, high, count, dtype=torch.float64).exp2()
    code = torch.arange(1, 2**bits, 2, dtype=torch.float64)  # of one sign
    edges = torch.arange(2 ** (bits - 1), dtype=torch.float64) * spacing[:, None]
    above = torch.cat([edges[:, 1:], torch.full_like(edges[:, :1], math.inf)], 1)
    product_ = (code * (density(edges) - density(above))).sum(1)  # E[x q] / 2
    energy = (code.square() * (mass_below(above) - mass_below(edges))).sum(1)  # E[q²] / 2
    left = 1 - 2 * product_.square() / energy  # with the best scale
    best = int(left.argmin())
    return float(spacing[best]), float(left[best])


def _rounded(entries: Tensor, deviations: Tensor, bits: Tensor, dim: int) -> Tensor:
    """The codes of entries, in float64, 0 where there are no bits; ``dim`` runs over the entries of a component."""
    spacings = torch.tensor([1.0, *(_levels(each)[0] for each in range(1, FINEST))], dtype=torch.float64)
    deviations, bits = deviations.unsqueeze(dim), bits.unsqueeze(dim)
    largest = torch.exp2(bits) - 1
    spacing = (spacings.to(bits.device)[bits % FINEST] * deviations).clamp_min(TINY)
    odd = (2 * (entries / spacing).floor() + 1).clamp(-largest, largest)
    finest = (entries * (MOST / entries.abs().amax(dim, keepdim=True).clamp_min(TINY))).round()
    return torch.where(bits == FINEST, finest, odd) * (bits > 0)
