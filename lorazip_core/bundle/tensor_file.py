"""safetensors files written tensor by tensor and read row by row, so that no file has to fit into memory.

The bytes are those of ``safetensors.torch.save_file``: a header that lists the tensors by falling alignment of their
dtype and then by name, and the tensors in that order.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.errors import LocalError
from ..base.safetensors_header import SAFETENSORS_DTYPES, TORCH_DTYPES, parse_header, read_header

DTYPES = {code.lower(): TORCH_DTYPES[code] for code in ("BF16", "F16", "F32")}
"""What a bundle can store, by the names in its manifest."""

_ORDER = {dtype: number for number, dtype in enumerate(SAFETENSORS_DTYPES)}
_ALIGNMENT = 8
_TOGETHER = 2**25  # bytes


class TensorLayout(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def layout_of(tensor: Tensor) -> TensorLayout:
    return TensorLayout(tensor.dtype, tuple(tensor.shape))


class TensorFileWriter:
    """A safetensors file whose tensors are appended one after another, in ``order``, and hashed as they are written.

    ``size_bytes`` and ``sha256`` are those of the whole file once the block has ended. ``metadata`` may have one key:
    safetensors writes two or more in an order that changes from run to run. Raises LocalError for a dtype that
    safetensors does not have, ValueError for tensors that are not those of ``layouts``.
    """

    def __init__(
        self, path: Path, layouts: Mapping[str, TensorLayout], *, metadata: Mapping[str, str] | None = None
    ) -> None:
        for name, layout in layouts.items():
            if layout.dtype not in SAFETENSORS_DTYPES:
                raise LocalError(f"{path}: tensor {name}: safetensors has no {layout.dtype}", "leave the adapter out")
        self.order = sorted(layouts, key=lambda name: (-_ORDER[layouts[name].dtype], name))
        self._number = {name: number for number, name in enumerate(self.order)}
        self.size_bytes = 0
        self.sha256 = ""
        self._layouts = layouts
        self._digest = hashlib.sha256()
        self._at, self._missing = -1, 0  # the tensor being written, and how many of its bytes are still to come
        self._path = path
        header = _header(layouts, self.order, metadata or {})
        self._file = path.open("wb")
        self._write(struct.pack("<Q", len(header)) + header)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._pass_to(len(self.order))
        finally:
            self._file.close()
        self.sha256 = self._digest.hexdigest()

    def append(self, name: str, tensor: Tensor) -> None:
        """The next tensor, as a whole."""
        if layout_of(tensor) != self._layouts[name]:
            raise ValueError(f"{self._path}: {name} is not as its header says")
        self.append_bytes(name, _bytes(tensor).numpy().data)

    def append_all(self, tensors: Mapping[str, Tensor]) -> None:
        """All tensors. Small ones are hashed and written together, so that other threads are seldom in the way."""
        together: list[Tensor] = []
        size = 0
        for name in self.order:
            together.append(_bytes(tensors[name]))
            size += len(together[-1])
            if size >= _TOGETHER:
                self._write(torch.cat(together).numpy().data)
                together, size = [], 0
        if together:
            self._write(torch.cat(together).numpy().data)
        self._at, self._missing = len(self.order) - 1, 0

    def append_bytes(self, name: str, data: bytes | memoryview) -> None:
        """The next bytes of the tensor ``name``, as the file has them."""
        if self._at < 0 or self.order[self._at] != name:
            self._pass_to(self._number[name])
            self._missing = self._layouts[name].size_bytes
        self._missing -= len(data)
        if self._missing < 0:
            raise ValueError(f"{self._path}: {name} has more bytes than its header says")
        self._write(data)

    def _pass_to(self, number: int) -> None:
        """Go on to a tensor of ``order``; the present one has to be complete, and those between to be empty."""
        between = self.order[self._at + 1 : number]
        if self._missing or number <= self._at or any(self._layouts[name].size_bytes for name in between):
            raise ValueError(f"{self._path}: tensors are missing or not in order")
        self._at = number

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self.size_bytes += len(data)


class TensorFileReader:
    """A safetensors file of `TensorFileWriter`, of which any rows can be read; it holds no file open and maps none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._opened() as handle:
            header = read_header(handle)
        tensors = parse_header(header)
        self._offsets = {name: len(header) + tensor.begin for name, tensor in tensors.items()}
        self.layouts = {name: TensorLayout(TORCH_DTYPES[dtype], shape) for name, (dtype, shape, _) in tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """A tensor as a whole."""
        return self.tensors([name])[name]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several of them."""
        found = {}
        with self._opened() as handle:
            for name in names:
                layout = self.layouts[name]
                data = self._read(handle, name, 0, layout.size_bytes)
                flat = (
                    torch.frombuffer(bytearray(data), dtype=layout.dtype)
                    if data
                    else torch.empty(0, dtype=layout.dtype)
                )
                found[name] = flat.view(layout.shape)
        return found

    def data(self, name: str) -> bytes:
        """The bytes of a tensor."""
        with self._opened() as handle:
            return self._read(handle, name, 0, self.layouts[name].size_bytes)

    def rows(self, name: str, runs: list[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of the rows start … stop − 1 of a tensor, for every (start, stop) of ``runs``."""
        layout = self.layouts[name]
        stride = layout.dtype.itemsize * math.prod(layout.shape[1:])
        with self._opened() as handle:
            for start, stop in runs:
                yield self._read(handle, name, start * stride, (stop - start) * stride)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        handle = os.open(self._path, os.O_RDONLY)
        try:
            yield handle
        finally:
            os.close(handle)

    def _read(self, handle: int, name: str, offset: int, size: int) -> bytes:
        start = self._offsets[name] + offset
        data = os.pread(handle, size, start)
        while len(data) < size:  # the kernel reads at most 2 GiB at a time
            more = os.pread(handle, size - len(data), start + len(data))
            if not more:
                raise LocalError(f"{self._path}: it is shorter than it was", "did somebody change it? run again")
            data += more
        return data


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> TensorFileWriter:
    """Write a whole file at once; the writer, closed, has its size and digest."""
    layouts = {name: layout_of(tensor) for name, tensor in tensors.items()}
    with TensorFileWriter(path, layouts, metadata=metadata) as writer:
        writer.append_all(tensors)
    return writer


def _header(layouts: Mapping[str, TensorLayout], order: list[str], metadata: Mapping[str, str]) -> bytes:
    if len(metadata) > 1:
        raise ValueError("at most one key of metadata")
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = layouts[name]
        start, end = end, end + layouts[name].size_bytes
        entries[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % _ALIGNMENT)


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in C order."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
