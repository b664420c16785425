"""What a compression is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from msgspec import Struct

from ..base.errors import UsageError
from ..bundle.manifest import Dtype, Method, Weights
from ..clustering.clusters_file import check_clusters
from ..schemes.registry import AUTO, SCHEMES, default_method, methods, stepped_schemes
from ..schemes.scheme import Counting, Objective, Scheme, SteppedScheme, itemsize


class CompressOptions(Struct, frozen=True):
    """What to do. ``rank`` None means the method's default; ``clusters`` is a number, or the file of an assignment.

    ``budget`` and ``budget_per_adapter``, on average, are the most bytes that the bundle may take, or, with the
    ``objective`` "resident", what a device holds of it; ``max_error`` and ``max_mean_error`` the largest squared error
    of an adapter and the largest mean. ``calibration`` is a file of moments of inputs, for which outputs count instead
    of weights. ``memory`` and ``device_memory`` are `Bounds`, in bytes.
    """

    method: Method | Literal["auto"] = AUTO
    rank: int | None = None
    clusters: int | Literal["auto"] | Path = 1
    dtype: Dtype = "bf16"
    seed: int = 0
    weights: Weights = "adapter"
    max_error: float | None = None
    max_mean_error: float | None = None
    budget: int | None = None
    budget_per_adapter: int | None = None
    objective: Objective = "disk"
    calibration: Path | None = None
    device: str = "auto"
    memory: int | None = None
    device_memory: int | None = None

    @property
    def chosen(self) -> Method:
        """The method, also where none is named."""
        if self.method != AUTO:
            return self.method
        return default_method(shares=self.rank is not None or self.clusters != 1)

    @property
    def scheme(self) -> Scheme:
        """The scheme that the method is."""
        return SCHEMES[self.chosen]

    @property
    def planned(self) -> bool:
        """Whether it has to be found out how much to keep, for all adapters together."""
        return not (self.max_mean_error is None and self.budget is None and self.budget_per_adapter is None)

    @property
    def by_spectrum(self) -> bool:
        """Whether singular values say how much is kept, and so what that takes and loses."""
        return isinstance(self.scheme, SteppedScheme) and self.kept_rank is None

    def reads_spectra(self, *, predict: bool) -> bool:
        """Whether singular values are wanted when the weights are read, also to ``predict`` what comes out.

        Where inputs are known, others are: those of updates weighted by them.
        """
        return (predict or self.planned) and self.by_spectrum and self.calibration is None

    @property
    def largest_error(self) -> float | None:
        """The most that any adapter may lose, if that is what decides: asked for, or the default of the scheme."""
        if self.planned or self.kept_rank is not None:
            return None
        return self.scheme.default_error if self.max_error is None else self.max_error

    @property
    def counting(self) -> Counting:
        """The bytes that are to be few."""
        return Counting(itemsize(self.dtype.upper()), self.objective)

    def most_bytes(self, adapters: int) -> int | None:
        """The most bytes that the bundle may take, or what a device holds of it."""
        return self.budget if self.budget_per_adapter is None else self.budget_per_adapter * adapters

    @property
    def kept_rank(self) -> int | None:
        """The rank asked for or the scheme's default; None if it has none, or only ``max_error`` to meet."""
        if self.rank is None and not self.scheme.shared and (self.max_error is not None or self.planned):
            return None
        return self.rank if self.rank is not None else self.scheme.default_rank

    def check(self, adapters: int | None = None) -> None:
        """Raise UsageError for options that make no sense, alone or for this many adapters."""
        if self.method not in [AUTO, *methods()]:
            raise UsageError(f"«method» {self.method}: choose one of {', '.join([AUTO, *methods()])}")
        if self.rank is not None and self.scheme.default_rank is None:
            raise UsageError(f"«rank» {self.rank}: {self.chosen} has no rank", "say how much may be lost: «max_error»")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"«rank» {self.rank}: must be at least 1")
        if self.max_error is not None and not 0 <= self.max_error <= 1:
            raise UsageError(f"«max_error» {self.max_error}: a squared error is between 0 and 1")
        self._check_plan()
        if self.objective not in get_args(Objective):
            raise UsageError(f"«objective» {self.objective}: choose one of {', '.join(get_args(Objective))}")
        if self.objective != "disk" and not self.by_spectrum:
            kept = self.chosen if self.kept_rank is None else f"{self.chosen} of rank {self.kept_rank}"
            hint = f"use «method» {self._able}, and say what may be lost or taken instead of a rank"
            raise UsageError(f"«objective» {self.objective}: {kept} takes the same either way", hint)
        if self.dtype not in get_args(Dtype):
            raise UsageError(f"«dtype» {self.dtype}: choose one of {', '.join(get_args(Dtype))}")
        if not self.scheme.shared and self.clusters != 1:
            shared = " or ".join(name for name in methods() if SCHEMES[name].shared)
            raise UsageError(f"«clusters»: {self.chosen} keeps every adapter on its own", f"use «method» {shared}")
        check_clusters(self.clusters, adapters)
        if self.calibration is not None:
            self._check_calibration(self.calibration)

    @property
    def _able(self) -> str:
        """The methods of which it can be said how much they keep, and which do what else is asked for."""
        able = (scheme for scheme in stepped_schemes() if scheme.uses_inputs or self.calibration is None)
        return " or ".join(scheme.name for scheme in able)

    def _check_calibration(self, path: Path) -> None:
        if not (isinstance(self.scheme, SteppedScheme) and self.scheme.uses_inputs):
            raise UsageError(f"«calibration» {path}: {self.chosen} has no use for it", f"use «method» {self._able}")
        if self.budget is None and self.budget_per_adapter is None:
            raise UsageError(
                f"«calibration» {path}: limits are on the error of weights, which it gives up for that of outputs",
                "say how many bytes: «budget» or «budget_per_adapter»",
            )

    def _check_plan(self) -> None:
        bounds = {
            "«max_error»": self.max_error,
            "«max_mean_error»": self.max_mean_error,
            "«budget»": self.budget,
            "«budget_per_adapter»": self.budget_per_adapter,
            "«rank»": self.rank,
        }
        given = {name: value for name, value in bounds.items() if value is not None}
        if not self.planned:
            return
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other", "say one of them")
        [(name, value)] = given.items()
        if name == "«max_mean_error»" and not 0 < value <= 1:
            raise UsageError(f"{name} {value}: it has to be above 0, and at most 1")
        if name != "«max_mean_error»" and value < 1:
            raise UsageError(f"{name} {value}: must be at least 1 byte")
        if not self.by_spectrum:
            reason = f"{name}: how much {self.chosen} has to keep for it is not known"
            raise UsageError(reason, f"use «method» {self._able}")
