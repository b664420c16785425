"""Where the tensors of an adapter are: parsed once, and shared by all adapters that are laid out alike."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.safetensors_header import TORCH_DTYPES, HeaderTensor

ALIGNMENT = 64  # bytes; where files and rows begin in the data of an adapter, so that any dtype can be viewed there
FLOATS = ("F32", "F16", "BF16", "F64")
"""Those that factors may have."""


class TensorInfo(NamedTuple):
    """A tensor of an adapter: its dtype as safetensors writes it, and where it is.

    ``file`` is the number of its file among those with tensors, and ``begin`` the first of its bytes in the data of the
    adapter: the tensors of all files one after another, without their headers, each file from a multiple of 64.
    """

    dtype: str
    shape: tuple[int, ...]
    file: int
    begin: int

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * _bits(self.dtype) // 8

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.begin + self.size_bytes


@cache
def _bits(dtype: str) -> int:
    """Of an element; the dtypes of safetensors carry them in their names (BF16, F8_E4M3), BOOL is 8."""
    bits = re.match(r"[A-Z]+(\d+)", dtype)
    return int(bits[1]) if bits else 8


class Cut(NamedTuple):
    """One of E equal parts of the tensor ``source``: r of the rows of A [E·r, d_in], or, ``interleaved``, every E-th
    of the columns of B [d_out, r·E]."""

    source: str
    expert: int
    experts: int
    interleaved: bool

    def all_of(self, source: Tensor) -> Tensor:
        """All parts of the source, [E, …], each in one piece."""
        return self.some_of(source, 0, self.experts)

    def some_of(self, source: Tensor, start: int, stop: int) -> Tensor:
        """The parts from ``start`` to before ``stop``, [stop − start, …], each in one piece; no other is copied."""
        if self.interleaved:
            return deinterleaved(source, self.experts, start, stop)
        return source.reshape(self.experts, -1, source.shape[-1])[start:stop]


class Region(NamedTuple):
    """The bytes of one file in the data of an adapter."""

    begin: int
    size: int

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.begin + self.size


@dataclass(frozen=True, eq=False)
class Layout:
    """The tensors of an adapter by their ordinary names, and what each file contributes to its data.

    ``stored`` has the names in the files of those that are named otherwise there, and ``removed`` says what these have
    too many (`Names`). ``cuts`` has those of the tensors that are parts of others: each is in the place of its
    source, the parts one after another, when interleaved ones are as `deinterleave` brings them. Equal layouts are one
    object.
    """

    tensors: dict[str, TensorInfo]
    regions: tuple[Region, ...]
    stored: dict[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    cuts: dict[str, Cut] = field(default_factory=dict)

    @cached_property
    def interleaved(self) -> list[Cut]:
        """The first part of every tensor whose parts are interleaved."""
        return [cut for cut in self.cuts.values() if cut.interleaved and cut.expert == 0]

    @cached_property
    def interleaved_bytes(self) -> int:
        """The size of these tensors."""
        return sum(self.tensors[cut.source].size_bytes for cut in self.interleaved)

    @property
    def size(self) -> int:
        """Bytes of the data, up to a multiple of 64."""
        return aligned(self.regions[-1].end)


class Names(NamedTuple):
    """``ordinary`` maps the names in files that are not those that tensors go by to these; ``removed`` says, for
    people, what was left out of them."""

    ordinary: dict[str, str]
    removed: tuple[str, ...] = ()


FileTensors = tuple[int, dict[str, HeaderTensor]]
"""The bytes of all tensors of a file, and each by its name."""


def lay_out(files: Iterable[FileTensors], names: Names) -> Layout:
    """The layout of the files of one adapter, whose names differ; ``names`` are the ordinary ones."""
    tensors: dict[str, TensorInfo] = {}
    regions: list[Region] = []
    for number, (size, own) in enumerate(files):
        start = aligned(regions[-1].end) if regions else 0
        regions.append(Region(start, size))
        for name, (dtype, shape, begin) in own.items():
            tensors[names.ordinary.get(name, name)] = TensorInfo(dtype, shape, number, start + begin)
    stored = {ordinary: name for name, ordinary in names.ordinary.items()}
    return Layout(tensors, tuple(regions), stored, names.removed)


def aligned(size: int) -> int:
    """The next multiple of 64."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def deinterleaved(tensor: Tensor, experts: int, start: int = 0, stop: int | None = None) -> Tensor:
    """Every E-th of the columns of [..., d_out, r·E] together: [..., E, d_out, r], in one piece.

    Of the E, those from ``start`` to before ``stop``; only these are copied.
    """
    *lead, d_out, columns = tensor.shape
    some = tensor.reshape(*lead, -1, experts)[..., start:stop]
    return some.mT.contiguous().view(*lead, some.shape[-1], d_out, columns // experts)


def deinterleave(data: Tensor, layout: Layout) -> None:
    """Give the parts of tensors their places in the bytes ``data`` [..., size] of adapters, as they are in the files.

    Memory for the largest of these tensors is needed besides, of all adapters at once.
    """
    for cut in layout.interleaved:
        info = layout.tensors[cut.source]
        parts = deinterleaved(view(data, info), cut.experts)
        data[..., info.begin : info.end].copy_(parts.view(*data.shape[:-1], -1).view(torch.uint8))


def view(data: Tensor, info: TensorInfo) -> Tensor:
    """A tensor within the bytes ``data`` [..., size] of one adapter or several alike: [..., *shape], on their device.

    Without a copy, but for a tensor that does not begin at a multiple of its item size.
    """
    dtype = TORCH_DTYPES[info.dtype]
    own = data[..., info.begin : info.end]
    if own.storage_offset() % dtype.itemsize or any(stride % dtype.itemsize for stride in own.stride()[:-1]):
        own = own.clone(memory_format=torch.contiguous_format)
    return own.view(dtype).view((*data.shape[:-1], *info.shape))  # of a scalar the shape is (), not nothing


class Views:
    """`view` of several tensors of one layout, in one step where it can be done: many small ones take threads long.

    ``infos`` are where they are in the data of an adapter, which has ``size`` bytes.
    """

    def __init__(self, infos: Sequence[TensorInfo], size: int) -> None:
        self._infos = infos
        self._dtype = TORCH_DTYPES[infos[0].dtype]
        item = self._dtype.itemsize
        self._alike = not any(info.dtype != infos[0].dtype or info.begin % item for info in infos) and not size % item
        order = sorted(range(len(infos)), key=lambda place: infos[place].begin)
        ends = [end // item for place in order for end in (infos[place].begin, infos[place].end)]
        # Every second piece is what lies between two of them.
        self._pieces = [stop - start for start, stop in pairwise([0, *ends, size // item])]
        self._where = [0] * len(infos)
        for piece, place in enumerate(order):
            self._where[place] = 2 * piece + 1

    def of(self, data: Tensor) -> list[Tensor]:
        """Of k adapters with this ``data`` [k, size]: each as rows [k, elements]."""
        item = self._dtype.itemsize
        if not self._alike or data.storage_offset() % item or data.stride(0) % item:
            return [view(data, info).flatten(1) for info in self._infos]
        pieces = data.view(self._dtype).split_with_sizes(self._pieces, 1)
        return [pieces[piece] for piece in self._where]
