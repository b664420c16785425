"""``joint``: orthonormal bases that a cluster shares, and a full core of each adapter: ΔŴ_i = U Σ_i Vᵀ.

JD-Full of "Compress then Serve" (arXiv 2407.00066), a Tucker-2 decomposition; `maths.tucker` finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from .bases import CORE_BYTES, BasesScheme, solution, too_far
from .scheme import Fault, PackSize, Problems, Shape, Size, Solution, TensorSpec, working_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..base.progress import Share
    from ..maths.factored import Factors

# Bytes, measured, each an upper bound.
_ELEMENT_BYTES = 16  # per element in a factor: as it was read and in the order of the problems, partly in float64
_COLUMN_BYTES = 32  # per element in a basis: in float32, and on its way to be orthonormal in float64
_GRAM_BYTES = 5 * 4  # per element in a Gram matrix of cores
_OVERLAP_BYTES = 3 * 4  # per element in the products of all bases that are compared


class Joint(BasesScheme):
    """U [d_out, R_U], V [d_in, R_V] with R_U = min(R, d_out) and R_V = min(R, d_in) at the most, and Σ_i [R_U, R_V]."""

    name: ClassVar[str] = "joint"
    about: ClassVar[str] = "a basis of rank {rank} shared by {adapters} adapters, and a full core"
    default_rank: ClassVar[int | None] = 16
    is_diagonal: ClassVar[bool] = False

    def encode(self, problems: Problems, rank: int, *, dtype: torch.dtype, seed: int, share: Share) -> list[Solution]:
        from ..maths.encode import encode_joint

        return list(map(solution, encode_joint(*problems, rank=rank, dtype=dtype, seed=seed, share=share)))

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        return tensors["U"].to(dtype) @ tensors["core"].to(dtype), tensors["V"].to(dtype).mT

    def apply(self, resident: Mapping[str, Tensor], size: Size, x: Tensor, places: Tensor) -> Tensor:
        """U (Σ_i (Vᵀ x))."""
        u, v, cores = (resident[name].to(working_dtype(x)) for name in ("U", "V", "core"))
        inner = x.to(v.dtype) @ v
        return (cores[places] @ inner.unsqueeze(-1)).squeeze(-1) @ u.mT

    def shared_tensors(self, size: Size, rank: int) -> dict[str, TensorSpec]:
        return {
            suffix: TensorSpec((side, range(1, min(rank, side) + 1)))
            for suffix, side in zip(self.shared, size, strict=True)
        }

    def own_tensors(self, size: Size, rank: int, shared: Mapping[str, Shape] | None = None) -> dict[str, TensorSpec]:
        if shared is not None:
            return {"core": TensorSpec((shared["U"][1], shared["V"][1]))}
        return {"core": TensorSpec((range(1, min(rank, size.d_out) + 1), range(1, min(rank, size.d_in) + 1)))}

    def fault(self, suffix: str, tensor: Tensor) -> Fault | None:
        import torch

        exact = tensor.double()
        off = exact.mT @ exact - torch.eye(exact.shape[1], dtype=exact.dtype)
        return too_far("not-orthonormal", "max |XᵀX − I|", off, tensor.dtype)

    def working_bytes(self, pack: PackSize, rank: int) -> int:
        import torch

        from ..maths.tucker import search_size, searched_together

        longest = max(pack.size)
        width, starts = search_size(rank)
        wide = min(width, longest)
        # A problem is searched only if it has more rows than the basis has columns.
        problems = min(pack.problems, pack.elements // ((rank + 1) * sum(pack.size)))
        searched = max(1, min(problems, searched_together(rank, longest, torch.device("cpu"))))
        compared = (starts * rank) ** 2 * _OVERLAP_BYTES
        search = searched * (longest * wide * _COLUMN_BYTES + starts * wide**2 * _GRAM_BYTES + compared)
        return pack.elements * _ELEMENT_BYTES + pack.updates * wide**2 * CORE_BYTES + search
