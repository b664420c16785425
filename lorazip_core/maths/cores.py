"""The cores of the adapters of several problems, and the Gram matrices that HOOI needs of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .chunks import ELEMENTS_AT_ONCE, Chunks


@dataclass(frozen=True)
class Cores:
    """Cores C_i = Uᵀ D_i V of the adapters of P problems, in N chunks of c places."""

    chunks: Chunks
    left: Tensor  # [N, c, k, l]: C_i
    right: Tensor  # [N, c, l, k]: C_iᵀ

    @classmethod
    def of(cls, chunks: Chunks, cores: Tensor) -> Cores:
        return cls(chunks, cores, cores.mT.contiguous())

    def corner(self, rows: int, columns: int) -> Cores:
        """The first rows and columns of every core."""
        left, right = self.left[..., :rows, :columns], self.right[..., :columns, :rows]
        return Cores(self.chunks, left.contiguous(), right.contiguous())

    def left_gram(self, v: Tensor) -> Tensor:
        """Σ_i C_i V Vᵀ C_iᵀ for s bases V [P, s, l, r] of each problem, as [P, s, k, k]."""
        return _half_gram(self.left, v, self.chunks)

    def right_gram(self, u: Tensor) -> Tensor:
        """Σ_i C_iᵀ U Uᵀ C_i for s bases U [P, s, k, r] of each problem, as [P, s, l, l]."""
        return _half_gram(self.right, u, self.chunks)

    def full_left_gram(self) -> Tensor:
        """Σ_i C_i C_iᵀ, [P, 1, k, k]."""
        return _full_gram(self.left, self.chunks)

    def full_right_gram(self) -> Tensor:
        """Σ_i C_iᵀ C_i, [P, 1, l, l]."""
        return _full_gram(self.right, self.chunks)


def _half_gram(cores: Tensor, basis: Tensor, chunks: Chunks) -> Tensor:
    """Σ_i C_i Z Zᵀ C_iᵀ [P, s, k, k] for cores [N, c, k, l] and bases Z [P, s, l, r]."""
    _, size, rows, _ = cores.shape
    starts, rank = basis.shape[1], basis.shape[3]
    together = basis.transpose(1, 2).flatten(2)  # [P, l, s·r]: one product for all starts

    def grams(some: slice) -> Tensor:
        half = cores[some].flatten(1, 2) @ (together[some] if chunks.one_each else together[chunks.problems[some]])
        half = half.reshape(-1, size, rows, starts, rank).permute(0, 3, 2, 1, 4).flatten(3)  # [N, s, k, c·r]
        return half @ half.mT

    return chunks.total_of(grams, max(1, ELEMENTS_AT_ONCE[cores.device.type] // (size * rows * starts * rank)))


def _full_gram(cores: Tensor, chunks: Chunks) -> Tensor:
    flat = cores.transpose(1, 2).flatten(2)
    return chunks.total(flat @ flat.mT)[:, None]
