"""``original``: the factors as they were, each in its own dtype, and their scale beside them. Nothing is lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from .factors import FactorsScheme
from .scheme import ANY, Encoding, ModuleGroup, Shape, Size, Target, TensorSpec, Terms

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..maths.factored import Factors

_FLOATS = ("F16", "BF16", "F32", "F64")


class Original(FactorsScheme):
    """For adapters that nothing smaller represents well enough, or whose values the dtype of the bundle cannot hold."""

    name: ClassVar[str] = "original"
    about: ClassVar[str] = "its own factors"
    own: ClassVar[tuple[str, ...]] = ("B", "A", "scale")
    is_method: ClassVar[bool] = False
    keeps_factors: ClassVar[bool] = True

    def encodings(self, groups: Sequence[ModuleGroup], target: Target, dtype: torch.dtype) -> Iterable[Encoding]:
        encoding = Encoding({}, {})
        for group in groups:
            for name, b, a, scale in zip(
                group.names, *(side.cpu() for side in (group.b, group.a, group.scales)), strict=True
            ):
                encoding.tensors.update({f"{name}.B": b, f"{name}.A": a, f"{name}.scale": scale})
                encoding.squared_errors[name] = 0.0
        yield encoding

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        return tensors["B"].to(dtype) * tensors["scale"].to(dtype)[..., None, None], tensors["A"].to(dtype)

    def terms(self, own: Mapping[str, Tensor]) -> Terms:
        terms = super().terms(own)
        return terms._replace(scale=terms.scale * own["scale"].float())

    def own_tensors(self, size: Size, rank: int, shared: Mapping[str, Shape] | None = None) -> dict[str, TensorSpec]:
        return {
            "B": TensorSpec((size.d_out, ANY), _FLOATS),
            "A": TensorSpec((ANY, size.d_in), _FLOATS),
            "scale": TensorSpec((), ("F64",)),
        }
