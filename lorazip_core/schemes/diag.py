"""``diag``: bases that a cluster shares, and a diagonal core of each adapter: ΔŴ_i = U diag(c_i) Vᵀ.

JD-Diag of "Compress then Serve" (arXiv 2407.00066), a CP decomposition; `maths.cp_search` finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from .bases import BasesScheme, solution, too_far
from .scheme import Fault, PackSize, Problems, Shape, Size, Solution, TensorSpec, working_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..base.progress import Share
    from ..maths.factored import Factors

# Bytes, measured, each an upper bound.
_ELEMENT_BYTES = 48  # per element in a factor: as it was read, in float32 and in float64
_ROW_BYTES = 24 * 4 * 8  # per row of a factor and column of the basis: products with a population of bases
_MOST_COLUMNS = 32  # of a basis: above, the population shrinks as the rank grows


class Diag(BasesScheme):
    """U [d_out, R] and V [d_in, R] with columns of unit norm that need not be orthogonal, and c_i [R]."""

    name: ClassVar[str] = "diag"
    about: ClassVar[str] = "a basis of rank {rank} shared by {adapters} adapters, and a diagonal core"
    default_rank: ClassVar[int | None] = 16
    is_diagonal: ClassVar[bool] = True

    def encode(self, problems: Problems, rank: int, *, dtype: torch.dtype, seed: int, share: Share) -> list[Solution]:
        from ..maths.encode import encode_diag_problems

        return list(map(solution, encode_diag_problems(*problems, rank=rank, dtype=dtype, seed=seed, share=share)))

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        return tensors["U"].to(dtype) * tensors["core"].to(dtype).unsqueeze(-2), tensors["V"].to(dtype).mT

    def apply(self, resident: Mapping[str, Tensor], size: Size, x: Tensor, places: Tensor) -> Tensor:
        """U (c_i ∘ (Vᵀ x))."""
        u, v, cores = (resident[name].to(working_dtype(x)) for name in ("U", "V", "core"))
        return (x.to(v.dtype) @ v * cores[places]) @ u.mT

    def shared_tensors(self, size: Size, rank: int) -> dict[str, TensorSpec]:
        return {suffix: TensorSpec((side, range(1, rank + 1))) for suffix, side in zip(self.shared, size, strict=True)}

    def own_tensors(self, size: Size, rank: int, shared: Mapping[str, Shape] | None = None) -> dict[str, TensorSpec]:
        return {"core": TensorSpec((range(1, rank + 1) if shared is None else shared["U"][1],))}

    def contradiction(self, shapes: Mapping[str, Shape]) -> str | None:
        u, v = shapes.get("U"), shapes.get("V")
        return f"U has {u[1]} columns and V has {v[1]}" if u and v and u[1] != v[1] else None

    def fault(self, suffix: str, tensor: Tensor) -> Fault | None:
        off = tensor.double().square().sum(0) - 1
        return too_far("not-unit-norm", "max |‖column‖² − 1|", off, tensor.dtype)

    def working_bytes(self, pack: PackSize, rank: int) -> int:
        products = _ROW_BYTES * min(rank, _MOST_COLUMNS) // sum(pack.size)
        return pack.elements * (_ELEMENT_BYTES + products)
