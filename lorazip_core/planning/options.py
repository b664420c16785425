"""What a compression is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from msgspec import Struct

from ..base.errors import UsageError
from ..bundle.manifest import Dtype, Method, Weights
from ..clustering.clusters_file import check_clusters
from ..schemes.registry import DEFAULT, SCHEMES, methods
from ..schemes.scheme import Scheme


class CompressOptions(Struct, frozen=True):
    """What to do. ``rank`` None means the method's default; ``clusters`` is a number, or the file of an assignment.

    ``memory`` and ``device_memory`` are `Bounds`, in bytes.
    """

    method: Method = DEFAULT
    rank: int | None = None
    clusters: int | Literal["auto"] | Path = 1
    dtype: Dtype = "bf16"
    seed: int = 0
    weights: Weights = "adapter"
    max_error: float | None = None
    device: str = "auto"
    memory: int | None = None
    device_memory: int | None = None

    @property
    def scheme(self) -> Scheme:
        """The scheme that ``method`` names."""
        return SCHEMES[self.method]

    @property
    def kept_rank(self) -> int | None:
        """The rank asked for or the scheme's default; None if it has none, or only ``max_error`` to meet."""
        if self.rank is None and not self.scheme.shared and self.max_error is not None:
            return None
        return self.rank if self.rank is not None else self.scheme.default_rank

    def check(self, adapters: int | None = None) -> None:
        """Raise UsageError for options that make no sense, alone or for this many adapters."""
        if self.method not in methods():
            raise UsageError(f"«method» {self.method}: choose one of {', '.join(methods())}")
        if self.rank is not None and self.scheme.default_rank is None:
            raise UsageError(f"«rank» {self.rank}: {self.method} has no rank")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"«rank» {self.rank}: must be at least 1")
        if self.max_error is not None and not 0 <= self.max_error <= 1:
            raise UsageError(f"«max_error» {self.max_error}: a squared error is between 0 and 1")
        if self.dtype not in get_args(Dtype):
            raise UsageError(f"«dtype» {self.dtype}: choose one of {', '.join(get_args(Dtype))}")
        if not self.scheme.shared and self.clusters != 1:
            shared = " or ".join(name for name in methods() if SCHEMES[name].shared)
            raise UsageError(f"«clusters»: {self.method} keeps every adapter on its own", f"use «method» {shared}")
        check_clusters(self.clusters, adapters)
