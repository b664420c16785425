"""Factors B [d_out, r] and A [r, d_in] of an adapter's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from .scheme import IndividualScheme, Shape, ShapeOf, Size, Terms, working_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from ..maths.factored import Factors


class FactorsScheme(IndividualScheme):
    """What schemes with two factors have in common."""

    own: ClassVar[tuple[str, ...]] = ("B", "A")

    def decoded_rank(self, shape_of: ShapeOf) -> int:
        return shape_of("A")[0]

    def contradiction(self, shapes: Mapping[str, Shape]) -> str | None:
        b, a = shapes.get("B"), shapes.get("A")
        return f"B is {list(b)} but A is {list(a)}" if b and a and b[1] != a[0] else None

    def terms(self, own: Mapping[str, Tensor]) -> Terms:
        import torch

        return Terms(own["B"].mT, own["A"], own["A"].new_ones(len(own["A"]), dtype=torch.float32))

    def resident(self, adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """``B`` [Σr, d_out] and ``A`` [Σr, d_in], a row for each column of B and row of A, and what else is own [n].

        Those of the adapter at place i are the rows from ``starts``[i] to ``starts``[i + 1].
        """
        import torch

        others = {suffix: torch.stack([own[suffix] for own in adapters]) for suffix in self.own[2:]}
        return others | {
            "starts": starts_of([len(own["A"]) for own in adapters]),
            "B": torch.cat([own["B"].mT for own in adapters]),
            "A": torch.cat([own["A"] for own in adapters]),
        }

    def resident_bytes(self, resident: Mapping[str, Tensor], size: Size) -> list[int]:
        of_rank = sum(resident[side][:1].nbytes for side in "BA")
        others = sum(resident[suffix][:1].nbytes for suffix in self.own[2:])
        return [START_BYTES + others + of_rank * rank for rank in resident["starts"].diff().tolist()]

    def apply(self, resident: Mapping[str, Tensor], size: Size, x: Tensor, places: Tensor) -> Tensor:
        rows, owners = rows_of(resident["starts"], places)
        own = {suffix: resident[suffix][owners] for suffix in self.own[2:]}
        own |= {"B": resident["B"][rows].unsqueeze(-1), "A": resident["A"][rows].unsqueeze(-2)}
        return apply_rows(self.decode(own, working_dtype(x)), owners, x, places)


START_BYTES = 4
"""Of a number in `starts_of`."""


def starts_of(counts: Sequence[int]) -> Tensor:
    """Where the rows of n adapters begin, which have so many, one after another; [n + 1] of int32, as it ends, too."""
    import torch

    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def rows_of(starts: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows that begin at ``starts`` [n + 1], those of all adapters at ``places``, each adapter once.

    Returns the rows [K] and the place of the adapter [K] that each belongs to. A GPU is asked for K.
    """
    import torch

    used = torch.unique(places)
    counts = starts.diff()[used]
    before = counts.cumsum(0) - counts
    rows = torch.arange(int(counts.sum()), device=starts.device)
    return rows + (starts[used] - before).repeat_interleave(counts), used.repeat_interleave(counts)


def apply_rows(factors: Factors, owners: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """`Scheme.apply` from B̂ [K, d_out, 1] and Â [K, 1, d_in], the components of the adapters at ``owners`` [K].

    One product for all adapters, of which every x keeps what is of its own: far fewer steps than adapter by adapter.
    """
    b, a = (side.flatten(1) for side in factors)
    inner = (x.to(a.dtype) @ a.mT).masked_fill(owners != places[:, None], 0)
    return inner @ b
