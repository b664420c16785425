"""Whether a bundle whose adapters have come and gone had better be compressed anew, told from its manifest alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ..base.text import count, error
from .manifest import AdapterEntry, Manifest

_LEAST = 8
"""Added adapters, before anything is said: a basis for fewer is hardly ever worth its bytes."""
_SHARE_ALONE = 0.25
_WORSE = 1.25
"""Times the mean error of the adapters that a basis was fitted to."""


def reasons_to_refit(manifest: Manifest) -> list[str]:
    """Why compressing all adapters again would pay, in words; empty if it would not, or nobody can say.

    It can be said of adapters that share bases: those that were added had none fitted to them.
    """
    if not manifest.clusters:
        return []
    return [*_served_by_no_basis(manifest), *_served_worse(manifest)]


def _served_by_no_basis(manifest: Manifest) -> Iterator[str]:
    added = [adapter for adapter in manifest.adapters if adapter.added]
    alone = [adapter for adapter in added if adapter.cluster is None]
    if len(alone) >= _LEAST and len(alone) >= _SHARE_ALONE * len(added):
        yield (
            f"{len(alone):,} of {count(len(added), 'adapter')} that were added fit none of the shared bases:"
            " bases that are fitted to them, too, may hold them in fewer bytes"
        )


def _served_worse(manifest: Manifest) -> Iterator[str]:
    for number in range(len(manifest.clusters)):
        members = [adapter for adapter in manifest.adapters if adapter.cluster == number]
        added = [adapter for adapter in members if adapter.added]
        fitted = [adapter for adapter in members if not adapter.added]
        if len(added) < _LEAST or not fitted:
            continue
        of_added, of_fitted = _mean(added), _mean(fitted)
        if of_added > _WORSE * of_fitted:
            yield (
                f"the {len(added):,} adapters that were added to cluster {number} lose {error(of_added)} on average,"
                f" those that its basis was fitted to {error(of_fitted)}: a basis that is fitted to all loses less"
            )


def _mean(adapters: Sequence[AdapterEntry]) -> float:
    return math.fsum(adapter.squared_error for adapter in adapters) / len(adapters)
