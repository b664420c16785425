"""What others do with a collection of adapters, by their published ideas: bytes and squared errors of each setting.

Nothing is written to disk: bytes are what the codes, scales, factors and choices take without any padding or header,
and what any bundle must keep besides (`spectra.besides`). That is less than their own files have. What is searched, is
searched on the collection itself, and rounding is the best of several (`rounding`): all of it in their favour. None of
them sees data here; GPTQ and fine-tuning, which some of them add, need it.

A component s·u·vᵀ is kept as s^½ u and s^½ v, each rounded on its own, so that any choice of levels for the components
of an update has an exact error without another pass: with X_p the exact and rounded components, p = 1 … C, and
G_pq = ⟨X_p, X_q⟩ = (u_p·u_q)(v_p·v_q), the error of Σ_p c_p X_p with c = −1 for the exact ones is cᵀGc.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from rounding import Level
from spectra import Spectra, Stack, besides, stacks
from torch import Tensor

from lorazip_core.adapter.collection import Collection
from lorazip_core.maths.factored import TINY, squared_distance, squared_norm

SIZES = (3, 4, 6, 8, 10, 12, 14, 16, 17, 20, 24, 28, 34, 40, 48, 57, 68, 80, 100, 128)
"""Times smaller that the stored adapters, for what can be had at any size."""

BF16 = 16  # bits
NONE = -1  # a component that is dropped
G128 = tuple(Level(bits, 128) for bits in (1, 2, 3, 4, 8))
G64 = tuple(Level(bits, 64) for bits in (1, 2, 3, 4, 8))
MINMAX = tuple(Level(bits, 128, "minmax") for bits in (2, 3, 8))
SINGLE = (Level(BF16, rule="bf16"), Level(4, 32), Level(4, 32, "absmax"))


class Point(NamedTuple):
    """A setting of a competitor: all its bytes, and squared errors over adapters."""

    competitor: str
    setting: str
    bytes: int
    mean: float
    worst: float


class Rounded:
    """Exact and rounded components of the updates of a stack: ``gram`` [n, C, C], C = (1 + levels) · R."""

    def __init__(self, levels: Sequence[Level], u: Tensor, v: Tensor) -> None:
        sides = (torch.cat([x, *(level.rounded(x) for level in levels)], dim=1).double() for x in (u, v))
        left, right = sides
        self.gram = (left @ left.mT) * (right @ right.mT)
        self.rank = u.shape[1]

    def lost(self, choices: Tensor) -> Tensor:
        """‖ΔW−ΔŴ‖², [T, n], of choices [T, n, R] of a level for each component."""
        signs = _signs(choices, self.gram.shape[-1])
        return torch.einsum("tnp,npq,tnq->tn", signs, self.gram, signs)

    def each_alone(self) -> Tensor:
        """What each component loses on each level if it were the only one, [n, R, levels]."""
        n, r = len(self.gram), self.rank
        square = self.gram.diagonal(dim1=1, dim2=2).view(n, -1, r)
        inner = self.gram[:, :r].view(n, r, -1, r).diagonal(dim1=1, dim2=3)  # [n, 1 + levels, R]
        return (square[:, :1] - 2 * inner[:, 1:] + square[:, 1:]).mT


def _signs(choices: Tensor, length: int) -> Tensor:
    rank = choices.shape[-1]
    signs = torch.zeros(*choices.shape[:-1], length, dtype=torch.float64)
    signs[..., :rank] = -1
    place = (choices.clamp_min(0) + 1) * rank + torch.arange(rank)
    return signs.scatter_add(-1, place, (choices >= 0).double())


class Work:
    """A stack, its components, and what of them is rounded once for several competitors."""

    def __init__(self, stack: Stack, spectra: Spectra) -> None:
        self.stack = stack
        self.s, self.u, self.v = stack.components()
        spectra.add(stack, self.s)
        self._rounded: dict[tuple[Level, ...], Rounded] = {}

    def rounded(self, levels: tuple[Level, ...]) -> Rounded:
        if levels not in self._rounded:
            self._rounded[levels] = Rounded(levels, self.u, self.v)
        return self._rounded[levels]

    def sizes(self, levels: Sequence[Level]) -> Tensor:
        """Bits of a component on each level."""
        return torch.tensor([sum(map(level.size, self.stack.sides)) for level in levels])

    @property
    def own(self) -> Tensor:
        """Which components an adapter has by its own rank, [n, R]."""
        return torch.arange(self.s.shape[1]) < self.stack.ranks[:, None]

    def covering(self, share: float) -> Tensor:
        """The least number of components, [n], that have this share of the energy of an update."""
        energy = self.s.double().square().cumsum(1)
        return torch.minimum((energy < share * energy[:, -1:]).sum(1) + 1, self.stack.ranks)


class Competitor(Protocol):
    def add(self, work: Work) -> None:
        """Take in the updates of one module."""

    def points(self, energies: Tensor, fixed: int) -> list[Point]:
        """Of all that was taken in; ``energies`` are ‖ΔW‖² of the adapters, ``fixed`` the bytes that all need."""


@dataclass
class Tally:
    """Settings of a competitor: what each adapter loses, [T, adapters], and bits, [T]."""

    competitor: str
    settings: Sequence[str]
    lost: Tensor
    bits: Tensor

    @classmethod
    def of(cls, competitor: str, settings: Sequence[str], adapters: int) -> Tally:
        lost = torch.zeros(len(settings), adapters, dtype=torch.float64)
        return cls(competitor, settings, lost, torch.zeros(len(settings), dtype=torch.int64))

    def add(self, work: Work, lost: Tensor, bits: Tensor) -> None:
        self.lost.index_add_(1, work.stack.adapters, lost.double())
        self.bits += bits

    def add_choices(self, work: Work, levels: tuple[Level, ...], choices: Tensor, choosing: int) -> None:
        """Choices [T, n, R] of levels; ``choosing`` are the bits an update takes to say which."""
        sizes = torch.cat([torch.zeros(1, dtype=torch.int64), work.sizes(levels)])
        choices = choices.where(work.own, NONE)
        bits = sizes[choices + 1].sum((1, 2)) + choosing * choices.shape[1]
        self.add(work, work.rounded(levels).lost(choices), bits)

    def points(self, energies: Tensor, fixed: int) -> list[Point]:
        errors = self.lost.clamp_min(0) / energies.clamp_min(TINY)
        return [
            Point(self.competitor, setting, math.ceil(int(bits) / 8) + fixed, float(error.mean()), float(error.max()))
            for setting, bits, error in zip(self.settings, self.bits, errors, strict=True)
        ]


class PeftEnergy:
    """PEFT's conversion by a share of energy: in every module the least rank that has it, in bf16."""

    SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)

    def __init__(self, adapters: int) -> None:
        self.tally = Tally.of("PEFT, by energy", [f"{share:g}" for share in self.SHARES], adapters)

    def add(self, work: Work) -> None:
        numbers = torch.arange(work.s.shape[1])
        kept = torch.stack([numbers < work.covering(share)[:, None] for share in self.SHARES])
        self.tally.add_choices(work, SINGLE, torch.where(kept, 0, NONE), _bits_for(work.s.shape[1]))

    def points(self, energies: Tensor, fixed: int) -> list[Point]:
        return self.tally.points(energies, fixed)


class LoraQuant:
    """LoRAQuant (arXiv 2510.26690): components that cover a share of energy in 2 or 3 bits, all others in one."""

    SETTINGS = tuple(itertools.product((2, 3), (0.5, 0.7, 0.8, 0.9, 0.95)))

    def __init__(self, adapters: int) -> None:
        self.tally = Tally.of("LoRAQuant", [f"{bits} bits @ {share:g}" for bits, share in self.SETTINGS], adapters)

    def add(self, work: Work) -> None:
        numbers = torch.arange(work.s.shape[1])
        level = {each.bits: i for i, each in enumerate(G128)}
        choices = [
            torch.where(numbers < work.covering(share)[:, None], level[bits], level[1]) for bits, share in self.SETTINGS
        ]
        self.tally.add_choices(work, G128, torch.stack(choices), _bits_for(work.s.shape[1]))

    def points(self, energies: Tensor, fixed: int) -> list[Point]:
        return self.tally.points(energies, fixed)


class PrinMix:
    """PrinMix (arXiv 2506.11087), without data: each matrix has the same budget, its components the best levels for it.

    The integer programme is solved by a price per bit, and what is left of the budget then spent greedily.
    """

    HALVINGS = 30

    def __init__(self, adapters: int) -> None:
        self.tally = Tally.of("PrinMix", [f"{size}× each matrix" for size in SIZES], adapters)

    def add(self, work: Work) -> None:
        rank = work.s.shape[1]
        choosing = math.ceil(rank * math.log2(1 + len(G128)))
        stored = BF16 * work.stack.parameters
        budget = torch.stack([stored // size - choosing for size in SIZES])
        choices = self._allocated(work, budget)
        self.tally.add_choices(work, G128, choices, choosing)

    def _allocated(self, work: Work, budget: Tensor) -> Tensor:
        """Levels [T, n, R] that lose least within ``budget`` [T, n]."""
        sizes = torch.cat([torch.zeros(1), work.sizes(G128)]).double()  # [1 + levels], the first: dropped
        lost = torch.cat([work.s.double().square()[..., None], work.rounded(G128).each_alone()], dim=2)
        scale = lost[..., 0].sum(1)[None, :].clamp_min(TINY)
        low, high = torch.full(budget.shape, -60.0, dtype=torch.float64), torch.zeros(budget.shape, dtype=torch.float64)

        def at(price: Tensor) -> Tensor:
            return (lost + (scale * price.exp2())[..., None, None] * sizes).argmin(-1)

        for _ in range(self.HALVINGS):
            middle = (low + high) / 2
            fits = sizes[at(middle)].sum(-1) <= budget
            low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
        chosen = at(high)
        for _ in range(2 * work.s.shape[1]):
            left = budget - sizes[chosen].sum(-1)
            dearer = sizes - sizes[chosen][..., None]
            gain = torch.gather(lost.expand(*chosen.shape, -1), -1, chosen[..., None]) - lost
            good = (dearer > 0) & (dearer <= left[..., None, None]) & (gain > 0)
            ratio = torch.where(good, gain / dearer.clamp_min(1), 0.0).flatten(-2)
            best, where = ratio.max(-1)
            if not (best > 0).any():
                break
            component, level = where // len(sizes), where % len(sizes)
            old = chosen.gather(-1, component[..., None])
            chosen = chosen.scatter(-1, component[..., None], torch.where(best > 0, level, old[..., 0])[..., None])
        return torch.where(sizes[chosen].sum(-1, keepdim=True) <= budget[..., None], chosen, 0) - 1

    def points(self, energies: Tensor, fixed: int) -> list[Point]:
        return self.tally.points(energies, fixed)


class SameEverywhere:
    """The k-th component has the same level in all updates: SVD in one format, and Delta-CoMe (arXiv 2406.08903).

    Grams of an adapter are summed over its modules first, so that thousands of settings take no time.
    """

    MOST = 24  # ranges are tried to a component up to this rank, more coarsely above

    def __init__(self, adapters: int, rank: int) -> None:
        self.rank = rank
        self.families = {"single": SINGLE, "g128": G128, "g64": G64, "min-max, g128": MINMAX}
        self.grams = {
            name: torch.zeros(adapters, *2 * ((1 + len(levels)) * rank,), dtype=torch.float64)
            for name, levels in self.families.items()
        }
        self.sizes = {name: torch.zeros(len(levels), rank, dtype=torch.int64) for name, levels in self.families.items()}

    def add(self, work: Work) -> None:
        for name, levels in self.families.items():
            self.grams[name].index_add_(0, work.stack.adapters, work.rounded(levels).gram)
            self.sizes[name] += work.sizes(levels)[:, None] * work.own.sum(0)

    def points(self, energies: Tensor, fixed: int) -> list[Point]:
        found = []
        numbers = torch.arange(self.rank)
        for level, competitor in enumerate(("SVD, bf16", "SVD, int4", "SVD, int4 by absmax")):
            choices = torch.where(numbers < numbers[:, None] + 1, level, NONE)
            settings = [f"rank {k}" for k in range(1, self.rank + 1)]
            found += self._points(competitor, settings, "single", choices, energies, fixed)
        ranges = torch.tensor(list(self._ranges(4)))
        found += self._delta_come("Delta-CoMe", ranges, ("g128", "g64"), energies, fixed)
        ranges = torch.tensor(list(self._ranges(3)))
        return found + self._delta_come("Delta-CoMe by min-max", ranges, ("min-max, g128",), energies, fixed)

    def _points(
        self, competitor: str, settings: Sequence[str], family: str, choices: Tensor, energies: Tensor, fixed: int
    ) -> list[Point]:
        """Of choices [T, R]."""
        signs = _signs(choices, self.grams[family].shape[-1])
        lost = torch.einsum("tp,npq,tq->tn", signs, self.grams[family], signs)
        return Tally(competitor, settings, lost, self._bits(family, choices)).points(energies, fixed)

    def _bits(self, family: str, choices: Tensor) -> Tensor:
        sizes = torch.cat([torch.zeros(1, self.rank, dtype=torch.int64), self.sizes[family]])
        return sizes.gather(0, choices + 1).sum(1)

    def _delta_come(
        self, competitor: str, ranges: Tensor, families: Sequence[str], energies: Tensor, fixed: int
    ) -> list[Point]:
        """For each size the best of ``ranges`` [T, R], which number levels from the coarsest in use."""
        stored = int(self.sizes["single"][0].sum())  # bits in bf16
        candidates = []
        for family in families:
            choices = torch.where(ranges >= 0, ranges + (self.families[family][0].bits == 1), NONE)
            gram = (self.grams[family] / energies.clamp_min(TINY)[:, None, None]).mean(0)
            signs = _signs(choices, gram.shape[-1])
            candidates.append((family, choices, ((signs @ gram) * signs).sum(1), self._bits(family, choices)))
        found: dict[str, Point] = {}
        for size in SIZES:
            fitting = [means.where(bits <= stored / size, torch.inf).min(0) for _, _, means, bits in candidates]
            which = min(range(len(fitting)), key=lambda i: float(fitting[i].values))
            if math.isinf(float(fitting[which].values)):
                continue
            family, choices = candidates[which][:2]
            choice = choices[fitting[which].indices]
            counts = [(choice.eq(i).sum().item(), level.bits) for i, level in enumerate(self.families[family])]
            setting = " + ".join(f"{count}×{bits}" for count, bits in reversed(counts) if count) + f" bits, {family}"
            found[setting] = self._points(competitor, [setting], family, choice[None], energies, fixed)[0]
        return list(found.values())

    def _ranges(self, levels: int) -> Iterator[list[int]]:
        """Numbers of ``levels`` levels for each component, falling, NONE at the end."""
        stride = -(-self.rank // self.MOST)
        counts = [*range(0, self.rank, stride), self.rank]
        for each in itertools.product(counts, repeat=levels):
            if 0 < sum(each) <= self.rank:
                falling = [
                    level for level, count in zip(reversed(range(levels)), each, strict=True) for _ in range(count)
                ]
                yield falling + [NONE] * (self.rank - len(falling))


class AsTheyAre:
    """B and A rounded as they are stored, row by row, in groups of 32."""

    LEVELS = tuple(Level(bits, 32) for bits in (1, 2, 3, 4, 8))

    def __init__(self, adapters: int) -> None:
        self.tally = Tally.of("B and A, groups of 32", [f"{level.bits} bits" for level in self.LEVELS], adapters)

    def add(self, work: Work) -> None:
        b, a, _, ranks = work.stack
        lost = torch.zeros(len(self.LEVELS), len(ranks), dtype=torch.float64)
        bits = torch.zeros(len(self.LEVELS), dtype=torch.int64)
        for rank in sorted(set(ranks.tolist())):  # groups run over the end of a row, so padding would change them
            rows = ranks == rank
            exact = b[rows, :, :rank], a[rows, :rank]
            for i, level in enumerate(self.LEVELS):
                factors = [level.rounded(x.flatten(1)).view_as(x) for x in exact]
                lost[i, rows] = squared_distance(exact, (factors[0], factors[1]))
                bits[i] += sum(level.size(x[0].numel()) for x in exact) * int(rows.sum())
        self.tally.add(work, lost, bits)

    def points(self, energies: Tensor, fixed: int) -> list[Point]:
        return self.tally.points(energies, fixed)


class SharedDirections:
    """What lorashare does: the k leading directions of all rows of A, and of all columns of B, and loadings; in bf16.

    Unrounded here, which bf16 does not show at such errors.
    """

    WIDTHS = (1, 2, 4, 8, 16, 32, 64)

    def __init__(self, adapters: int) -> None:
        self.tally = Tally.of("shared PCA (lorashare)", [f"k = {k}" for k in self.WIDTHS], adapters)

    def add(self, work: Work) -> None:
        b, a, _, ranks = work.stack
        left, right = (_leading(x, max(self.WIDTHS)) for x in (b.mT.flatten(0, 1), a.flatten(0, 1)))
        inner_b, inner_a = left.mT @ b.double(), a.double() @ right
        norm = squared_norm(b, a)
        lost, bits = [], []
        for k in self.WIDTHS:
            lost.append(norm - squared_norm(inner_b[:, :k], inner_a[:, :, :k]))
            columns = min(k, left.shape[1]), min(k, right.shape[1])
            sides = sum(d * width for d, width in zip(work.stack.sides, columns, strict=True))
            bits.append(BF16 * (sides + int(ranks.sum()) * sum(columns)))
        self.tally.add(work, torch.stack(lost), torch.tensor(bits))

    def points(self, energies: Tensor, fixed: int) -> list[Point]:
        return self.tally.points(energies, fixed)


def _leading(rows: Tensor, count: int) -> Tensor:
    """The leading right singular vectors of ``rows`` [m, d] as columns, in float64."""
    rows = rows.double()
    if len(rows) < rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        scaled = rows.mT @ vectors / values.clamp_min(TINY).sqrt()
        found: Tensor = torch.linalg.qr(scaled.flip(1)[:, :count]).Q
    else:
        found = torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(1)[:, :count]
    return found


class SharedTasks:
    """What vlora does: a mean and k leading directions of whole flattened A, and of whole B, and loadings; in bf16."""

    WIDTHS = (1, 2, 4, 8, 16)

    def __init__(self, adapters: int) -> None:
        self.widths = [k for k in self.WIDTHS if k < adapters]
        self.tally = Tally.of("shared tasks (vlora)", [f"k = {k}" for k in self.widths], adapters)

    def add(self, work: Work) -> None:
        exact = work.stack.b.double(), work.stack.a.double()
        n, size = len(exact[0]), max(work.stack.ranks.tolist()) * sum(work.stack.sides)
        means = [x.flatten(1).mean(0, keepdim=True) for x in exact]
        vectors = [self._vectors(x.flatten(1) - mean) for x, mean in zip(exact, means, strict=True)]
        lost, bits = [], []
        for k in self.widths:
            near = [
                (mean + u[:, :k] @ (u[:, :k].mT @ (x.flatten(1) - mean))).view_as(x)
                for x, mean, u in zip(exact, means, vectors, strict=True)
            ]
            lost.append(squared_distance(exact, (near[0], near[1])))
            bits.append(BF16 * ((min(k, n) + 1) * size + 2 * n * min(k, n)))
        self.tally.add(work, torch.stack(lost), torch.tensor(bits))

    @staticmethod
    def _vectors(x: Tensor) -> Tensor:
        vectors: Tensor = torch.linalg.eigh(x @ x.mT).eigenvectors
        return vectors.flip(1)

    def points(self, energies: Tensor, fixed: int) -> list[Point]:
        return self.tally.points(energies, fixed)


def _bits_for(rank: int) -> int:
    """Bits that say which of 0 … rank."""
    return math.ceil(math.log2(rank + 1))


class Measured(NamedTuple):
    """Bytes of the factors in bf16 at their own ranks, those that any bundle needs besides, spectra, and all points."""

    stored: int
    fixed: int
    spectra: Spectra
    points: list[Point]


def measure(collection: Collection, *, competing: bool = True) -> Measured:
    """Every competitor, in one pass over the modules; without them only the spectra."""
    count = len(collection.adapters)
    fixed = besides(collection)
    rank = max(part.rank for adapter in collection.adapters for part in adapter.parts.values())
    every: list[Competitor] = []
    if competing:
        every = [SameEverywhere(count, rank)]
        every += [kind(count) for kind in (PrinMix, LoraQuant, PeftEnergy, AsTheyAre, SharedDirections, SharedTasks)]
    spectra = Spectra(count)
    for stack in stacks(collection):
        work = Work(stack, spectra)
        for one in every:
            one.add(work)
    energies = spectra.energies
    points = [point for one in every for point in one.points(energies, fixed)]
    return Measured(BF16 // 8 * int(spectra.parameters.sum()), fixed, spectra, points)
