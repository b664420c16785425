"""The decoder: an adapter's update, as factors, out of a bundle. It knows nothing of how the bundle was made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter.module import Part
from ..maths.factored import Factors
from .manifest import AdapterEntry
from .reader import Bundle

_AT_HAND = 16  # shards whose tensors are at hand: they are mapped, not in memory


def decode(bundle: Bundle, adapter: AdapterEntry, module: str, dtype: torch.dtype = torch.float32) -> Factors:
    """B̂ [d_out, k] and Â [k, d_in] with ΔŴ = B̂ Â, computed in ``dtype``.

    For a shared basis as `shared` has them; for an adapter kept individually its own factors, the scale folded into B̂.
    """
    if adapter.cluster is None:
        b, a, scale = bundle.individual(adapter, module)
        return b.to(dtype) * scale, a.to(dtype)
    cluster = bundle.manifest.clusters[adapter.cluster]
    u, v = (basis.to(dtype) for basis in bundle.basis(cluster, module))
    return shared(cluster.method, u, v, bundle.core(adapter, module).to(dtype))


def shared(method: str, u: Tensor, v: Tensor, cores: Tensor) -> Factors:
    """B̂ = U Σ [..., d_out, R_V] and Â = Vᵀ [..., R_V, d_in] for cores Σ [..., R_U, R_V], or diagonals [..., R].

    Diagonals are those of the ``method`` ``diag``. U is [..., d_out, R_U] and V [..., d_in, R_V].
    """
    return (u * cores.unsqueeze(-2) if method == "diag" else u @ cores), v.mT


class _Shared(NamedTuple):
    """One module of a shard: its bases, all its cores, and the row of every adapter, by its index, in them."""

    u: Tensor
    v: Tensor
    cores: Tensor
    rows: dict[int, int]


class Decoder:
    """`decode` in float64 for many adapters and modules at once; for any thread.

    ``most`` bounds the numbers in one batch: in the factors of the originals and of what is decoded, bases included.
    """

    def __init__(self, bundle: Bundle, device: torch.device, most: int) -> None:
        self.bundle = bundle
        self.device = device
        self._most = most
        self._shard = lru_cache(_AT_HAND)(self._read_shard)

    def most_adapters(self, adapter: AdapterEntry, parts: Sequence[Part]) -> int:
        """How many adapters like this to decode at a time."""
        if adapter.cluster is None:
            return 1
        shard = self._shard(self.bundle.shard(adapter).adapters[0], _names(parts))
        return max(1, self._most // max(_numbers(part, _widths(each)) for part, each in zip(parts, shard, strict=True)))

    def batches(self, adapters: Sequence[AdapterEntry], parts: Sequence[Part]) -> Iterator[tuple[list[int], Factors]]:
        """B̂ [n, m, d_out, k] and Â [n, m, k, d_in] of n adapters in one shard, or of one kept individually.

        ``parts`` are the modules that the originals have. Each batch is of m of them, given by position, that have
        equal shapes and ranks, also of the originals. What all n have in common has no dimension for them.
        """
        names = _names(parts)
        if adapters[0].cluster is None:
            return self._individual(adapters[0], names, parts)
        return self._in_shard(adapters, names, parts)

    def _individual(
        self, adapter: AdapterEntry, names: tuple[str, ...], parts: Sequence[Part]
    ) -> Iterator[tuple[list[int], Factors]]:
        kept = [self.bundle.individual(adapter, name) for name in names]
        for columns in self._alike(parts, [(b.shape[1], b.shape[1]) for b, _, _ in kept], 1):
            own_b, own_a, own_scales = zip(*(kept[column] for column in columns), strict=True)
            b, a = self._stacked(own_b), self._stacked(own_a)
            scales = torch.tensor(own_scales, dtype=b.dtype, device=b.device)
            yield columns, (b * scales[:, None, None], a)

    def _in_shard(
        self, adapters: Sequence[AdapterEntry], names: tuple[str, ...], parts: Sequence[Part]
    ) -> Iterator[tuple[list[int], Factors]]:
        assert adapters[0].cluster is not None
        method = self.bundle.manifest.clusters[adapters[0].cluster].method
        shard = self._shard(self.bundle.shard(adapters[0]).adapters[0], names)
        indices = [self.bundle.index(adapter) for adapter in adapters]
        for columns in self._alike(parts, list(map(_widths, shard)), len(adapters)):
            own = [shard[column] for column in columns]
            u, v = self._stacked([each.u for each in own]), self._stacked([each.v for each in own])
            cores = [_taken(each.cores, [each.rows[index] for index in indices]) for each in own]
            yield columns, shared(method, u, v, self._stacked(cores, 1))

    def _read_shard(self, adapter: int, names: tuple[str, ...]) -> list[_Shared]:
        """The modules of the shard that has the adapter of this index."""
        entry = self.bundle.manifest.adapters[adapter]
        assert entry.cluster is not None
        cluster, shard = self.bundle.manifest.clusters[entry.cluster], self.bundle.shard(entry)
        return [
            _Shared(*self.bundle.basis(cluster, name), self.bundle.cores(shard, name), self.bundle.rows(shard, name))
            for name in names
        ]

    def _alike(self, parts: Sequence[Part], widths: Sequence[tuple[int, int]], adapters: int) -> Iterator[list[int]]:
        """The positions of parts that are alike, as many as fit into a batch with so many adapters."""
        alike: defaultdict[object, list[int]] = defaultdict(list)
        for column, (part, of_bases) in enumerate(zip(parts, widths, strict=True)):
            alike[part.module.d_out, part.module.d_in, part.rank, of_bases].append(column)
        for columns in alike.values():
            step = max(1, self._most // (adapters * _numbers(parts[columns[0]], widths[columns[0]])))
            for start in range(0, len(columns), step):
                yield columns[start : start + step]

    def _stacked(self, tensors: list[Tensor] | tuple[Tensor, ...], dim: int = 0) -> Tensor:
        return torch.stack(tensors, dim).to(self.device).double()


def _names(parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(part.module.name for part in parts)


def _widths(of: _Shared) -> tuple[int, int]:
    """R_U and R_V."""
    return of.u.shape[1], of.v.shape[1]


def _numbers(part: Part, widths: tuple[int, int]) -> int:
    """In the factors of an original, in decoded ones, and in the bases, which a product copies for each adapter."""
    d_out, d_in = part.module.d_out, part.module.d_in
    return part.parameters + (widths[0] + widths[1]) * d_out + widths[1] * d_in


def _taken(stacked: Tensor, rows: list[int]) -> Tensor:
    """Some rows; a view where they follow each other."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return stacked[rows[0] : rows[0] + len(rows)]
    return stacked[rows]
