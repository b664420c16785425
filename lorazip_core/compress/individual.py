"""Adapters kept on their own: a truncated SVD of every module, or the original factors where nothing less will do."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..adapter.reader import Adapter
from ..base.stopping import check_stop
from ..bundle.summary import is_adapter_within
from ..maths.encode import encode_individual
from ..maths.factored import truncated_svd
from .pieces import Pieces


@dataclass(frozen=True)
class Kept:
    """How an adapter is kept on its own, and ‖ΔW−ΔŴ‖² of its modules [M_i] in their order, in float64."""

    scheme: Literal["svd", "original"]
    rank: int | None
    squared_errors: Tensor


@dataclass(frozen=True)
class Individual:
    """One adapter as it is stored: its tensors by name, and ‖ΔW−ΔŴ‖² by module."""

    scheme: Literal["svd", "original"]
    rank: int | None
    tensors: dict[str, Tensor]
    squared_errors: dict[str, float]

    def store(self, number: int, pieces: Pieces) -> Kept:
        """Store adapter ``number`` as two pieces: its file as the bundle has it, after what `stored` tells of it."""
        errors = torch.tensor([self.squared_errors[name] for name in sorted(self.squared_errors)], dtype=torch.float64)
        rank = torch.tensor(self.rank or 0, dtype=torch.int64)
        pieces.write(f"kept-{number}", {"rank": rank, "squared_errors": errors})
        pieces.write(individual_piece(number), self.tensors)
        return Kept(self.scheme, self.rank, errors)


def individual_piece(number: int) -> str:
    """The name of the piece that is the file of adapter ``number`` in the bundle."""
    return f"individual-{number}"


def stored(number: int, pieces: Pieces) -> Kept | None:
    """How adapter ``number`` was stored, or None if it is not there yet."""
    if individual_piece(number) not in pieces or f"kept-{number}" not in pieces:
        return None
    told = pieces.load(f"kept-{number}")
    rank = int(told["rank"]) or None
    return Kept("original" if rank is None else "svd", rank, told["squared_errors"])


def keep_individually(
    adapter: Adapter,
    rank: int | None,
    max_error: float | None,
    *,
    squared_norm: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Individual:
    """Keep an adapter at ``rank``; where that exceeds ``max_error``, or without a rank, at the smallest that meets it.

    The rank is one for all modules. When even the full rank, rounded to ``dtype``, exceeds ``max_error``, or ``dtype``
    cannot hold the factors, the original ones are kept, whose error is 0.
    """
    batches = _batches(adapter, device)
    full = max(part.rank for part in adapter.parts.values())
    limit = float("inf") if max_error is None else max_error * squared_norm
    candidates = [] if rank is None else [rank]
    if max_error is not None:
        candidates += range(_smallest_rank(batches, limit), full + 1)
    for candidate in candidates:
        check_stop()
        kept = _truncated(batches, candidate, dtype)
        if is_adapter_within(kept.squared_errors.values(), [squared_norm], max_error):
            return kept
    return as_original(adapter)


_Batches = list[tuple[list[str], Tensor, Tensor]]


def _batches(adapter: Adapter, device: torch.device) -> _Batches:
    """The modules of equal shape and rank together: their names, B [m, d_out, r] and A [m, r, d_in] in float64.

    In float32 a scale like 1/3 would be rounded, and an error of 1e-15 pass for 0.
    """
    names: defaultdict[tuple[int, int, int], list[str]] = defaultdict(list)
    for name, part in adapter.parts.items():
        names[part.module.d_out, part.module.d_in, part.rank].append(name)
    batches = []
    for group in names.values():
        b, a = (torch.stack(side).to(device).double() for side in zip(*adapter.each_stored(group), strict=True))
        scales = torch.tensor([adapter.parts[name].scale for name in group], dtype=torch.float64, device=device)
        batches.append((group, b * scales[:, None, None], a))
    return batches


def _smallest_rank(batches: _Batches, limit: float) -> int:
    """The least rank at which the exact truncated SVDs lose no more energy than ``limit``; rounding may need more."""
    spectra = [truncated_svd(b, a, b.shape[-1])[0].double().square().sum(-2).sum(0).cpu() for _, b, a in batches]
    energy = torch.zeros(max(len(spectrum) for spectrum in spectra), dtype=torch.float64)
    for spectrum in spectra:
        energy[: len(spectrum)] += spectrum
    lost = energy.flip(0).cumsum(0).flip(0)  # lost[r] is what a truncation at rank r loses
    return max(1, int((lost > limit).sum()))


def _truncated(batches: _Batches, rank: int, dtype: torch.dtype) -> Individual:
    tensors, errors = {}, {}
    for names, b, a in batches:
        check_stop()
        (stored_b, stored_a), lost = encode_individual(b, a, rank, dtype)
        for name, module_b, module_a, error in zip(names, stored_b.cpu(), stored_a.cpu(), lost.tolist(), strict=True):
            tensors[f"{name}.B"], tensors[f"{name}.A"], errors[name] = module_b, module_a, error
    return Individual("svd", rank, tensors, errors)


def as_original(adapter: Adapter) -> Individual:
    """Keep the factors as they are in the file, each in its own dtype, and the scale beside them."""
    tensors = {}
    stored = adapter.each_stored(adapter.parts)
    for (name, part), (b, a) in zip(adapter.parts.items(), stored, strict=True):
        tensors[f"{name}.B"], tensors[f"{name}.A"] = b, a
        tensors[f"{name}.scale"] = torch.tensor(part.scale, dtype=torch.float64)
    return Individual("original", None, tensors, dict.fromkeys(adapter.parts, 0.0))
