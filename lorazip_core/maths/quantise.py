"""Singular components quantised with one step, and their scales refitted.

A component s·u·vᵀ of an update ΔW becomes g·û·v̂ᵀ: the entries of s·u and of s·v are rounded to multiples of one step Δ,
which leaves integers û and v̂, and g is fitted by least squares. One Δ for all components of an adapter makes the
distortion of every entry the same: reverse water-filling. Strong components get many bits, weak ones round to zero and
are dropped, and so do weak modules.

Where the second moments of inputs are known, components and scales are those with the least error of outputs: v is then
not of length 1, but vᵀ(H + λI)v is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .factored import TINY, Factors
from .gaussian import density, greatest, mass_below
from .weighting import DAMPING, InputMoments

MOST = 127
"""The largest code: codes are int8. A component whose entries are larger gets a coarser step."""
OCTAVE = 32
"""Scales are powers of 2 with this denominator in the exponent: 1.1% apart at most, which costs 4·10⁻⁵ of an energy."""
LOST_BY_SCALES = (math.log(2) / OCTAVE) ** 2 / 12
"""Of an energy, on average."""

WEAKEST = 1.4  # steps to the deviation of entries: beyond, the bits of a component are better spent elsewhere
BITS_OF_INDEX = 12
"""About what a component takes in the index of a file, its scale included."""
_REDUNDANCY = 1.01  # of Huffman codes
_ROUNDS, _TRIED = 3, 32  # of 14 octaves: to 0.0005 of one
_OCTAVES, _PER_OCTAVE = 16, 64  # of a curve; beyond, no code gets larger
_RIDGE = 1e-12  # of ‖û v̂ᵀ‖²
_NOISE = 1e-7  # of the largest singular value: what smaller ones are is rounding
_CODE_RANGE = torch.iinfo(torch.int16)
_ALL, _NONE = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

Losses = Callable[[Tensor], Tensor]
"""For log2 of steps [t], what is lost of updates with each, Σ‖ΔW − ΔŴ‖² [t]; on the CPU, in float64."""


class Spectrum(NamedTuple):
    """What the components of m updates tell on the CPU, in float64."""

    s: Tensor
    """[m, r]"""
    strengths: Tensor
    """[m, r]: s·√‖v‖, which decides on bits: s itself where inputs are not known."""
    energies: Tensor
    """[m]: ‖B A‖_F²"""


@dataclass(frozen=True, eq=False)
class Components:
    """The singular components of m updates B A of one shape, in float64; those of an update descend.

    They are products with the factors, s·u = B x and vᵀ = yᵀ A, so that only those that are wanted are made.
    """

    b: Tensor
    """[m, d_out, r]"""
    a: Tensor
    """[m, r, d_in]"""
    s: Tensor
    """[m, r]"""
    x: Tensor
    """[m, r, r]: a column for each component"""
    y: Tensor
    """[m, r, r]: a row for each component"""
    energies: Tensor
    """[m]: ‖B A‖_F²"""
    lengths: Tensor
    """[m, r]: ‖v‖, which is 1 where inputs are not known"""
    spectrum: Spectrum
    inputs: InputMoments | None = None

    @classmethod
    def of(cls, exact: Factors, inputs: InputMoments | None = None) -> Components:
        """Decompose updates, from products of the factors alone, under the second moments of ``inputs``, damped.

        BᵀB = H Hᵀ and Hᵀ (AAᵀ) H = P s² Pᵀ give vᵀ = Pᵀ Hᵀ A / s and s·u = B (AAᵀ) H P / s. That squares the
        condition: components below 10⁻⁶ of the largest are not to be relied on, and none such is worth a bit.
        """
        return cls.of_all([exact], None if inputs is None else [inputs])[0]

    @classmethod
    def of_all(cls, exact: Sequence[Factors], inputs: Sequence[InputMoments] | None = None) -> list[Components]:
        """`of` updates of several shapes, all of one rank r: what are r×r matrices is computed of all together."""
        counts = [len(b) for b, _ in exact]
        gram_b, plain = torch.cat([b.mT @ b for b, _ in exact]), torch.cat([a @ a.mT for _, a in exact])
        norm = (gram_b * plain).sum((-2, -1)).clamp_min_(0)
        gram_a = plain
        if inputs is not None:
            between = [known.between(a, a) for known, (_, a) in zip(inputs, exact, strict=True)]
            gram_a = torch.cat(between) + DAMPING * plain
        # Columns of B and rows of A may be of any size, as long as their products matter alike: made equally large.
        of_b, of_a = (gram.diagonal(dim1=-2, dim2=-1) for gram in (gram_b, gram_a))
        even = torch.where(torch.minimum(of_b, of_a) > TINY, (of_a / of_b.clamp_min(TINY)) ** 0.25, 1.0)
        both = even.unsqueeze(-1) * even.unsqueeze(-2)
        gram_b, gram_a = gram_b * both, gram_a / both
        energies, vectors = torch.linalg.eigh(gram_b)
        half = vectors * energies.clamp_min_(0).sqrt_().unsqueeze(-2)
        squares, turned = torch.linalg.eigh(half.mT @ gram_a @ half)
        s = squares.clamp_min_(0).sqrt_().flip(-1)
        inverse = torch.where(s > _NOISE * s[..., :1], 1 / s.clamp_min(TINY), 0.0)
        mixed = half @ turned.flip(-1) * inverse.unsqueeze(-2)
        x, y = gram_a @ mixed * even.unsqueeze(-1), mixed.mT / even.unsqueeze(-2)
        lengths, strengths = torch.ones_like(s), s
        if inputs is not None:
            lengths = ((y @ plain) * y).sum(-1).clamp_min_(0).sqrt_()
            strengths = s * lengths.sqrt()
        # To the CPU in one piece: each copy from a device waits for all that it still has to do.
        told = torch.cat([s.flatten(), strengths.flatten(), norm]).cpu()
        values, widths, norms = told.split_with_sizes([s.numel(), s.numel(), len(s)])
        told_of = (part.view(len(s), -1).split_with_sizes(counts) for part in (values, widths))
        spectra = map(Spectrum, *told_of, norms.split_with_sizes(counts))
        own = zip(*(each.split_with_sizes(counts) for each in (s, x, y, norm, lengths)), strict=True)
        found = []
        for number, ((b, a), spectrum, tensors) in enumerate(zip(exact, spectra, own, strict=True)):
            of_s, of_x, of_y, energies, of_lengths = tensors
            known = None if inputs is None else inputs[number]
            found.append(cls(b, a, of_s, of_x, of_y, energies, of_lengths, spectrum, known))
        return found

    @cached_property
    def deviations(self) -> Tensor:
        """[m, r]: the geometric mean of the deviations of the entries of s·u and of s·v."""
        strengths = self.s if self.inputs is None else self.s * self.lengths.sqrt()
        return strengths / self._entries

    @cached_property
    def widest(self) -> list[float]:
        """[r]: the largest of the `deviations` of any update."""
        widest: list[float] = (self.spectrum.strengths / self._entries).amax(0).tolist()
        return widest

    @property
    def _entries(self) -> float:
        return float((self.b.shape[-2] * self.a.shape[-1]) ** 0.25)


class Codes(NamedTuple):
    """Components as they are stored: ΔŴ = Σ_k 2^(scale_k / 32) û_k v̂_kᵀ over those of an update that are ``kept``."""

    u: Tensor
    """[m, d_out, r] of int8"""
    v: Tensor
    """[m, r, d_in] of int8"""
    scale: Tensor
    """[m, r] of int16"""
    kept: Tensor
    """[m, r] of bool"""
    squared_errors: Tensor
    """[m] in float64: ‖ΔW − ΔŴ‖²"""


def quantise(components: Components, step: float) -> Codes:
    """Quantise every entry of s·u and s·v with ``step``, or a coarser one where a code would be too large."""
    least = step / WEAKEST
    most = last([widest >= least for widest in components.widest])
    kept = components.deviations[..., :most] >= least
    u = _rounded(components.b @ components.x[..., :most], step, kept.unsqueeze(-2), -2)
    strong = components.y[..., :most, :] * components.s[..., :most].unsqueeze(-1)
    v = _rounded(strong @ components.a, step, kept.unsqueeze(-1), -1)
    return fitted(components, u, v, kept)


def fitted(components: Components, u: Tensor, v: Tensor, kept: Tensor) -> Codes:
    """The first k components with the codes û [m, d_out, k] and v̂ [m, k, d_in], in float64, and the best scales.

    Those that are not ``kept`` [m, k] have codes of 0, and those whose codes are of no use are not kept.
    """
    of_u, with_b, inputs = u.mT @ u, u.mT @ components.b, components.inputs
    gram = of_u * (v @ v.mT)  # ⟨û_j v̂_jᵀ, û_k v̂_kᵀ⟩
    kept = kept & (gram.diagonal(dim1=-2, dim2=-1) > 0)
    inner = (with_b * (v @ components.a.mT)).sum(-1)  # ⟨û v̂ᵀ, ΔW⟩
    if inputs is None:
        scales = _best_scales(gram, inner, kept)
    else:
        weighted = of_u * inputs.between(v, v) + DAMPING * gram
        scales = _best_scales(weighted, (with_b * inputs.between(v, components.a)).sum(-1) + DAMPING * inner, kept)
    kept &= scales > 0
    code = torch.where(kept, scales, 1.0).clamp_min_(TINY).log2_().mul_(OCTAVE).round_()
    code.clamp_(_CODE_RANGE.min, _CODE_RANGE.max)
    stored = unpacked_scale(code, torch.float64) * kept
    error = components.energies - 2 * (stored * inner).sum(-1)
    error += (stored.unsqueeze(-2) @ gram @ stored.unsqueeze(-1))[..., 0, 0]
    return Codes(u.to(torch.int8), v.to(torch.int8), code.to(torch.int16), kept, error.clamp_min_(0))


def last(kept: Sequence[bool]) -> int:
    """How many components come up to the last one that is ``kept``."""
    return max((place + 1 for place, each in enumerate(kept) if each), default=0)


def predicted_of(s: Tensor, d_out: int, d_in: int, step: float | Tensor) -> tuple[Tensor, Tensor]:
    """What `quantise` will lose of the energy of every component, a share [..., r], and the bits of updates [...].

    From the `strengths` of components ``s`` [..., r] alone, on the CPU.
    """
    curve = _curve(d_out, d_in)
    at = curve.at((s / step).clamp_min(TINY).log2())
    return curve.left_at(at), curve.bits_at(at).sum(-1)


class _At(NamedTuple):
    """Places on a curve: between two of its points, or before the first one, where components are not kept."""

    kept: Tensor
    below: Tensor
    share: Tensor


class _Curve(NamedTuple):
    """Components of updates of one size, over log2(s / Δ) from ``start`` on, where the weakest are that are kept."""

    start: float
    bits: Tensor
    left: Tensor
    """The share of its energy that is lost."""

    def at(self, ratio: Tensor) -> _At:
        """The places of components with these log2(s / Δ)."""
        place = (ratio - self.start) * _PER_OCTAVE
        kept = place >= 0
        place = place.clamp(0, len(self.bits) - 1 - 1e-9)
        below = place.floor()
        return _At(kept, below.long(), place - below)

    def left_at(self, at: _At) -> Tensor:
        """The shares of their energies that are lost."""
        left = torch.lerp(self.left[at.below], self.left[at.below + 1], at.share)
        return torch.where(at.kept, left, 1.0)

    def bits_at(self, at: _At) -> Tensor:
        """What they take."""
        return torch.lerp(self.bits[at.below], self.bits[at.below + 1], at.share) * at.kept


@cache
def _curve(d_out: int, d_in: int) -> _Curve:
    start = 0.25 * math.log2(d_out * d_in) - math.log2(WEAKEST)
    ratio = (start + torch.arange(_OCTAVES * _PER_OCTAVE + 1, dtype=torch.float64) / _PER_OCTAVE).exp2()
    rate = _rate()
    energy, bits = torch.full_like(ratio, 1 - LOST_BY_SCALES), torch.full_like(ratio, BITS_OF_INDEX)
    for size in (d_out, d_in):
        own = (ratio / size**0.5).clamp_max(MOST / greatest(size))
        energy *= 1 - rate.left(own)
        bits += size * rate.bits(own) * _REDUNDANCY
    return _Curve(start, bits, 1 - energy)


def losses_of(components: Sequence[Components]) -> Losses:
    """What `quantise` will lose of all updates, about."""
    curves = [_curve(each.b.shape[-2], each.a.shape[-1]) for each in components]
    spectra = [each.spectrum.s.flatten() for each in components]
    s = torch.cat(spectra)
    counts = torch.tensor([len(each) for each in spectra])
    start = torch.tensor([curve.start for curve in curves], dtype=torch.float64).repeat_interleave(counts)
    place, energies = (s.clamp_min(TINY).log2() - start) * _PER_OCTAVE, s.square()
    # The curves one after another, each behind a point for components that are not kept.
    first = (torch.arange(len(curves)) * (len(curves[0].left) + 1) + 1).repeat_interleave(counts)
    values = torch.cat([part for curve in curves for part in (_ALL, curve.left)])
    slopes = torch.cat([part for curve in curves for part in (_NONE, curve.left.diff(), _NONE)])

    def losses(steps: Tensor) -> Tensor:
        at = (place - steps[:, None] * _PER_OCTAVE).clamp_(-1, _OCTAVES * _PER_OCTAVE - 1e-9)
        below = at.floor()
        points = below.long().add_(first)
        return torch.addcmul(values[points], slopes[points], at.sub_(below)) @ energies

    return losses


def predicted_step(components: Sequence[Components], limit: float, losses: Losses) -> float:
    """About the largest step with which Σ‖ΔW − ΔŴ‖² over all of ``components`` is at most ``limit``.

    ``losses`` are those of the way to quantise them.
    """
    largest = max(max(each.widest) for each in components)
    low, high = math.log2(largest) - 12, math.log2(largest) + 2
    for _ in range(_ROUNDS):
        steps = torch.linspace(low, high, _TRIED, dtype=torch.float64)
        within = int((losses(steps) <= limit).sum())  # they ascend
        low, high = (float(steps[min(max(place, 0), _TRIED - 1)]) for place in (within - 1, within))
    return float(2**low)


def unpacked_scale(code: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(code / 32) in ``dtype``."""
    return torch.exp2(code.to(torch.float64) / OCTAVE).to(dtype)


def _rounded(entries: Tensor, step: float, kept: Tensor, dim: int) -> Tensor:
    """Whole numbers of steps, in float64, 0 of what is not ``kept``; ``dim`` runs over the entries of a component.

    ``entries`` are used up.
    """
    largest = torch.linalg.vector_norm(entries, math.inf, dim, keepdim=True)
    return entries.div_(torch.where(kept, largest.div_(MOST).clamp_min_(step), math.inf)).round_()


def _best_scales(gram: Tensor, inner: Tensor, kept: Tensor) -> Tensor:
    """The scales g [m, r] with the least ‖ΔW − Σ g_k û_k v̂_kᵀ‖², in the norm of the products that are given.

    0 for components that are not ``kept``, of which all products are 0.
    """
    # Coarse codes may be those of another component: with a ridge, no matrix is singular. So nothing is checked, for
    # which a device would have to finish first.
    ridge = torch.where(kept, _RIDGE * gram.diagonal(dim1=-2, dim2=-1), 1.0)
    return torch.linalg.solve_ex(gram + torch.diag_embed(ridge), inner.unsqueeze(-1)).result[..., 0]


class Rate:
    """Bits and distortion of a Gaussian entry of some deviation, in steps, as `quantise` rounds it: tables over that.

    Entries of singular vectors are close to Gaussian; codes are taken to be entropy coded.
    """

    _LEAST, _GREATEST, _PER_OCTAVE = -1.0, 5.0, 16

    def __init__(self) -> None:
        count = int((self._GREATEST - self._LEAST) * self._PER_OCTAVE) + 1
        grid = torch.linspace(self._LEAST, self._GREATEST, count, dtype=torch.float64).exp2()
        codes = torch.arange(0, 257, dtype=torch.float64)
        low, high = (codes - 0.5).clamp_min(0) / grid[:, None], (codes + 0.5) / grid[:, None]
        mass = (mass_below(high) - mass_below(low)).clamp_min(0)  # of one sign; of both for code 0
        both = mass * torch.where(codes > 0, 2.0, 1.0)
        both[:, 0] = 2 * (mass_below(high[:, 0]) - 0.5)
        bits = -(both * torch.where(codes > 0, mass, both).clamp_min(1e-300).log2()).sum(1)
        # With the best scale, what is lost is 1 − E[xq]² / E[q²] of the energy of the entries.
        product = 2 * (codes * (density(low) - density(high))).sum(1)  # E[x q] / deviation
        energy = (both * codes.square()).sum(1)
        self._bits, self._left = bits, 1 - product.square() / energy.clamp_min(1e-300)

    def bits(self, deviations: Tensor) -> Tensor:
        """Bits of an entry."""
        return self._at(self._bits, deviations, 1.0)

    def left(self, deviations: Tensor) -> Tensor:
        """The share of the energy of entries that is lost."""
        return self._at(self._left.log2(), deviations, -2.0).exp2()

    def _at(self, table: Tensor, deviations: Tensor, slope: float) -> Tensor:
        """Linear between the entries of a table, and with ``slope`` per octave beyond its end."""
        place = (deviations.clamp_min(1e-30).log2() - self._LEAST) * self._PER_OCTAVE
        beyond = (place - (len(table) - 1)).clamp_min(0)
        place = place.clamp(0, len(table) - 1 - 1e-9)
        below = place.floor().long()
        share = place - below
        return table[below] * (1 - share) + table[below + 1] * share + beyond * slope / self._PER_OCTAVE


@cache
def _rate() -> Rate:
    return Rate()
