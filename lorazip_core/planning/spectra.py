"""The singular values of a whole collection, and what they say of sizes and errors before anything is encoded."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter.collection import Collection
from ..base.device import load_linear_algebra
from ..base.progress import Progress
from ..base.stopping import check_stop
from ..base.threads import in_order
from ..bundle.size import bytes_besides_updates
from ..maths.factored import TINY, singular_values
from ..maths.quantise import Components
from ..reading.groups import by_layout
from ..reading.module_groups import InputsOf, ModuleGroups
from ..reading.scan import Scan
from ..schemes.factors import START_BYTES
from ..schemes.scheme import Counting, ModuleGroup, Size, SteppedScheme
from .options import CompressOptions

FIRST_AIM = 0.995
"""Of what is allowed: predictions are right to about 1%."""
FINEST, COARSEST = 2.0**-24, 2.0**4
"""Steps: finer ones lose no less, and of coarser ones no less is kept."""
_HALVINGS = 20


class _Block(NamedTuple):
    """Updates of one size and rank."""

    size: Size
    adapters: Tensor
    """[m]: whose they are."""
    s: Tensor
    """[m, r] in float64: singular values, descending; if inputs are known, `Components.strengths`."""
    energies: Tensor
    """[m, r] in float64: of the components."""


class Outlook(NamedTuple):
    """What every adapter would take and lose."""

    bytes: Tensor
    """[n]: of its tensors."""
    squared_errors: Tensor
    """[n]"""


@dataclass(frozen=True)
class Spectra:
    """The singular values of all updates."""

    blocks: list[_Block]
    energies: Tensor
    """[n]: Σ‖ΔW‖² of every adapter."""
    inputs_of: InputsOf | None = None
    """If inputs are known, energies are those of updates weighted by them, and so are the errors that are predicted."""

    @classmethod
    def of(cls, scanned: Scan, device: torch.device, progress: Progress, inputs_of: InputsOf | None = None) -> Spectra:
        """Those of a scan, if it was asked for them. For known inputs, all adapters are read once more."""
        if inputs_of is not None or scanned.singular is None:
            return cls._read_again(scanned, device, progress, inputs_of)
        found: defaultdict[tuple[Size, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for group in by_layout(scanned.collection.adapters, scanned.collection.modules):
            singular = torch.stack([scanned.singular[number] for number in group.adapters.tolist()])
            same: defaultdict[tuple[Size, int], list[Tensor]] = defaultdict(list)
            for part, s in zip(
                group.parts, singular.split_with_sizes([part.rank for part in group.parts], 1), strict=True
            ):
                same[Size(part.module.d_out, part.module.d_in), part.rank].append(s)
            for kind, own in same.items():
                numbers = torch.from_numpy(group.adapters).repeat_interleave(len(own))
                found[kind].append((numbers, torch.stack(own, 1).flatten(0, 1)))
        blocks = []
        for (size, _), several in found.items():
            numbers, s = (torch.cat(each) for each in zip(*several, strict=True))
            blocks.append(_Block(size, numbers, s, s.square()))
        return cls(blocks, scanned.norms.sum(1))

    @classmethod
    def _read_again(
        cls, scanned: Scan, device: torch.device, progress: Progress, inputs_of: InputsOf | None
    ) -> Spectra:
        """Each adapter by itself, so that memory does not grow with the collection."""
        adapters = scanned.collection.adapters
        load_linear_algebra(device)
        groups_of = ModuleGroups(scanned, device, inputs_of)

        def of_adapter(number: int) -> list[tuple[Size, Tensor, Tensor]]:
            check_stop()
            found = []
            for group in groups_of.of(number):
                s, energies = _spectrum(group)
                found.append((Size(group.b.shape[1], group.a.shape[2]), s.cpu(), energies.cpu()))
            return found

        found: defaultdict[tuple[Size, int], list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        with (
            progress.stage("planning", len(adapters)) as advance,
            closing(in_order(of_adapter, range(len(adapters)), device)) as results,
        ):
            for number, groups in enumerate(results):
                for size, s, energies in groups:
                    found[size, s.shape[1]].append((number, s, energies))
                advance(1)
        scanned.check_unchanged()
        blocks = []
        for (size, _), owned in found.items():
            numbers = torch.tensor([number for number, s, _ in owned for _ in s])
            blocks.append(_Block(size, numbers, *(torch.cat(each) for each in list(zip(*owned, strict=True))[1:])))
        every = scanned.norms.sum(1)
        if inputs_of is not None:
            every = torch.zeros_like(every)
            for block in blocks:
                every.index_add_(0, block.adapters, block.energies.sum(-1))
        return cls(blocks, every, inputs_of)

    def outlook(self, scheme: SteppedScheme, step: float | Tensor, counting: Counting) -> Outlook:
        """At a ``step``, or one for each adapter [n], that is a share of the adapter's √Σ‖ΔW‖².

        One for all cuts errors where that costs the mean least.
        """
        bits, lost = torch.zeros_like(self.energies), torch.zeros_like(self.energies)
        every = step * self.energies.sqrt().clamp_min(TINY)
        for block in self.blocks:
            steps = every[block.adapters]
            left, own_bits = scheme.predicted(block.s, block.size, steps[:, None], counting)
            if self.inputs_of is not None:  # what rounding costs is, of û as of v̂, as if v were of length 1
                own_left, _ = scheme.predicted(block.energies.sqrt(), block.size, steps[:, None], counting)
                left = torch.where(left < 1, own_left, left)
            bits.index_add_(0, block.adapters, own_bits)
            lost.index_add_(0, block.adapters, (block.energies * left).sum(-1))
        return Outlook(bits / 8, torch.where(self.energies > 0, lost / self.energies.clamp_min(TINY), 0.0))

    def step_for_bytes(self, scheme: SteppedScheme, most: float, counting: Counting) -> float:
        """The finest step at which all tensors together take at most so many bytes, about."""
        return _turn(lambda step: float(self.outlook(scheme, step, counting).bytes.sum()) > most)[1]

    def step_for_mean(self, scheme: SteppedScheme, most: float, counting: Counting) -> float:
        """The coarsest step at which the mean squared error is at most so much, about."""
        return _turn(lambda step: float(self.outlook(scheme, step, counting).squared_errors.mean()) <= most)[0]

    def steps_for_each(self, scheme: SteppedScheme, most: float, counting: Counting) -> Tensor:
        """For each adapter the coarsest step [n] at which its squared error is at most so much, about."""
        low, high = (torch.full_like(self.energies, math.log2(end)) for end in (FINEST, COARSEST))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            within = self.outlook(scheme, middle.exp2(), counting).squared_errors <= most
            low, high = torch.where(within, middle, low), torch.where(within, high, middle)
        return low.exp2()


def _spectrum(group: ModuleGroup) -> tuple[Tensor, Tensor]:
    """What decides on the bits of all components [m, r], and their energies [m, r]."""
    if group.inputs is None:
        s = singular_values(*group.exact)
        return s, s.square()
    components = Components.of(group.exact, group.inputs)
    return components.spectrum.strengths, components.spectrum.s.square()


def _turn(holds: Callable[[float], bool]) -> tuple[float, float]:
    """The coarsest step for which ``holds`` is true, as it is for all finer ones, and the finest where it is not."""
    low, high = math.log2(FINEST), math.log2(COARSEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if holds(2**middle):
            low = middle
        else:
            high = middle
    return float(2**low), float(2**high)


def bytes_besides(collection: Collection, scheme: SteppedScheme, counting: Counting) -> int:
    """About what is counted besides what is predicted: on a device, where every adapter of a module begins."""
    if counting.objective == "resident":
        return START_BYTES * sum(len(adapter.parts) for adapter in collection.adapters)
    return bytes_besides_updates(collection, scheme)


def planned_step(spectra: Spectra, scanned: Scan, options: CompressOptions) -> float | Tensor:
    """The step that ``options`` ask for, or one for each adapter, as singular values have it."""
    scheme, counting = options.scheme, options.counting
    assert isinstance(scheme, SteppedScheme)
    most = options.most_bytes(len(scanned.collection.adapters))
    if most is not None:
        rest = bytes_besides(scanned.collection, scheme, counting)
        return spectra.step_for_bytes(scheme, max(FIRST_AIM * most - rest, 1.0), counting)
    if options.max_mean_error is not None:
        return spectra.step_for_mean(scheme, FIRST_AIM * options.max_mean_error, counting)
    assert options.largest_error is not None
    return spectra.steps_for_each(scheme, options.largest_error, counting)
