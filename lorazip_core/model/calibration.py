"""Moments of inputs for the modules of a collection: checked before the work, and stacked as it wants them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, cached_property, lru_cache
from pathlib import Path

import torch
from torch.nn.functional import pad

from ..adapter.collection import Collection
from ..adapter.module import Module
from ..base.digests import sha256_file
from ..base.errors import UsageError
from ..base.progress import Progress
from ..base.text import count
from ..bundle.manifest import ModuleEntry
from ..maths.weighting import InputMoments
from .moments import Moment, Moments

_AT_HAND = 8  # stacks: an adapter has few groups of modules, and most adapters have the same ones


class Calibration:
    """A file of `lorazip calibrate`, for the modules of a collection."""

    def __init__(self, moments: Moments, sizes: dict[str, int]) -> None:
        self.path = moments.path
        self.known = frozenset(moments.modules) & sizes.keys()
        """The modules that it has the moments of."""
        self._moments = moments
        self._sizes = sizes
        self._of_module = cache(self._read)
        self.inputs_of = lru_cache(_AT_HAND)(self._stacked)
        """Of modules, by a tuple of their names, on a device. Where nothing is known, all directions count alike."""

    @classmethod
    def open(cls, path: Path, modules: Iterable[Module | ModuleEntry]) -> Calibration:
        """For these ``modules``, of which it may lack some.

        Raises as `Moments.open`, and UsageError for moments of another model.
        """
        moments = Moments.open(path)
        found = cls(moments, {module.name: module.d_in for module in modules})
        if not found.known:
            raise UsageError(
                f"«calibration» {path}: it knows the inputs of no module, not of {next(iter(found._sizes))} for one",
                "was it made for another model? 'lorazip calibrate --adapters' looks at these modules",
            )
        for name in sorted(found.known):
            found._check(name)
        return found

    def _check(self, module: str) -> None:
        moment, size = self._moment(module), self._sizes[module]
        if len(moment.diagonal) != size:
            raise UsageError(
                f"«calibration» {self.path}: the input of {module} has {len(moment.diagonal)} entries there, but"
                f" {size} in the adapters",
                "it was made for another model: calibrate with the base model of the adapters",
            )
        if not (moment.diagonal.isfinite().all() and moment.directions.isfinite().all()):
            raise UsageError(
                f"«calibration» {self.path}: the input of {module} has moments with NaN or Inf",
                "the model overflows on some row: calibrate in f32",
            )

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        return sha256_file(self.path)

    @property
    def unknown(self) -> str | None:
        """A sentence about the modules whose inputs are not known, if there are any."""
        names = [name for name in self._sizes if name not in self.known]
        if not names:
            return None
        return f"nothing is known of the inputs of {count(len(names), 'module')}, {names[0]} for one: all count alike"

    def _stacked(self, modules: tuple[str, ...], device: torch.device) -> InputMoments:
        each = [self._of_module(name, device) for name in modules]
        most = max(inputs.directions.shape[1] for inputs in each)
        directions = [pad(inputs.directions, (0, 0, 0, most - inputs.directions.shape[1])) for inputs in each]
        return InputMoments(torch.cat(directions), torch.cat([inputs.rest for inputs in each]))

    def _read(self, module: str, device: torch.device) -> InputMoments:
        moment = self._moment(module)
        return InputMoments.of(moment.diagonal[None].to(device), moment.directions[None].to(device))

    def _moment(self, module: str) -> Moment:
        size = self._sizes[module]
        return self._moments.moment(module) or Moment((module,), torch.ones(size), torch.zeros(1, size), 0)


def calibration_for(path: Path | None, collection: Collection, progress: Progress) -> Calibration | None:
    """The file at ``path`` for the modules of a collection; says which it knows nothing of. Raises as `open` does."""
    if path is None:
        return None
    calibration = Calibration.open(path, collection.modules)
    if calibration.unknown is not None:
        progress.note(calibration.unknown)
    return calibration
