"""‖ΔW‖² of every module in float64, and what is wrong with updates that have none."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..adapter.layout import view
from ..adapter.module import Part
from ..adapter.reader import Adapter
from ..base.errors import AdapterError
from ..base.safetensors_header import TORCH_DTYPES
from ..maths.factored import squared_norm, squared_norm_and_singular_values
from .blocks import Stored
from .groups import LayoutGroup

TensorOf = Callable[[str], Tensor]

_AT_ONCE = 2**20  # elements in the factors of one batch of modules: 8 MiB in float64, of which caches hold a good part
_ROWS = 64  # adapters in one batch on a device, where there is room for
_AT_ONCE_ON_DEVICE = 2**26
_LARGEST = torch.finfo(torch.float32).max ** 2
_EXTRAS_AT_ONCE = 2**26  # elements of extras that are looked at in one go


def norms_of_adapter(parts: Mapping[str, Part], stored: Stored, singular: Tensor | None = None) -> list[float]:
    """‖ΔW‖² of every module of one adapter, in order, computed in batches of equal shape.

    With ``singular`` [Σ r] also singular values go in there, those of one module after another, descending.
    """
    of = list(parts.values())
    norms = torch.zeros(len(of), dtype=torch.float64)
    begins = _begins(of)
    for same_shape in _batches(parts).values():
        step = max(1, _AT_ONCE // of[same_shape[0]].parameters)
        for columns in (same_shape[start : start + step] for start in range(0, len(same_shape), step)):
            (b,), (a,) = stored(columns)
            scales = torch.tensor([of[column].scale for column in columns], dtype=torch.float64)
            if singular is None:
                found = squared_norm(b, a)
            else:
                found, s = squared_norm_and_singular_values(b, a)
                places = torch.tensor([begins[column] for column in columns])[:, None] + torch.arange(s.shape[-1])
                singular[places] = s * scales.abs()[:, None]
            norms[columns] = _scaled(found, scales)
    all_of: list[float] = norms.tolist()
    return all_of


def norms_of_rows(data: Tensor, group: LayoutGroup, rows: slice, singular: Tensor | None = None) -> Tensor:
    """‖ΔW‖² [k, p] of adapters of one layout, from their bytes ``data`` [k, size]; ``rows`` are theirs in the group.

    With ``singular`` [k, Σ r] also singular values go in there, as of `norms_of_adapter`. Every product is over the
    same number of adapters, be there fewer or not: how a collection is cut into blocks must not show in the last digit.
    """
    scales = torch.from_numpy(group.scales[rows]).to(data.device)
    norms = torch.empty_like(scales)
    tensors = group.layout.tensors
    begins = _begins(group.parts)
    for column, part in enumerate(group.parts):
        shape_b, shape_a = (part.module.d_out, part.rank), (part.rank, part.module.d_in)
        step = max(1, min(_ROWS, _AT_ONCE_ON_DEVICE // part.parameters))
        own_b, own_a = view(data, tensors[part.key_b]), view(data, tensors[part.key_a])
        b, a = own_b.new_zeros(step, *shape_b), own_a.new_zeros(step, *shape_a)
        for start in range(0, len(data), step):
            count = min(step, len(data) - start)
            some = slice(start, start + count)
            b[:count], a[:count] = own_b[some].reshape(count, *shape_b), own_a[some].reshape(count, *shape_a)
            if singular is None:
                norms[some, column] = squared_norm(b, a)[:count]
            else:
                found, s = squared_norm_and_singular_values(b, a)
                norms[some, column] = found[:count]
                of_part = slice(begins[column], begins[column] + part.rank)
                singular[some, of_part] = s[:count] * scales[some, column, None].abs()
    return _scaled(norms, scales)


def _begins(parts: Sequence[Part]) -> list[int]:
    """Where the singular values of each module begin, if they follow each other."""
    return list(accumulate((part.rank for part in parts), initial=0))


def _scaled(norms: Tensor, scales: Tensor) -> Tensor:
    """‖s B A‖² for ‖B A‖² and s; infinite for an update that float32 cannot hold, in which no model could use it."""
    scaled = norms * scales.square()
    return scaled.masked_fill_(scaled > _LARGEST, torch.inf)


def finite_extras(data: Tensor, group: LayoutGroup, keys: list[str]) -> Tensor:
    """Whether all extras of floating point are finite [k], from the bytes ``data`` [k, size] of a group's adapters."""
    finite = torch.ones(len(data), dtype=torch.bool, device=data.device)
    for key in keys:
        info = group.layout.tensors[key]
        if TORCH_DTYPES[info.dtype].is_floating_point:
            own = view(data, info)
            step = max(1, _EXTRAS_AT_ONCE // max(1, math.prod(info.shape)))
            for start in range(0, len(data), step):
                some = own[start : start + step].reshape(len(own[start : start + step]), -1)
                finite[start : start + step] &= some.float().isfinite().all(1)
    return finite


def check(adapter: Adapter, norms: list[float], tensor_of: TensorOf) -> None:
    """Raise AdapterError for the first module without a finite norm, naming the tensor, and for extras with NaN."""
    if not all(map(math.isfinite, norms)):
        parts = list(adapter.parts.values())
        for columns in _batches(adapter.parts).values():
            bad = [column for column in columns if not math.isfinite(norms[column])]
            if bad:
                for column in columns:
                    for key in (parts[column].key_a, parts[column].key_b):
                        _check_finite(adapter, key, tensor_of)
                reason = f"module {parts[bad[0]].module.name}: its update overflows float32"
                raise AdapterError(adapter.name, reason, "its training diverged")
    for key in adapter.extras:
        _check_finite(adapter, key, tensor_of)


def tensors_of(adapter: Adapter, data: Tensor) -> TensorOf:
    """The tensors of an adapter, by name, from its bytes ``data`` [size]."""

    def tensor_of(key: str) -> Tensor:
        return view(data, adapter.layout.tensors[key])

    return tensor_of


def _batches(parts: Mapping[str, Part]) -> dict[tuple[int, int, int], list[int]]:
    """The columns of the modules of equal shape and rank together."""
    batches: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
    for column, part in enumerate(parts.values()):
        batches[part.module.d_out, part.module.d_in, part.rank].append(column)
    return batches


def _check_finite(adapter: Adapter, key: str, tensor_of: TensorOf) -> None:
    tensor = tensor_of(key)
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise AdapterError(adapter.name, f"tensor {key} has NaN or Inf", "its training diverged; leave it out")
