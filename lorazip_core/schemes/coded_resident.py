"""What a device holds of scheme `coded`: the stored codes, each vector at a fixed width, see `fixed_width`.

Of a module, for n adapters that have Σk components together:

- ``starts`` [n + 1] of int32: the components of the adapter at place i are those from starts[i] to starts[i + 1];
- ``at`` [Σk] of int32: where in ``codes`` the û of a component begins; its v̂ follows;
- ``forms`` [Σk, 2] of uint8: the forms of û and v̂;
- ``scale`` [Σk] of int16, as in the file;
- ``codes`` of uint8, with one byte after the last vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.errors import LocalError
from .coded_file import Arrays
from .factors import START_BYTES
from .fixed_width import forms_of, pack, packed_bytes, unpack
from .scheme import Size

if TYPE_CHECKING:
    from torch import Tensor

COMPONENT_BYTES = 4 + 2 + 2
"""Of a component in ``at``, ``forms`` and ``scale``."""
_MOST_BYTES = 2**31


class CodedModule(NamedTuple):
    """The k components of a module of one adapter."""

    u: NDArray[np.int8]
    """[k, d_out]"""
    v: NDArray[np.int8]
    """[k, d_in]"""
    scale: NDArray[np.int16]
    """[k]"""


def lay_out(adapters: Sequence[CodedModule]) -> Arrays:
    """One module of some adapters. Raises LocalError for 2 GiB of codes or more."""
    of_each = [_forms(module) for module in adapters]
    forms = np.concatenate(of_each)
    sizes = np.concatenate([_sizes(module, own) for module, own in zip(adapters, of_each, strict=True)])
    ends = np.cumsum(sizes)
    if len(ends) and ends[-1] >= _MOST_BYTES:
        raise LocalError(f"the codes of one module take {ends[-1]:,} bytes on a device: at most 2 GiB can be held")
    pairs = (pair for module in adapters for pair in zip(module.u, module.v, strict=True))
    packed = [
        pack(vector, form)
        for vectors, own in zip(pairs, forms.tolist(), strict=True)
        for vector, form in zip(vectors, own, strict=True)
    ]
    return {
        "starts": np.cumsum([0, *(len(module.scale) for module in adapters)], dtype=np.int32),
        "at": (ends - sizes).astype(np.int32),
        "forms": forms,
        "scale": np.concatenate([module.scale for module in adapters]),
        "codes": np.concatenate([*packed, np.zeros(1, np.uint8)]),
    }


def module_bytes(module: CodedModule) -> int:
    """What one more adapter with this module adds to `lay_out`."""
    return START_BYTES + len(module.scale) * COMPONENT_BYTES + int(_sizes(module, _forms(module)).sum())


def components(resident: Mapping[str, Tensor], size: Size, place: int) -> dict[str, Tensor]:
    """The û, v̂ and scales of the adapter at ``place``, as they are stored, on the device."""
    start, end = resident["starts"][place : place + 2].tolist()
    at, forms = resident["at"][start:end], resident["forms"][start:end].int()
    after_u = at + packed_bytes(forms[:, 0], size.d_out)
    return {
        "u": unpack(resident["codes"], at, forms[:, 0], size.d_out),
        "v": unpack(resident["codes"], after_u, forms[:, 1], size.d_in),
        "scale": resident["scale"][start:end],
    }


def _forms(module: CodedModule) -> NDArray[np.uint8]:
    """[k, 2]: of û and v̂."""
    return np.stack([forms_of(module.u), forms_of(module.v)], 1)


def _sizes(module: CodedModule, forms: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[k]: the bytes of û and v̂ of every component."""
    of_u, of_v = forms.T.astype(np.int64)
    return packed_bytes(of_u, module.u.shape[1]) + packed_bytes(of_v, module.v.shape[1])
