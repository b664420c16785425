"""The files of one adapter, each read once: its digest and its tensors from the same bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Protocol

import torch

from ..adapter.reader import Adapter
from ..adapter.unreadable import unreadable
from ..adapter.weights import Descriptor, read_fully
from ..base.digests import sha256_bytes, sha256_file
from ..base.errors import AdapterError
from ..base.stopping import check_stop
from ..bundle.manifest import SourceEntry


class Destination(Protocol):
    """Where the data of an adapter goes, in pieces of at most ``piece`` bytes."""

    piece: int

    def memory_for(self, begin: int, size: int) -> memoryview:
        """Memory for ``size`` bytes, those from ``begin`` on in the data of the adapter."""
        ...

    def arrived(self, begin: int, size: int) -> None:
        """These bytes are in that memory now. They may travel on while they are hashed, and are not changed."""
        ...

    def wait_until_free(self) -> None:
        """Return when that memory may be used for other bytes."""
        ...


def read_contents(adapter: Adapter, destination: Destination) -> list[SourceEntry]:
    """Read all files of an adapter, their tensors into ``destination``; the files as the bundle lists them.

    A configuration is what was read of it when the adapter was opened. Raises AdapterError for a file that is not the
    one that was opened then: cut short, or written anew, or for one that cannot be read.
    """
    with unreadable(adapter.name):
        return _read_contents(adapter, destination)


def _read_contents(adapter: Adapter, destination: Destination) -> list[SourceEntry]:
    config, *others = adapter.files
    files = [SourceEntry(config.name, len(adapter.config_text), sha256_bytes(adapter.config_text))]
    for number, weight in enumerate(adapter.weights):
        header = weight.header
        if header is None:
            files.append(SourceEntry(weight.path.name, weight.path.stat().st_size, sha256_file(weight.path)))
            _unpickle(adapter, number, destination)
        else:
            digest = _read_tensors(adapter, number, destination)
            files.append(SourceEntry(weight.path.name, header.size + adapter.layout.regions[number].size, digest))
    for path in others[len(adapter.weights) :]:  # the index of shards
        files.append(SourceEntry(path.name, path.stat().st_size, sha256_file(path)))
    return files


def _read_tensors(adapter: Adapter, number: int, destination: Destination) -> str:
    """Read a safetensors file; its SHA-256."""
    weight, region = adapter.weights[number], adapter.layout.regions[number]
    assert weight.header is not None
    file = Descriptor(weight.path)
    if os.fstat(file.number).st_size > weight.header.size + region.size:
        raise _changed(adapter, weight.path.name)
    header = memoryview(bytearray(weight.header.size))
    digest = hashlib.sha256()
    for begin, size in _pieces(region.size, destination.piece):
        memory = destination.memory_for(region.begin + begin, size)
        buffers, position = ([header, memory], 0) if begin == 0 else ([memory], len(header) + begin)
        count = read_fully(file.number, buffers, position)
        if count < sum(map(len, buffers)):
            raise _truncated(adapter, number, position + count - len(header))
        destination.arrived(region.begin + begin, size)
        if begin == 0:
            digest.update(header)
            if digest.digest() != weight.header.sha256:
                destination.wait_until_free()
                raise _changed(adapter, weight.path.name)
        digest.update(memory)
        destination.wait_until_free()
    return digest.hexdigest()


def _unpickle(adapter: Adapter, number: int, destination: Destination) -> None:
    for key, info in adapter.layout.tensors.items():
        if info.file != number or key in adapter.layout.cuts:
            continue
        data = adapter.tensor(key).detach().contiguous().view(-1).view(torch.uint8)
        for begin, size in _pieces(info.size_bytes, destination.piece):
            if size:
                memory = destination.memory_for(info.begin + begin, size)
                torch.frombuffer(memory, dtype=torch.uint8).copy_(data[begin : begin + size])
                destination.arrived(info.begin + begin, size)
                destination.wait_until_free()


def _pieces(size: int, most: int) -> Iterator[tuple[int, int]]:
    """(begin, size) of pieces of at most ``most`` bytes, at least one."""
    for begin in range(0, max(size, 1), most):
        check_stop()
        yield begin, min(most, size - begin)


def _truncated(adapter: Adapter, number: int, end: int) -> AdapterError:
    """``end``: where the file ends in its data; negative within the header."""
    begin = adapter.layout.regions[number].begin
    missing = [
        (info.begin, key)
        for key, info in adapter.layout.tensors.items()
        if info.file == number and info.end > begin + end and key not in adapter.layout.cuts
    ]
    what = f"tensor {min(missing)[1]} is truncated" if missing and end >= 0 else "it is truncated"
    return AdapterError(adapter.name, f"{adapter.weights[number].path.name}: {what}", "fetch it again")


def _changed(adapter: Adapter, name: str) -> AdapterError:
    return AdapterError(adapter.name, f"{name} changed while it was being read", "try again when it is written")
