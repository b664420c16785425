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
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.errors import LocalError
from .coded_file import Arrays
from .factors import START_BYTES
from .fixed_width import forms_of, pack_all, packed_bytes, unpack
from .scheme import Size

if TYPE_CHECKING:
    from torch import Tensor

    from .joined import Joined

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
    sides = [np.concatenate(side) for side in zip(*((module.u, module.v) for module in adapters), strict=True)]
    forms = np.stack([forms_of(side) for side in sides], 1)
    ends = np.cumsum(_sizes(forms, Size(*(side.shape[1] for side in sides))))
    if len(ends) and ends[-1] >= _MOST_BYTES:
        raise LocalError(f"the codes of one module take {ends[-1]:,} bytes on a device: at most 2 GiB can be held")
    packed = [_packed(side, own) for side, own in zip(sides, forms.T, strict=True)]
    return {
        "starts": np.cumsum([0, *(len(module.scale) for module in adapters)], dtype=np.int32),
        "at": np.concatenate([np.zeros(1, np.int32), ends.astype(np.int32)])[:-1],
        "forms": forms,
        "scale": np.concatenate([module.scale for module in adapters]),
        "codes": np.concatenate([*chain.from_iterable(zip(*packed, strict=True)), np.zeros(1, np.uint8)]),
    }


def own_bytes(starts: NDArray[np.int32], forms: NDArray[np.uint8], size: Size) -> NDArray[np.int64]:
    """[n]: what every adapter adds to `lay_out`, which gave these ``starts`` and ``forms``."""
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(_sizes(forms, size) + COMPONENT_BYTES)])
    return START_BYTES + np.diff(ends[starts])


def joined_bytes(u: Joined, v: Joined) -> int:
    """What an adapter adds to `lay_out` of all its modules, whose components are these: `own_bytes` of it, sooner."""
    total = START_BYTES * len(u.shapes) + COMPONENT_BYTES * int(u.shapes[:, 0].sum())
    for side in (u, v):
        lengths = side.shapes[:, 1]
        for length in np.unique(lengths).tolist():
            alike = [side.pieces[place].numpy() for place in np.flatnonzero(lengths == length).tolist()]
            forms = forms_of(np.concatenate(alike).reshape(-1, length))
            total += int(packed_bytes(forms.astype(np.int64), length).sum())
    return total


def components(resident: Mapping[str, Tensor], size: Size, rows: Tensor) -> dict[str, Tensor]:
    """The û, v̂ and scales of the components in ``rows`` [K], as they are stored, on the device."""
    at, forms = resident["at"][rows], resident["forms"][rows].int()
    after_u = at + packed_bytes(forms[:, 0], size.d_out)
    return {
        "u": unpack(resident["codes"], at, forms[:, 0], size.d_out),
        "v": unpack(resident["codes"], after_u, forms[:, 1], size.d_in),
        "scale": resident["scale"][rows],
    }


def _packed(vectors: NDArray[np.int8], forms: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Each of the vectors [k, length] as bytes."""
    found = dict[int, NDArray[np.uint8]]()
    for some, packed in pack_all(vectors, forms):
        found.update(zip(some.tolist(), packed, strict=True))
    return [found[place] for place in range(len(forms))]


def _sizes(forms: NDArray[np.uint8], size: Size) -> NDArray[np.int64]:
    """[k]: the bytes of û and v̂ of every component."""
    of_u, of_v = forms.T.astype(np.int64)
    return packed_bytes(of_u, size.d_out) + packed_bytes(of_v, size.d_in)
