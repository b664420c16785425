"""Many adapters on their own: each as it was asked for if that will do, and their files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..base.device import CPU, load_linear_algebra
from ..base.digests import safe_name
from ..base.progress import Progress
from ..base.threads import cores, in_order
from ..bundle.tensor_file import DTYPES
from ..bundle.writer import BundleWriter
from ..model.calibration import Calibration
from ..planning.options import CompressOptions
from ..reading.module_groups import ModuleGroups
from ..reading.scan import Scan
from ..schemes.scheme import Target
from .attempt import Attempt
from .individual import Kept, keep_exactly, keep_individually, stored
from .packed import pack, packed_files
from .pieces import Pieces, individual_piece, note_left

_GPU_WORKERS = 4


@dataclass(frozen=True)
class Alone:
    """Keeps adapters of a scan on their own, as ``options`` say; each is a piece."""

    scanned: Scan
    options: CompressOptions
    device: torch.device
    pieces: Pieces
    progress: Progress
    calibration: Calibration | None = None

    def keep(self, alone: Sequence[int], attempt: Attempt | None = None) -> list[str]:
        """Make the pieces of adapters that are not there yet; a note on each that is not kept as it was asked for."""
        options, adapters = self.options, self.scanned.collection.adapters
        dtype = DTYPES[options.dtype]
        asked = None if options.scheme.shared else options.chosen
        count = attempt.number if attempt else 0
        if asked:
            note_left(self.pieces, [individual_piece(number, count) for number in alone], self.progress)

        def keep(number: int) -> Kept:
            if there := stored(number, count, self.pieces):
                return there
            if self._too_small[number]:
                kept = keep_exactly(groups_of.of(number), dtype)
            else:
                norm = math.fsum(self.scanned.norms[number].tolist())
                kept = keep_individually(
                    groups_of.of(number),
                    asked,
                    self._target(number, norm, attempt),
                    self._limit,
                    squared_norm=norm,
                    dtype=dtype,
                )
            self.scanned.check_unchanged([number])
            return kept.store(number, count, self.pieces)

        told: list[str] = []
        load_linear_algebra(self.device)
        inputs_of = None if self.calibration is None else self.calibration.inputs_of
        groups_of = ModuleGroups(self.scanned, self.device, inputs_of)
        # Several also where a GPU computes, since most of the time is reading, copying and writing; each takes memory.
        workers = cores() if self.device.type == "cpu" else min(_GPU_WORKERS, cores())
        with (
            self.progress.stage("keeping adapters individually", len(alone)) as advance,
            closing(in_order(keep, alone, CPU, workers=workers)) as results,
        ):

            def whose() -> Iterator[tuple[int, str, int]]:
                for number, kept in zip(alone, results, strict=True):
                    if kept.scheme != options.chosen:
                        told.append(f"kept {adapters[number].name} {self._reason(number, kept)}")
                    advance(1)
                    yield number, kept.scheme, len(kept.squared_errors)

            pack(packed_files(whose(), count), count, self.pieces)  # while later ones are still encoded
        return told

    @property
    def _limit(self) -> float | None:
        """The most that any adapter on its own may lose: asked for, or the default of a scheme that has one."""
        options = self.options
        return options.largest_error if options.max_error is None else options.max_error

    def _target(self, number: int, norm: float, attempt: Attempt | None) -> Target:
        """What is wanted of an adapter with this Σ‖ΔW‖²."""
        options = self.options
        if attempt is not None:
            return Target(step=attempt.step * math.sqrt(attempt.spectra.energies[number]), objective=options.objective)
        limit = None if self._limit is None else self._limit * norm
        return Target(options.kept_rank, limit, objective=options.objective)

    def _reason(self, number: int, kept: Kept) -> str:
        """How an adapter is kept on its own, and why."""
        how = "as it was" if kept.rank is None else f"at rank {kept.rank}"
        if self._limit is None or self._too_small[number]:
            return f"{how}: its values do not fit in {self.options.dtype}"
        return f"{how}: it would exceed «max_error» {self._limit}"

    @cached_property
    def _too_small(self) -> Tensor:
        """Adapters that are kept as they are, since the dtype of the bundle has no normal number for any value."""
        return self.scanned.too_small(DTYPES[self.options.dtype])


def write_alone(
    writer: BundleWriter, kept: Mapping[int, Kept], attempt: int, pieces: Pieces, name_of: Callable[[int], str]
) -> dict[int, str]:
    """Take over the files of adapters that are kept on their own, by number, some of them packed together.

    ``name_of`` an adapter a file is called that has it alone. Returns the path of each.
    """
    paths: dict[int, str] = {}
    whose = ((number, kept[number].scheme, len(kept[number].squared_errors)) for number in sorted(kept))
    for file in pack(packed_files(whose, attempt), attempt, pieces):
        path = writer.add_file(writer.free(file.path), *pieces.file(file.piece)).path
        paths |= dict.fromkeys(file.adapters, path)
    for number in kept:
        if number not in paths:
            path = writer.free(f"individual/{safe_name(name_of(number))}.safetensors")
            paths[number] = writer.add_file(path, *pieces.file(individual_piece(number, attempt))).path
    return paths
