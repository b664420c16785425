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
from ..schemes.scheme import Scheme, Shape
from .manifest import AdapterEntry, ModuleEntry
from .reader import Bundle
from .stored import stored

_MOST_SHARDS = 16  # whose tensors are at hand: they are mapped, not in memory


def decode(bundle: Bundle, adapter: AdapterEntry, module: ModuleEntry, dtype: torch.dtype = torch.float32) -> Factors:
    """B̂ [d_out, k] and Â [k, d_in] with ΔŴ = B̂ Â, computed in ``dtype``; raises as `stored`."""
    return bundle.scheme(adapter).decode(stored(bundle, adapter, module), dtype)


class _Stored(NamedTuple):
    """One module: what its adapters share, and their own tensors [n, ...] with the row of each, by its index."""

    shared: dict[str, Tensor]
    own: dict[str, Tensor]
    rows: dict[int, int]

    def shapes(self) -> dict[str, Shape]:
        """The shapes of the tensors that one adapter is decoded from."""
        shapes = {suffix: tuple(tensor.shape) for suffix, tensor in self.shared.items()}
        return shapes | {suffix: tuple(tensor.shape[1:]) for suffix, tensor in self.own.items()}


class Decoder:
    """`decode` in float64 for many adapters and modules at once; for any thread.

    ``most`` bounds the elements in one batch: in the factors of the originals and of what is decoded, and in what is
    shared, which a product copies for each adapter.
    """

    def __init__(self, bundle: Bundle, device: torch.device, most: int) -> None:
        self.bundle = bundle
        self.device = device
        self._most = most
        self._shard = lru_cache(_MOST_SHARDS)(self._read_shard)

    def most_adapters(self, adapter: AdapterEntry, parts: Sequence[Part]) -> int:
        """How many adapters like this to decode at a time."""
        if adapter.cluster is None:
            return 1
        scheme = self.bundle.scheme(adapter)
        stored = self._stored(adapter, parts)
        return max(1, self._most // max(_elements(*each, scheme) for each in zip(parts, stored, strict=True)))

    def batches(self, adapters: Sequence[AdapterEntry], parts: Sequence[Part]) -> Iterator[tuple[list[int], Factors]]:
        """B̂ [n, m, d_out, k] and Â [n, m, k, d_in] of n adapters in one shard, or of one kept individually.

        ``parts`` are the modules that the originals have. Each batch is of m of them, given by position, that have
        equal shapes and ranks, also of the originals. What all n have in common has no dimension for them.
        """
        scheme = self.bundle.scheme(adapters[0])
        stored = self._stored(adapters[0], parts)
        indices = [self.bundle.index(adapter) for adapter in adapters]
        for columns in self._of_equal_shapes(scheme, parts, stored, len(adapters)):
            own = [stored[column] for column in columns]
            tensors = {suffix: self._stacked([each.shared[suffix] for each in own]) for suffix in scheme.shared}
            for suffix in scheme.own:
                rows = [_taken(each.own[suffix], [each.rows[index] for index in indices]) for each in own]
                tensors[suffix] = self._stacked(rows, 1)
            yield columns, scheme.decode(tensors, torch.float64)

    def _stored(self, adapter: AdapterEntry, parts: Sequence[Part]) -> list[_Stored]:
        names = tuple(part.module.name for part in parts)
        if adapter.cluster is not None:
            return self._shard(self.bundle.shard(adapter).adapters[0], names)
        row = {self.bundle.index(adapter): 0}
        return [
            _Stored({}, {suffix: own[None] for suffix, own in self.bundle.own(adapter, name).items()}, row)
            for name in names
        ]

    def _read_shard(self, adapter: int, names: tuple[str, ...]) -> list[_Stored]:
        """The modules of the shard that has the adapter of this index."""
        entry = self.bundle.manifest.adapters[adapter]
        assert entry.cluster is not None
        cluster, shard = self.bundle.manifest.clusters[entry.cluster], self.bundle.shard(entry)
        return [
            _Stored(self.bundle.shared(cluster, name), self.bundle.stacked(shard, name), self.bundle.rows(shard, name))
            for name in names
        ]

    def _of_equal_shapes(
        self, scheme: Scheme, parts: Sequence[Part], stored: Sequence[_Stored], adapters: int
    ) -> Iterator[list[int]]:
        """The positions of parts that can be decoded together, as many as fit into a batch with so many adapters."""
        groups: defaultdict[object, list[int]] = defaultdict(list)
        for column, (part, own) in enumerate(zip(parts, stored, strict=True)):
            size = part.module.d_out, part.module.d_in
            groups[size, part.rank, tuple(own.shapes().items())].append(column)
        for columns in groups.values():
            step = max(1, self._most // (adapters * _elements(parts[columns[0]], stored[columns[0]], scheme)))
            for start in range(0, len(columns), step):
                yield columns[start : start + step]

    def _stacked(self, tensors: list[Tensor], dim: int = 0) -> Tensor:
        return torch.stack(tensors, dim).to(self.device)


def _elements(part: Part, stored: _Stored, scheme: Scheme) -> int:
    """In the factors of an original, in those that are decoded, and in what is shared."""
    rank = scheme.decoded_rank(stored.shapes().__getitem__)
    decoded = rank * (part.module.d_out + part.module.d_in)
    return part.parameters + decoded + sum(tensor.numel() for tensor in stored.shared.values())


def _taken(stacked: Tensor, rows: list[int]) -> Tensor:
    """Some rows; a view where they follow each other."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return stacked[rows[0] : rows[0] + len(rows)]
    return stacked[rows]
