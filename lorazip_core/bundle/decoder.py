"""The decoder: an adapter's update, as factors, out of a bundle. It knows nothing of how the bundle was made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..adapter.module import Part
from ..maths.factored import Factors
from ..schemes.registry import packed_scheme
from ..schemes.scheme import Scheme, Shape
from .manifest import AdapterEntry, ModuleEntry
from .reader import Bundle
from .stored import stored
from .unpacked import Unpacked

UnpackedIn = Callable[[str], dict[int, Unpacked]]
"""By the path of a file of several adapters, each by its index."""

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

    def of(self, suffix: str, indices: list[int]) -> Tensor:
        """The own tensors [n, ...] of the adapters of these indices."""
        return _taken(self.own[suffix], [self.rows[index] for index in indices])


class _Padded(NamedTuple):
    """One module of adapters in one file, whose own tensors are of unequal ranks."""

    name: str
    adapters: dict[int, Unpacked]
    """By their indices."""
    largest: dict[str, Shape]
    """By suffix, the shape that they are padded to: with zeros at the end of the first dimension."""

    @classmethod
    def each(cls, adapters: dict[int, Unpacked], names: Sequence[str], suffixes: Sequence[str]) -> list[_Padded]:
        """The modules of these names, which all ``adapters`` have. Hundreds of each: in few steps."""
        places = {index: list(map(own.place, names)) for index, own in adapters.items()}
        largest = {}
        for suffix in suffixes:
            shapes = [adapters[index].joined[suffix].shapes[own] for index, own in places.items()]
            largest[suffix] = np.max(shapes, 0).tolist()
        return [
            cls(name, adapters, {suffix: tuple(shapes[number]) for suffix, shapes in largest.items()})
            for number, name in enumerate(names)
        ]

    @property
    def shared(self) -> dict[str, Tensor]:
        """They share nothing but the file."""
        return {}

    def shapes(self) -> dict[str, Shape]:
        """The shapes of the tensors that each of these adapters is decoded from."""
        return self.largest

    @staticmethod
    def together(modules: Sequence[_Padded], suffix: str, indices: list[int]) -> Tensor:
        """The own tensors [n, m, ...] of the adapters of these indices, of modules that are padded alike."""
        adapters = [modules[0].adapters[index] for index in indices]
        shape = len(indices), len(modules), *modules[0].largest[suffix]
        padded = torch.zeros(shape, dtype=adapters[0].joined[suffix].flat.dtype)
        data, step = padded.view(-1).view(torch.uint8).numpy().data, padded[0, 0].nbytes
        start = 0
        for own in adapters:
            # As bytes: after every copy of a tensor, the threads that read and unpack meanwhile would be waited for.
            memory, begins = own.joined[suffix].memory, own.joined[suffix].begins
            for module in modules:
                place = own.place(module.name)
                begin, end = begins[place], begins[place + 1]
                data[start : start + end - begin] = memory[begin:end]
                start += step
        return padded


class Decoder:
    """`decode` in float64 for many adapters and modules at once; for any thread.

    ``most`` bounds the elements in one batch: in the factors of the originals and of what is decoded, and in what is
    shared, which a product copies for each adapter. ``unpacked`` gives the adapters in a file of several, by default
    `Bundle.unpacked_in`.
    """

    def __init__(self, bundle: Bundle, device: torch.device, most: int, unpacked: UnpackedIn | None = None) -> None:
        self.bundle = bundle
        self.device = device
        self._most = most
        self._unpacked = unpacked or bundle.unpacked_in
        self._shard = lru_cache(_MOST_SHARDS)(self._read_shard)

    def most_adapters(self, adapter: AdapterEntry, parts: Sequence[Part]) -> int:
        """How many adapters like this to decode at a time."""
        if (scheme := packed_scheme(adapter.scheme)) and scheme.pads:
            rank = max(each.rank or 1 for each in self.bundle.packed_in(str(adapter.individual)))
            largest = max(part.parameters + rank * (part.module.d_out + part.module.d_in) for part in parts)
            return max(1, self._most // largest)
        if adapter.cluster is None:
            return 1
        stored = self._stored([adapter], parts)
        of_scheme = self.bundle.scheme(adapter)
        return max(1, self._most // max(_elements(*each, of_scheme) for each in zip(parts, stored, strict=True)))

    def batches(self, adapters: Sequence[AdapterEntry], parts: Sequence[Part]) -> Iterator[tuple[list[int], Factors]]:
        """B̂ [n, m, d_out, k] and Â [n, m, k, d_in] of n adapters in one shard or packed file, or of one alone.

        ``parts`` are the modules that the originals have. Each batch is of m of them, given by position, that have
        equal shapes and ranks, also of the originals. What all n have in common has no dimension for them.
        """
        scheme = self.bundle.scheme(adapters[0])
        stored = self._stored(adapters, parts)
        indices = [self.bundle.index(adapter) for adapter in adapters]
        for columns in self._of_equal_shapes(scheme, parts, stored, len(adapters)):
            own = [stored[column] for column in columns]
            tensors = {suffix: torch.stack([each.shared[suffix] for each in own]) for suffix in scheme.shared}
            tensors |= {suffix: _own(own, suffix, indices) for suffix in scheme.own}
            on_device = {suffix: tensor.to(self.device) for suffix, tensor in tensors.items()}
            yield columns, scheme.decode(on_device, torch.float64)

    def _stored(self, adapters: Sequence[AdapterEntry], parts: Sequence[Part]) -> Sequence[_Stored | _Padded]:
        """What each of ``parts`` is decoded from, of adapters as `batches` takes them."""
        first, names = adapters[0], tuple(part.module.name for part in parts)
        if first.cluster is not None:
            return self._shard(self.bundle.shard(first).adapters[0], names)
        if scheme := packed_scheme(first.scheme):
            found = self._unpacked(str(first.individual))
            own = {index: found[index] for index in map(self.bundle.index, adapters)}
            if scheme.pads:
                return _Padded.each(own, names, scheme.own)
            (index,) = own
            return [_alone(index, own[index][name]) for name in names]
        return [_alone(self.bundle.index(first), self.bundle.own(first, name)) for name in names]

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
        self, scheme: Scheme, parts: Sequence[Part], stored: Sequence[_Stored | _Padded], adapters: int
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


def _own(modules: Sequence[_Stored | _Padded], suffix: str, indices: list[int]) -> Tensor:
    """The own tensors [n, m, ...] of the adapters of these indices."""
    padded = [module for module in modules if isinstance(module, _Padded)]
    if padded:
        return _Padded.together(padded, suffix, indices)
    return torch.stack([module.of(suffix, indices) for module in modules if isinstance(module, _Stored)], 1)


def _alone(index: int, own: dict[str, Tensor]) -> _Stored:
    """A module of the one adapter of this index."""
    return _Stored({}, {suffix: tensor[None] for suffix, tensor in own.items()}, {index: 0})


def _elements(part: Part, stored: _Stored | _Padded, scheme: Scheme) -> int:
    """In the factors of an original, in those that are decoded, and in what is shared."""
    rank = scheme.decoded_rank(stored.shapes().__getitem__)
    decoded = rank * (part.module.d_out + part.module.d_in)
    return part.parameters + decoded + sum(tensor.numel() for tensor in stored.shared.values())


def _taken(stacked: Tensor, rows: list[int]) -> Tensor:
    """Some rows; a view where they follow each other."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return stacked[rows[0] : rows[0] + len(rows)]
    return stacked[rows]
