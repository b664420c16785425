"""All adapters of a bundle on a device, laid out for kernels; adapters come and go while it is in use.

An adapter has a number as long as it is held. `batch` turns the numbers that the tokens of a batch have into what the
operators need, and `calls` are the operators of a layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..base.errors import LocalError
from ..base.stopping import check_stop
from ..base.threads import in_order
from ..bundle.manifest import AdapterEntry, ModuleEntry
from ..bundle.reader import Bundle
from ..bundle.stored import check_unpacked, stored, stored_shared, stored_stacked
from ..schemes.bases import BasesScheme
from ..schemes.registry import packed_scheme
from ..schemes.scheme import IndividualScheme, Size
from . import operators as operators  # which defines them
from .cores import CoreTable
from .layers import Layer
from .terms import AdapterTerms, PackedTerms, TermsTable, pack_terms
from .tiles import Grouped, batch, most_ints

NONE = -1
"""Instead of a number: no adapter."""
_LOADERS = 4  # threads that read, unpack and pack: with more, they wait for the interpreter, and loading takes longer


class Call(NamedTuple):
    """An operator of a layer, but for y, x and the batch."""

    operator: str
    tensors: tuple[Tensor, ...]
    numbers: tuple[int | list[int], ...]

    def __call__(self, y: Tensor, x: Tensor, batch: Tensor) -> None:
        getattr(torch.ops.lorazip, self.operator)(y, x, batch, *self.tensors, *self.numbers)


class AdapterStore:
    """Tables on a device, and which adapter is where in them."""

    def __init__(
        self,
        bundle: Bundle,
        layers: Sequence[Layer],
        *,
        device: torch.device,
        dtype: torch.dtype,
        spare: int = 0,
    ) -> None:
        """``dtype`` is that of the engine, to which bases and cores are rounded.

        There is room for ``spare`` adapters more, on bases that are there or on none.

        Raises as `stored`, and LocalError for a scheme that has no kernels.
        """
        self.layers = list(layers)
        self._modules = {
            each.module: number for number, each in enumerate(slice_ for layer in layers for slice_ in layer.slices)
        }
        adapters = bundle.manifest.adapters
        entries = {module.name: module for module in bundle.manifest.modules}
        self._sizes = [Size(entries[module].d_out, entries[module].d_in) for module in self._modules]
        self._based: dict[int, set[str]] = {}
        """By cluster, the modules that its bases are of."""
        self._bases = [bundle.origin(cluster.basis) for cluster in bundle.manifest.clusters]
        of_kind: defaultdict[str, list[AdapterEntry]] = defaultdict(list)
        for adapter in adapters:
            of_kind[_kind(bundle, adapter)].append(adapter)
        if spare:
            of_kind.setdefault("terms", [])
        self.kinds = list(of_kind)
        count = len(adapters) + spare
        self._kind_of: NDArray[np.int32] = np.full(count, NONE, np.int32)
        self._group_of, self._place_of = self._kind_of.copy(), self._kind_of.copy()
        self._numbers: dict[str, int] = {}
        self._free = list(range(count))[::-1]
        self._tables: list[TermsTable | CoreTable] = []
        for kind, members in of_kind.items():
            table: TermsTable | CoreTable
            if kind == "terms":
                table = self._terms_table(bundle, members, device, spare)
            else:
                table = self._core_table(bundle, members, device, dtype, spare, diagonal=kind == "diagonal")
            self._tables.append(table)

    @property
    def numbers(self) -> Mapping[str, int]:
        """The number of every adapter that was there from the start."""
        return self._numbers

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.nbytes for table in self._tables)

    def add(self, bundle: Bundle, adapter: AdapterEntry) -> int:
        """Hold one more adapter, of this bundle. Raises LocalError where it does not fit, and as `stored`."""
        for module in bundle.modules(adapter):
            number = self._modules.get(module.name)
            if number is None or self._sizes[number] != Size(module.d_out, module.d_in):
                raise LocalError(
                    f"module {module.name} [{module.d_out}, {module.d_in}] of adapter {adapter.name} is none of those "
                    "that are served",
                    "start the server with this bundle",
                )
        kind = _kind(bundle, adapter)
        if kind not in self.kinds:
            raise LocalError(
                f"no room was made for adapters like {adapter.name}, of scheme {adapter.scheme}",
                "start the server with this bundle",
            )
        if not self._free:
            raise LocalError(f"no room for adapter {adapter.name}", "remove others, or start the server with more room")
        table = self._tables[self.kinds.index(kind)]
        if isinstance(table, TermsTable):
            place = table.add(self._packed(bundle, [adapter])[0])
            group = place
        else:
            group = self._cluster(bundle, adapter, table)
            place = table.add({module.name: own["core"] for module, own in _stored(bundle, adapter)})
        return self._enter(self.kinds.index(kind), group, place)

    def remove(self, number: int) -> None:
        """Let go of an adapter, which no token of a batch to come may have."""
        self._tables[self._kind_of[number]].remove(int(self._place_of[number]))
        self._kind_of[number] = NONE
        self._free.append(number)

    def batch(self, numbers: NDArray[np.int32]) -> NDArray[np.int32]:
        """What the operators need of a batch whose tokens have the adapters with these numbers [t], or `NONE`."""
        known = np.maximum(numbers, 0)
        kinds = np.where(numbers >= 0, self._kind_of[known], NONE)
        groups, places = self._group_of[known], self._place_of[known]
        return batch(
            [
                Grouped(np.where(kinds == kind, groups, NONE), places, table.tile)
                for kind, table in enumerate(self._tables)
            ]
        )

    def most_ints(self, tokens: int) -> int:
        """How long `batch` can be, for so many tokens."""
        return most_ints(tokens, len(self._tables))

    def calls(self, layer: int) -> list[Call]:
        """The operators of a layer, one for each kind of adapter there is. Their tensors stay where they are."""
        slices = self.layers[layer].slices
        columns, widths = [each.column for each in slices], [len(each.out) for each in slices]
        first = self._modules[slices[0].module]
        found = []
        for kind, table in enumerate(self._tables):
            if isinstance(table, TermsTable):
                tensors: tuple[Tensor, ...] = (
                    table.index[first : first + len(slices)], table.at, table.forms, table.scale, table.data,
                )  # fmt: skip
                starts = [each.out.start for each in slices]
                numbers: tuple[int | list[int], ...] = (
                    kind, self._groups(table), table.most, columns, widths, starts, slices[0].taken.start,
                )  # fmt: skip
                found.append(Call("add_terms", tensors, numbers))
            else:
                tensors = (table.u[layer], table.v[layer], table.core[layer])
                found.append(Call("add_cores", tensors, (kind, self._groups(table), columns, widths)))
        return found

    def _groups(self, table: TermsTable | CoreTable) -> int:
        """How many groups of tokens there can be."""
        return int(table.index.shape[1]) if isinstance(table, TermsTable) else len(table.clusters)

    def _enter(self, kind: int, group: int, place: int) -> int:
        number = self._free.pop()
        self._kind_of[number], self._group_of[number], self._place_of[number] = kind, group, place
        return number

    def _terms_table(self, bundle: Bundle, members: list[AdapterEntry], device: torch.device, spare: int) -> TermsTable:
        """Files are read, unpacked and packed by several threads."""
        by_file: defaultdict[str, list[AdapterEntry]] = defaultdict(list)
        for adapter in members:
            by_file[str(adapter.individual)].append(adapter)
        packed = in_order(partial(self._packed, bundle), by_file.values(), torch.device("cpu"), workers=_LOADERS)
        with closing(packed) as files:
            table = TermsTable(chain.from_iterable(files), self._sizes, device, spare)
        for row, adapter in enumerate(chain.from_iterable(by_file.values())):
            self._numbers[adapter.name] = self._enter(len(self._tables), row, row)
        return table

    def _packed(self, bundle: Bundle, adapters: list[AdapterEntry]) -> list[PackedTerms]:
        """Adapters of one file."""
        check_stop()
        scheme = packed_scheme(adapters[0].scheme)
        if scheme is None:
            return pack_terms([self._terms(bundle, adapter) for adapter in adapters])
        of_file = bundle.unpacked_in(str(adapters[0].individual))
        unpacked = {index: of_file[index] for index in map(bundle.index, adapters)}
        check_unpacked(bundle, unpacked)
        numbers = [
            np.array([self._modules.get(module.name, NONE) for module in bundle.modules(adapter)], np.int64)
            for adapter in adapters
        ]
        terms = [scheme.joined_terms(each.joined) for each in unpacked.values()]
        return pack_terms([AdapterTerms.of_joined(*each) for each in zip(numbers, terms, strict=True)])

    def _terms(self, bundle: Bundle, adapter: AdapterEntry) -> AdapterTerms:
        scheme = bundle.scheme(adapter)
        assert isinstance(scheme, IndividualScheme)
        modules = {}
        for module, own in _stored(bundle, adapter):
            check_stop()
            if (number := self._modules.get(module.name)) is not None:
                modules[number] = scheme.terms(own)
        return AdapterTerms.of_modules(modules)

    def _core_table(
        self,
        bundle: Bundle,
        members: list[AdapterEntry],
        device: torch.device,
        dtype: torch.dtype,
        spare: int,
        *,
        diagonal: bool,
    ) -> CoreTable:
        """Cores are read by the shard: those of all its adapters at once."""
        manifest, modules = bundle.manifest, {module.name: module for module in bundle.manifest.modules}
        numbers = sorted({adapter.cluster for adapter in members if adapter.cluster is not None})
        clusters = {number: manifest.clusters[number] for number in numbers}
        bundle.check_files(
            path for of in clusters.values() for path in (of.basis, *(shard.path for shard in of.shards))
        )
        bases: dict[int, dict[str, dict[str, Tensor]]] = {}
        for number, cluster in clusters.items():
            sets = {manifest.adapters[index].module_set for shard in cluster.shards for index in shard.adapters}
            had = sorted({module for each in sets for module in manifest.module_sets[each]})
            of_cluster = [manifest.modules[each] for each in had]
            bases[number] = {module.name: stored_shared(bundle, cluster, module) for module in of_cluster}
        self._based |= {number: set(of_cluster) for number, of_cluster in bases.items()}
        table = CoreTable(self.layers, bases, len(members) + spare, diagonal=diagonal, device=device, dtype=dtype)
        for number, cluster in clusters.items():
            for shard in cluster.shards:
                places = {index: table.take() for index in shard.adapters}
                for index, place in places.items():
                    name = manifest.adapters[index].name
                    self._numbers[name] = self._enter(len(self._tables), table.clusters[number], place)
                for name, shared in bases[number].items():
                    check_stop()
                    if rows := bundle.rows(shard, name):
                        own = stored_stacked(bundle, cluster, shard, modules[name], shared)
                        table.fill(name, [places[index] for index in rows], own["core"])
        return table

    def _cluster(self, bundle: Bundle, adapter: AdapterEntry, table: CoreTable) -> int:
        """The group of a cluster that is held, with the very same bases, or more modules of them."""
        assert adapter.cluster is not None
        wanted = bundle.origin(bundle.manifest.clusters[adapter.cluster].basis)
        for cluster, number in table.clusters.items():
            if self._bases[cluster] == wanted and self._based[cluster] >= {
                each.name for each in bundle.modules(adapter)
            }:
                return number
        raise LocalError(f"adapter {adapter.name} is on bases that are not held", "start the server with this bundle")


def _kind(bundle: Bundle, adapter: AdapterEntry) -> str:
    scheme = bundle.scheme(adapter)
    if isinstance(scheme, IndividualScheme):
        return "terms"
    if not isinstance(scheme, BasesScheme):
        raise LocalError(f"adapter {adapter.name}: there are no kernels for scheme {scheme.name}")
    return "diagonal" if scheme.is_diagonal else "full"


def _stored(bundle: Bundle, adapter: AdapterEntry) -> Iterator[tuple[ModuleEntry, dict[str, Tensor]]]:
    for module in bundle.modules(adapter):
        yield module, stored(bundle, adapter, module)
