"""What a bundle loses, or weighs, that people should hear of though it is sound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from ..base.text import count, error, megabytes
from ..schemes.registry import SCHEMES
from .summary import Summary

LARGE_ERROR = 0.1
"""Up to this squared error the tasks that were measured lose nothing, as docs/method.md has it; above, some do."""


class QualityWarning(Struct, frozen=True):
    """Something about a sound bundle that is hardly what its user wants."""

    kind: Literal["large-errors", "larger-than-originals"]
    message: str
    hint: str


def above(squared_errors: Sequence[float]) -> int:
    """How many squared errors are above `LARGE_ERROR`."""
    return sum(each > LARGE_ERROR for each in squared_errors)


def quality_warnings(
    squared_errors: Sequence[float], summary: Summary, *, method: str, max_error: float | None, calibrated: bool = False
) -> list[QualityWarning]:
    """What to warn of. Whoever has set a limit ``max_error`` knows what he may lose, and hears nothing of it.

    If ``calibrated``, the errors of weights are as large as they are because those of outputs are small.
    """
    warnings = []
    large = above(squared_errors)
    has_rank = method not in SCHEMES or SCHEMES[method].default_rank is not None
    alone = method in SCHEMES and not SCHEMES[method].shared  # else it may be a method of a later version
    if large and max_error is None and not calibrated:
        more = "a higher «rank»" if has_rank else "a larger «budget»"
        hint = more if alone else f"{more}, more «clusters» or «method» coded"
        warnings.append(
            QualityWarning(
                "large-errors",
                f"{large:,} of {count(len(squared_errors), 'adapter')} lose more than {LARGE_ERROR} of their update"
                f" (squared error, worst {error(max(squared_errors))}), which tasks may show",
                f"compress with «max_error» {LARGE_ERROR}, {hint}",
            )
        )
    if summary.bytes_bundle > summary.bytes_original:
        warnings.append(
            QualityWarning(
                "larger-than-originals",
                f"the bundle is larger than the adapters that it was made from: {megabytes(summary.bytes_bundle)},"
                f" which were {megabytes(summary.bytes_original)}",
                "compress with "
                + (f"a lower «rank»{'' if alone else ', or «method» coded'}" if has_rank else "a «budget»")
                + ("" if max_error is None else ", or a larger «max_error»"),
            )
        )
    return warnings
