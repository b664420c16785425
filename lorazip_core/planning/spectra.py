"""The singular values of a whole collection, and what they say of sizes and errors before anything is encoded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.progress import Progress
from ..base.threads import in_order
from ..bundle.size import bundle_bytes
from ..bundle.tensor_file import DTYPES
from ..maths.factored import TINY, singular_values
from ..reading.scan import Scan
from ..reading.updates import Updates
from ..schemes.scheme import IndividualScheme, Size
from .options import CompressOptions

FIRST_AIM = 0.995
"""Of what is allowed: predictions are right to about 1%."""
_STEPS = (-24.0, 4.0)  # as powers of 2: from nothing lost to nothing kept
_HALVINGS = 20


class _Block(NamedTuple):
    """Updates of one module and one rank."""

    size: Size
    adapters: Tensor
    """[m]: whose they are."""
    s: Tensor
    """[m, r] in float64, descending."""


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

    @classmethod
    def of(cls, updates: Updates, progress: Progress) -> Spectra:
        """Read all updates once, or use what is on the device, and decompose them."""

        def of_module(module: int) -> list[_Block]:
            stack = updates.load(module).exact()
            numbers = torch.tensor(stack.adapters)
            return [
                _Block(Size(*updates.shapes[module]), numbers[positions], singular_values(b, a).cpu())
                for b, a, positions in stack.factors()
            ]

        blocks: list[_Block] = []
        modules = range(len(updates.shapes))
        with (
            progress.stage("planning", len(modules)) as advance,
            closing(in_order(of_module, modules, updates.device)) as results,
        ):
            for found in results:
                blocks += found
                advance(1)
        return cls(blocks, updates.norms.sum(1))

    def outlook(self, scheme: IndividualScheme, step: float | Tensor, itemsize: int) -> Outlook:
        """At a ``step``, or one for each adapter [n], that is a share of the adapter's √Σ‖ΔW‖².

        One for all cuts errors where that costs the mean least.
        """
        bits, lost = torch.zeros_like(self.energies), torch.zeros_like(self.energies)
        every = step * self.energies.sqrt().clamp_min(TINY)
        for block in self.blocks:
            steps = every[block.adapters]
            own_lost, own_bits = scheme.predicted(block.s, block.size, steps[:, None], itemsize)
            bits.index_add_(0, block.adapters, own_bits)
            lost.index_add_(0, block.adapters, own_lost)
        return Outlook(bits / 8, torch.where(self.energies > 0, lost / self.energies.clamp_min(TINY), 0.0))

    def step_for_bytes(self, scheme: IndividualScheme, most: float, itemsize: int) -> float:
        """The finest step at which all tensors together take at most so many bytes, about."""
        return self._bisected(lambda step: float(self.outlook(scheme, step, itemsize).bytes.sum()) > most)

    def step_for_mean(self, scheme: IndividualScheme, most: float, itemsize: int) -> float:
        """The coarsest step at which the mean squared error is at most so much, about."""
        return self._bisected(lambda step: float(self.outlook(scheme, step, itemsize).squared_errors.mean()) <= most)

    def steps_for_each(self, scheme: IndividualScheme, most: float, itemsize: int) -> Tensor:
        """For each adapter the coarsest step [n] at which its squared error is at most so much, about."""
        low, high = (torch.full_like(self.energies, end) for end in _STEPS)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            within = self.outlook(scheme, middle.exp2(), itemsize).squared_errors <= most
            low, high = torch.where(within, middle, low), torch.where(within, high, middle)
        return low.exp2()

    def _bisected(self, too_fine: Callable[[float], bool]) -> float:
        """The step where ``too_fine`` turns from true to false."""
        low, high = _STEPS
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if too_fine(2**middle):
                low = middle
            else:
                high = middle
        return float(2**high)


def planned_step(spectra: Spectra, scheme: IndividualScheme, scanned: Scan, options: CompressOptions) -> float | Tensor:
    """The step that ``options`` ask for, or one for each adapter, as singular values have it."""
    itemsize = DTYPES[options.dtype].itemsize
    most = options.most_bytes(len(scanned.collection.adapters))
    if most is not None:
        rest = bundle_bytes(scanned.collection, None, None, [], options.dtype)
        return spectra.step_for_bytes(scheme, max(FIRST_AIM * most - rest, 1.0), itemsize)
    if options.max_mean_error is not None:
        return spectra.step_for_mean(scheme, FIRST_AIM * options.max_mean_error, itemsize)
    assert options.largest_error is not None
    return spectra.steps_for_each(scheme, options.largest_error, itemsize)
