"""The figures that every report ends with: squared errors over adapters, and bytes before and after."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy
from msgspec import Struct

# What rounding in float64 may add to a squared error. A sum of Gram products is off by some 1e-16 · ‖B‖²‖A‖²/‖B A‖² of
# ‖ΔW‖². That ratio is about the rank; for factors that cancel each other there is room up to 10⁷. Where it would be
# much of a small error, nothing that cancels is used.
_ROUNDING, _ROUNDING_OF_SMALL, _ROUNDING_OF_ZERO = 1e-9, 0.01, 1e-24


class Summary(Struct, frozen=True):
    """Errors over adapters (null where no adapter has one), and bytes of all files of the originals and the bundle."""

    adapters: int
    mean_squared_error: float | None
    p95_squared_error: float | None
    max_squared_error: float | None
    bytes_original: int
    bytes_bundle: int
    saved_ratio: float | None


def squared_error(lost: Iterable[float], norms: Iterable[float]) -> float:
    """Σ ‖ΔW−ΔŴ‖² / Σ ‖ΔW‖² over the modules of an adapter, 0 where all of it is zero; rounding makes none negative.

    fsum rounds once, so that sums depend neither on the order nor on the machine.
    """
    total = math.fsum(norms)
    return max(math.fsum(lost), 0.0) / total if total > 0 else 0.0


def is_within(squared_error: float, max_error: float | None) -> bool:
    """Whether whoever measures the error anew, by another formula and on another machine, finds it within the limit.

    Errors are computed in float64 from unrounded originals, so little is left to rounding. An infinite error, of what
    the dtype cannot hold, is never within.
    """
    if max_error is None:
        return math.isfinite(squared_error)
    rounding = min(_ROUNDING, _ROUNDING_OF_SMALL * squared_error) + _ROUNDING_OF_ZERO
    return squared_error + rounding <= max_error


def is_adapter_within(lost: Iterable[float], norms: Iterable[float], max_error: float | None) -> bool:
    """`is_within` for the ‖ΔW−ΔŴ‖² and ‖ΔW‖² of the modules of an adapter; one that is zero is within any limit."""
    norms = list(norms)
    return not any(norms) or is_within(squared_error(lost, norms), max_error)


def summarise(adapters: int, squared_errors: Sequence[float], bytes_original: int, bytes_bundle: int) -> Summary:
    """Mean, 95th percentile (linear interpolation) and maximum; saved ratio = 1 − bytes after / bytes before."""
    mean, p95, worst = (
        (float(numpy.mean(squared_errors)), float(numpy.percentile(squared_errors, 95)), max(squared_errors))
        if squared_errors
        else (None, None, None)
    )
    saved = 1 - bytes_bundle / bytes_original if bytes_original else None
    return Summary(adapters, mean, p95, worst, bytes_original, bytes_bundle, saved)
