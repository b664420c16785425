"""Factors B [d_out, r] and A [r, d_in] of an adapter's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .scheme import IndividualScheme, Shape, ShapeOf


class FactorsScheme(IndividualScheme):
    """What schemes with two factors have in common."""

    own: ClassVar[tuple[str, ...]] = ("B", "A")

    def decoded_rank(self, shape_of: ShapeOf) -> int:
        return shape_of("A")[0]

    def contradiction(self, shapes: Mapping[str, Shape]) -> str | None:
        b, a = shapes.get("B"), shapes.get("A")
        return f"B is {list(b)} but A is {list(a)}" if b and a and b[1] != a[0] else None
