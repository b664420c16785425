"""One adapter by itself: its modules, those of one shape stacked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..adapter.layout import TensorInfo, views
from ..adapter.module import Part
from ..adapter.reader import Adapter
from ..maths.factored import Factors
from ..maths.weighting import InputMoments
from ..schemes.scheme import ModuleGroup

InputsOf = Callable[[tuple[str, ...], torch.device], InputMoments]
"""The second moments of the inputs of modules, by name, on a device."""


def module_groups(adapter: Adapter, device: torch.device, inputs_of: InputsOf | None = None) -> list[ModuleGroup]:
    """The modules of an adapter, those together that can be."""
    groups: defaultdict[object, list[str]] = defaultdict(list)
    for name, part in adapter.parts.items():
        dtypes = tuple(adapter.layout.tensors[key].dtype for key in (part.key_b, part.key_a))
        groups[part.module.d_out, part.module.d_in, part.rank, dtypes].append(name)
    data = _read_at_once(adapter)
    return [_group(adapter, names, data, device, inputs_of) for names in groups.values()]


def _group(
    adapter: Adapter, names: list[str], data: Tensor | None, device: torch.device, inputs_of: InputsOf | None
) -> ModuleGroup:
    parts = [adapter.parts[name] for name in names]
    b, a = _stacked(adapter, names) if data is None else _cut(data, adapter, parts)
    scales = torch.tensor([part.scale for part in parts], dtype=torch.float64)
    inputs = None if inputs_of is None else inputs_of(tuple(names), device)
    return ModuleGroup(names, b, a, scales, device, inputs)


def _stacked(adapter: Adapter, names: Sequence[str]) -> Factors:
    b, a = (torch.stack(side) for side in zip(*adapter.each_stored(names), strict=True))
    return b, a


def _cut(data: Tensor, adapter: Adapter, parts: Sequence[Part]) -> Factors:
    first, tensors = parts[0], adapter.layout.tensors
    b, a = (
        torch.cat(views(data, [tensors[key] for key in keys]))
        for keys in ([part.key_b for part in parts], [part.key_a for part in parts])
    )
    return b.view(-1, first.module.d_out, first.rank), a.view(-1, first.rank, first.module.d_in)


def _read_at_once(adapter: Adapter) -> Tensor | None:
    """The data of an adapter [1, size], of which its factors have been read: hundreds of small reads take long.

    None where factors are pickled, parts of other tensors, or not beside each other in their files.
    """
    layout = adapter.layout
    keys = [key for part in adapter.parts.values() for key in (part.key_b, part.key_a)]
    if any(weight.header is None for weight in adapter.weights) or not layout.cuts.keys().isdisjoint(keys):
        return None
    keys.sort(key=lambda key: layout.tensors[key].begin)
    runs: list[list[str]] = []
    last: TensorInfo | None = None
    for key in keys:
        info = layout.tensors[key]
        if last is not None and (last.file, last.end) == (info.file, info.begin):
            runs[-1].append(key)
        else:
            runs.append([key])
        last = info
    if len(runs) > len(adapter.weights):
        return None
    data = torch.empty(1, layout.size, dtype=torch.uint8)
    for run in runs:
        begin, end = layout.tensors[run[0]].begin, layout.tensors[run[-1]].end
        adapter.read_into(run, data[0, begin:end].numpy().data)
    return data
