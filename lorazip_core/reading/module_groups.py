"""One adapter by itself: its modules, those of one shape stacked."""

from __future__ import annotations

from collections import defaultdict

import torch

from ..adapter.reader import Adapter
from ..schemes.scheme import ModuleGroup


def module_groups(adapter: Adapter, device: torch.device) -> list[ModuleGroup]:
    """The modules of an adapter, those together that can be."""
    names: defaultdict[object, list[str]] = defaultdict(list)
    for name, part in adapter.parts.items():
        dtypes = tuple(adapter.layout.tensors[key].dtype for key in (part.key_b, part.key_a))
        names[part.module.d_out, part.module.d_in, part.rank, dtypes].append(name)
    return [_group(adapter, group, device) for group in names.values()]


def _group(adapter: Adapter, names: list[str], device: torch.device) -> ModuleGroup:
    b, a = (torch.stack(side) for side in zip(*adapter.each_stored(names), strict=True))
    scales = torch.tensor([adapter.parts[name].scale for name in names], dtype=torch.float64)
    return ModuleGroup(names, b, a, scales, device)
