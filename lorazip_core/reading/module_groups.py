"""One adapter by itself: its modules, those of one shape stacked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter.layout import Layout, Views
from ..adapter.module import Part
from ..adapter.reader import Adapter
from ..maths.factored import Factors
from ..maths.weighting import InputMoments
from ..schemes.scheme import ModuleGroup
from .scan import Scan

InputsOf = Callable[[tuple[str, ...], torch.device], InputMoments]
"""The second moments of the inputs of modules, by name, on a device."""


class ModuleGroups:
    """The adapters of a collection that was scanned, one at a time, on ``device``; for any thread.

    What stayed on the device is not read again.
    """

    def __init__(self, scanned: Scan, device: torch.device, inputs_of: InputsOf | None = None) -> None:
        self._adapters = scanned.collection.adapters
        self._device = device
        self._inputs_of = inputs_of
        self._resident = scanned.resident_rows() if device == scanned.device else None
        self._kinds: dict[object, _Kind] = {}
        for adapter in self._adapters:
            if _kind_of(adapter) not in self._kinds:
                self._kinds[_kind_of(adapter)] = _Kind.of(adapter, device)

    def of(self, number: int) -> list[ModuleGroup]:
        """The modules of one adapter, those together that can be."""
        adapter = self._adapters[number]
        kind = self._kinds[_kind_of(adapter)]
        data = kind.read(adapter) if self._resident is None else self._resident[number]
        tensors = None if data is None else kind.views.of(data.to(self._device))
        groups = []
        for own in kind.groups:
            b, a = _stacked(adapter, own.names) if tensors is None else own.cut(tensors)
            inputs = None if self._inputs_of is None else self._inputs_of(tuple(own.names), self._device)
            groups.append(ModuleGroup(own.names, b, a, own.scales, self._device, inputs))
        return groups


def _kind_of(adapter: Adapter) -> object:
    """Adapters that are alike share these objects."""
    return id(adapter.parts), adapter.layout


def _stacked(adapter: Adapter, names: Sequence[str]) -> Factors:
    b, a = (torch.stack(side) for side in zip(*adapter.each_stored(names), strict=True))
    return b, a


class _Group(NamedTuple):
    """Modules of equal shapes, ranks and dtypes."""

    names: list[str]
    first: Part
    b: list[int]
    """The place of B of each among the tensors of its kind."""
    a: list[int]
    scales: Tensor

    def cut(self, tensors: Sequence[Tensor]) -> Factors:
        """Their factors, from those of all modules."""
        b, a = (torch.cat([tensors[place] for place in places]) for places in (self.b, self.a))
        rank = self.first.rank
        return b.view(-1, self.first.module.d_out, rank), a.view(-1, rank, self.first.module.d_in)


class _Kind(NamedTuple):
    """What adapters of one layout with the same modules and scales have in common."""

    groups: list[_Group]
    views: Views
    """Of all factors."""
    runs: list[list[str]] | None
    """The factors that follow each other in every file; None where they have to be read one by one."""
    layout: Layout

    @classmethod
    def of(cls, adapter: Adapter, device: torch.device) -> _Kind:
        layout = adapter.layout
        groups: defaultdict[object, list[Part]] = defaultdict(list)
        for part in adapter.parts.values():
            dtypes = tuple(layout.tensors[key].dtype for key in (part.key_b, part.key_a))
            groups[part.module.d_out, part.module.d_in, part.rank, dtypes].append(part)
        places = {key: place for place, key in enumerate(_keys(adapter))}
        found = [
            _Group(
                [part.module.name for part in parts],
                parts[0],
                [places[part.key_b] for part in parts],
                [places[part.key_a] for part in parts],
                torch.tensor([part.scale for part in parts], dtype=torch.float64, device=device),
            )
            for parts in groups.values()
        ]
        views = Views([layout.tensors[key] for key in places], layout.size)
        return cls(found, views, _runs(adapter), layout)

    def read(self, adapter: Adapter) -> Tensor | None:
        """The data of an adapter [1, size], of which its factors have been read: hundreds of small reads take long.

        None where factors are pickled, parts of other tensors, or not beside each other in their files.
        """
        if self.runs is None or any(weight.header is None for weight in adapter.weights):
            return None
        tensors = self.layout.tensors
        data = torch.empty(1, self.layout.size, dtype=torch.uint8)
        for run in self.runs:
            adapter.read_into(run, data[0, tensors[run[0]].begin : tensors[run[-1]].end].numpy().data)
        return data


def _keys(adapter: Adapter) -> list[str]:
    return [key for part in adapter.parts.values() for key in (part.key_b, part.key_a)]


def _runs(adapter: Adapter) -> list[list[str]] | None:
    """The factors that follow each other; None if they are scattered in any file, or parts of other tensors."""
    tensors = adapter.layout.tensors
    keys = sorted(_keys(adapter), key=lambda key: tensors[key].begin)
    if not adapter.layout.cuts.keys().isdisjoint(keys):
        return None
    runs: list[list[str]] = []
    for key in keys:
        last = tensors[runs[-1][-1]] if runs else None
        if last is not None and (last.file, last.end) == (tensors[key].file, tensors[key].begin):
            runs[-1].append(key)
        else:
            runs.append([key])
    return runs if len(runs) <= len(adapter.weights) else None
