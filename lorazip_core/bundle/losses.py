"""What an adapter loses, module by module, and the errors that manifests and reports tell."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .manifest import ModuleError
from .summary import squared_error


class Losses:
    """‖ΔW‖² and ‖ΔW−ΔŴ‖² of each of the ``modules`` of an adapter, NaN until they are put in, and its errors."""

    def __init__(self, modules: Iterable[str]) -> None:
        self.norms = dict.fromkeys(modules, math.nan)
        self.distances = self.norms.copy()
        self._ratios: dict[str, float] | None = None  # when all modules are put in

    def put(self, module: str, squared_norm: float, squared_distance: float) -> None:
        """‖ΔW‖² and ‖ΔW−ΔŴ‖² of one module."""
        self.norms[module] = squared_norm
        self.distances[module] = squared_distance
        self._ratios = None

    @property
    def ratios(self) -> dict[str, float]:
        """‖ΔW−ΔŴ‖² / ‖ΔW‖² of every module; 0 for a zero module."""
        if self._ratios is None:
            self._ratios = {
                module: max(self.distances[module], 0.0) / norm if norm > 0 else 0.0
                for module, norm in self.norms.items()
            }
        return self._ratios

    @property
    def squared_norm(self) -> float:
        """Σ‖ΔW‖² over modules."""
        return math.fsum(self.norms.values())

    @property
    def squared_distance(self) -> float:
        """Σ‖ΔW−ΔŴ‖² over modules."""
        return math.fsum(self.distances.values())

    @property
    def squared_error(self) -> float:
        """Σ‖ΔW−ΔŴ‖² / Σ‖ΔW‖² over modules; 0 for an adapter whose updates are all zero."""
        return squared_error(self.distances.values(), self.norms.values())

    @property
    def mean_module_squared_error(self) -> float:
        """Mean over modules of ‖ΔW−ΔŴ‖² / ‖ΔW‖²; a zero module counts 0."""
        return math.fsum(self.ratios.values()) / len(self.norms)

    @property
    def worst_module(self) -> ModuleError | None:
        """The module of largest ‖ΔW−ΔŴ‖² / ‖ΔW‖²; None for an adapter whose updates are all zero."""
        if self.squared_norm == 0:
            return None
        worst = max(self.ratios, key=self.ratios.__getitem__)
        return ModuleError(worst, self.ratios[worst])

    def not_finite(self) -> str | None:
        """A module whose update has NaN or Inf, if there is one."""
        return next((module for module, norm in self.norms.items() if not math.isfinite(norm)), None)
