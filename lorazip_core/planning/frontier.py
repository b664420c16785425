"""What the collection would take and lose at several sizes, predicted from the singular values of all updates."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct
from torch import Tensor

from ..base.text import error, megabytes
from ..bundle.manifest import Method
from ..reading.scan import Scan
from ..schemes.registry import AUTO, stepped_schemes
from ..schemes.scheme import SteppedScheme
from .options import CompressOptions
from .spectra import Spectra, bytes_besides

_TIMES = (4, 8, 16, 32, 64, 128)
"""How many times smaller the bundles of a frontier are."""
_NEAR = 1.05
"""Of the size that is wanted. What is larger is there because the method cannot be as small."""


class FrontierPoint(Struct, frozen=True):
    """What the collection would take and lose at one size, predicted from the singular values of all updates."""

    method: Method
    bytes_bundle: int | None
    """Null where the objective is "resident": fewer than those on the device."""
    mean_squared_error: float
    max_squared_error: float
    chosen: bool
    bytes_resident: int | None = None
    """What a device holds; null where the objective is "disk"."""

    @property
    def bytes(self) -> int:
        """Those that the objective is about."""
        return self.bytes_bundle or self.bytes_resident or 0


@dataclass(frozen=True)
class Frontier:
    """The predictions for one collection and what was asked for."""

    points: list[FrontierPoint]
    """The largest bundles first, the chosen one among them."""
    beside: list[FrontierPoint]
    """The other methods at the size of the chosen point; without those that cannot be as small."""

    def comparison(self, options: CompressOptions) -> str | None:
        """What ``auto`` is worth, in a line: its figures beside others of the same size; None for a named method, and
        where outputs are what counts."""
        if options.method != AUTO or options.calibration is not None:
            return None
        [chosen] = [point for point in self.points if point.chosen]
        there = {point.method: point for point in self.beside}
        others = [
            f"{scheme.name} would lose {error(there[scheme.name].mean_squared_error)}"
            if scheme.name in there
            else f"{scheme.name} cannot be as small"
            for scheme in stepped_schemes()
            if scheme.name != chosen.method
        ]
        where = "" if chosen.bytes_resident is None else " on a device"
        return (
            f"in {megabytes(chosen.bytes)}{where}, {chosen.method} is predicted to lose"
            f" {error(chosen.mean_squared_error)} on average; {', '.join(others)}"
        )


def frontier(spectra: Spectra, scanned: Scan, step: float | Tensor, options: CompressOptions) -> Frontier:
    """Every method that can be planned at the sizes of `_TIMES`, and the scheme of ``options`` at ``step``.

    ``step`` is a share of each adapter's √Σ‖ΔW‖², one for all or one for each [n].
    """
    collection, scheme = scanned.collection, options.scheme
    assert isinstance(scheme, SteppedScheme)
    counting = options.counting
    original = sum(adapter.size_bytes for adapter in collection.adapters)

    def point(scheme: SteppedScheme, step: float | Tensor, *, chosen: bool = False) -> FrontierPoint:
        outlook = spectra.outlook(scheme, step, counting)
        errors = outlook.squared_errors
        size = round(bytes_besides(collection, scheme, counting) + float(outlook.bytes.sum()))
        on_disk, on_device = (None, size) if counting.objective == "resident" else (size, None)
        return FrontierPoint(scheme.name, on_disk, float(errors.mean()), float(errors.max()), chosen, on_device)

    def of_size(scheme: SteppedScheme, size: float) -> list[FrontierPoint]:
        """The point at about so many bytes; none if the method cannot be as small."""
        wanted = max(size - bytes_besides(collection, scheme, counting), 1.0)
        found = point(scheme, spectra.step_for_bytes(scheme, wanted, counting))
        return [found] if found.bytes <= _NEAR * size else []

    chosen = point(scheme, step, chosen=True)
    others = [each for each in stepped_schemes() if spectra.inputs_of is None or each.uses_inputs]
    points = [each for other in others for times in _TIMES for each in of_size(other, original / times)]
    return Frontier(
        sorted([chosen, *points], key=lambda each: (-each.bytes, each.method)),
        [each for other in others if other.name != scheme.name for each in of_size(other, chosen.bytes)],
    )
