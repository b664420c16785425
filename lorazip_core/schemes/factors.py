"""Factors B [d_out, r] and A [r, d_in] of an adapter's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from .scheme import IndividualScheme, Shape, ShapeOf, Size, working_dtype

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
        def factors(place: int) -> Factors:
            start, end = resident["starts"][place : place + 2].tolist()
            own = {suffix: resident[suffix][place] for suffix in self.own[2:]}
            own |= {"B": resident["B"][start:end].mT, "A": resident["A"][start:end]}
            return self.decode(own, working_dtype(x))

        return apply_each(factors, size, x, places)


START_BYTES = 4
"""Of a number in `starts_of`."""


def starts_of(counts: Sequence[int]) -> Tensor:
    """Where the rows of n adapters begin, which have so many, one after another; [n + 1] of int32, as it ends, too."""
    import torch

    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def apply_each(factors: Callable[[int], Factors], size: Size, x: Tensor, places: Tensor) -> Tensor:
    """`Scheme.apply` from the B̂ and Â of every place that is used."""
    dtype = working_dtype(x)
    y = x.new_zeros(len(x), size.d_out, dtype=dtype)
    for place in sorted(set(places.tolist())):
        b, a = factors(place)
        rows = places == place
        y[rows] = x[rows].to(dtype) @ a.mT @ b.mT
    return y
