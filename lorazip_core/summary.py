"""The figures that every report ends with: squared errors over adapters, and bytes before and after."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from msgspec import Struct


class Summary(Struct, frozen=True):
    """Errors over adapters (null where no adapter has one), and bytes of all files of the originals and the bundle."""

    adapters: int
    mean_squared_error: float | None
    p95_squared_error: float | None
    max_squared_error: float | None
    bytes_original: int
    bytes_bundle: int
    saved_ratio: float | None


def summarise(adapters: int, squared_errors: Sequence[float], bytes_original: int, bytes_bundle: int) -> Summary:
    """Mean, 95th percentile (linear interpolation) and maximum; saved ratio = 1 − bytes after / bytes before."""
    mean, p95, worst = (
        (float(numpy.mean(squared_errors)), float(numpy.percentile(squared_errors, 95)), max(squared_errors))
        if squared_errors
        else (None, None, None)
    )
    saved = 1 - bytes_bundle / bytes_original if bytes_original else None
    return Summary(adapters, mean, p95, worst, bytes_original, bytes_bundle, saved)
