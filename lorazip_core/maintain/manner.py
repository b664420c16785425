"""How adapters that join a bundle are kept on their own: as those that it was made with."""

from __future__ import annotations

import math

from msgspec import UNSET

from ..base.errors import UsageError
from ..bundle.manifest import Manifest, Parameters
from ..planning.options import CompressOptions
from ..schemes.registry import SCHEMES, default_method


def check_limit(parameters: Parameters, max_error: float | None) -> None:
    """Raise UsageError for a limit on the errors of adapters that join that is none, or breaks the bundle's own."""
    if max_error is None:
        return
    if not 0 <= max_error <= 1:
        raise UsageError(f"«max_error» {max_error}: a squared error is between 0 and 1")
    if parameters.max_error is not None and max_error > parameters.max_error:
        raise UsageError(
            f"«max_error» {max_error}: the bundle was made so that no adapter loses more than {parameters.max_error}",
            "say no more than that, or nothing",
        )


def individual_options(manifest: Manifest, max_error: float | None, device: str) -> CompressOptions:
    """What `compress` would be asked for, for adapters that are as good on their own as those in ``manifest``.

    The method is the bundle's, if that keeps adapters on their own, and else the default one of these. With
    ``max_error`` that is the most that each may lose. Else it is what the bundle promises of every adapter or of their
    mean; or their mean, where a budget decided it; or the default of the method. Errors that are as large as they are
    because those of outputs are small say nothing of others.
    """
    asked = manifest.parameters
    scheme = SCHEMES.get(asked.method)
    own = scheme is not None and not scheme.shared and scheme.is_method
    method = asked.method if own else default_method(shares=False)
    limit = max_error if max_error is not None else asked.max_error
    if limit is None and asked.max_mean_error is not UNSET:
        limit = asked.max_mean_error
    if limit is None and asked.budget is not UNSET and asked.calibration is UNSET:
        limit = _mean_error(manifest, method)
    return CompressOptions(
        method=method,
        rank=asked.rank if own else None,
        dtype=asked.dtype,
        max_error=limit,
        objective="disk" if asked.objective is UNSET else asked.objective,
        device=device,
    )


def _mean_error(manifest: Manifest, method: str) -> float | None:
    """Of those that it was made with and that are kept so; None if there are none."""
    errors = [each.squared_error for each in manifest.adapters if each.scheme == method and not each.added]
    return math.fsum(errors) / len(errors) if errors else None
