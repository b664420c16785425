"""Bases U [d_out, R_U] and V [d_in, R_V] that adapters share: ΔŴ_i = U Σ_i Vᵀ, and the Σ_i are their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from .scheme import Fault, Shape, ShapeOf, SharedScheme, Solution

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..maths.encode import Shared

# What the encoder's own QR, computed in float32, may be off from orthonormal: a few 1e-6 at d = 10^5 and R = 128.
_ENCODER_SLACK = 5e-5

CORE_BYTES = 2 * 4
"""Per element in the core of an update on which a search runs: with its transpose."""


class BasesScheme(SharedScheme):
    """What schemes with a basis for each side have in common; an adapter's own is its ``core``."""

    shared: ClassVar[tuple[str, ...]] = ("U", "V")
    own: ClassVar[tuple[str, ...]] = ("core",)
    is_diagonal: ClassVar[bool]
    """Whether a core is the diagonal [R] of a matrix, not all of it."""

    def decoded_rank(self, shape_of: ShapeOf) -> int:
        return shape_of("V")[1]

    def working_bytes_of_update(self, rank: int) -> int:
        """That of its core, which the search for full cores and for clusters needs."""
        from ..maths.tucker import search_size

        return CORE_BYTES * search_size(rank)[0] ** 2

    def stored_rank(self, shared: Mapping[str, Shape]) -> int:
        return max(shared["U"][1], shared["V"][1])


def solution(found: Shared) -> Solution:
    """What the solvers give, by suffixes."""
    return Solution({"U": found.u, "V": found.v}, {"core": found.cores}, found.members, found.squared_errors)


def too_far(kind: str, what: str, off: Tensor, dtype: torch.dtype) -> Fault | None:
    """A fault if any of ``off`` is more than rounding to ``dtype`` makes of a basis."""
    worst, tolerance = off.abs().max().item(), orthonormality_tolerance(dtype)
    return Fault(kind, f"{what} is {worst:.2e}, above {tolerance:.2e}") if worst > tolerance else None


def orthonormality_tolerance(dtype: torch.dtype) -> float:
    """The largest |UᵀU − I|_ij of an orthonormal U, each of whose entries was rounded to ``dtype``.

    With unit roundoff u, |Û − U| ≤ u|U| entrywise; columns have unit norm, so by Cauchy-Schwarz the Gram matrix moves
    by at most 2u + u²: 7.8e-3 for bf16 (u = 2⁻⁸), 9.8e-4 for f16, 1.2e-7 for f32, to which the encoder's own
    deviation is added. f16 entries below 2⁻¹⁴ round by 2⁻²⁵ absolutely, which that slack covers too.
    """
    import torch

    unit_roundoff = torch.finfo(dtype).eps / 2
    return 2 * unit_roundoff + unit_roundoff**2 + _ENCODER_SLACK
