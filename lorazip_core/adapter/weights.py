"""Weight files of an adapter: safetensors, whole or sharded with an index, and pickles for those who allow them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..base.errors import AdapterError
from ..base.safetensors_header import SAFETENSORS_DTYPES, HeaderTensor, parse_header, read_header
from .formats.foreign import refuse_foreign
from .formats.format import Format, WeightNames
from .layout import FileTensors, Layout, lay_out
from .unreadable import refuse_pointer

_MOST_OPEN = 256
_NO_TENSOR = re.compile(r"GLOBAL (\S{1,100})")  # how torch names what it does not load with weights_only=True


class Header(NamedTuple):
    """The header of a safetensors file: its bytes, length included, and the SHA-256 of them."""

    size: int
    sha256: bytes


class WeightFile(NamedTuple):
    """A file with tensors, and its header; a pickle has none."""

    path: Path
    header: Header | None


class WeightPaths(NamedTuple):
    """The files of an adapter that have tensors, and the index of these if they are shards."""

    tensors: tuple[Path, ...]
    shard_index: Path | None = None


class Descriptor:
    """A file open for reading as long as anybody holds this."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class HandlePool:
    """Open weight files, the least recently used closed first, so that a collection of any size stays lazy."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = _most_open() if limit is None else limit
        self._lock = Lock()
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def get(self, path: Path, opener: Callable[[Path], Any]) -> Any:
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        handle = opener(path)  # outside of the lock, so that threads open side by side; two may open one file
        with self._lock:
            self._open[path] = handle
            while len(self._open) > self._limit:
                self._open.popitem(last=False)
        return handle


def _most_open() -> int:
    """A quarter of what the process may open: others have files too, and threads open some beside the pool."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN if soft == resource.RLIM_INFINITY else max(1, min(_MOST_OPEN, soft // 4))


class Layouts:
    """The headers and layouts seen so far, so that what is alike is parsed, checked and kept once."""

    def __init__(self, pool: HandlePool) -> None:
        self.pool = pool
        self._files: dict[tuple[Header, int], FileTensors] = {}
        self._by_headers: dict[Any, Layout] = {}
        self._by_content: dict[Any, Layout] = {}
        self._likely_size = 0

    def read(self, adapter: str, form: Format, paths: WeightPaths) -> tuple[Layout, tuple[WeightFile, ...]]:
        """Read the headers of an adapter's files (but for a pickle, which has none, no tensors).

        Raises AdapterError for what is no weights file, or truncated, or not what the index says.
        """
        weights: list[WeightFile] = []
        tensors: list[FileTensors] = []
        for path in paths.tensors:
            header, own = self._pickle(adapter, path) if is_pickle(path) else self._header(adapter, path)
            weights.append(WeightFile(path, header))
            tensors.append(own)
        headers = tuple(weight.header for weight in weights)
        layout = None if None in headers else self._by_headers.get((form, headers))
        if layout is None:
            _check_names(adapter, [weight.path.name for weight in weights], tensors)
            content = (form, *((size, tuple(own.items())) for size, own in tensors))
            layout = self._by_content.get(content)
            if layout is None:
                names = form.ordinary_names(adapter, [key for _, own in tensors for key in own])
                layout = self._by_content[content] = lay_out(tensors, names)
            if None not in headers:
                self._by_headers[form, headers] = layout
        if paths.shard_index is not None:
            _check_index(adapter, paths.shard_index, layout, weights)
        return layout, tuple(weights)

    def _header(self, adapter: str, path: Path) -> tuple[Header, FileTensors]:
        descriptor = Descriptor(path)
        size = os.fstat(descriptor.number).st_size
        data = read_header(descriptor.number, self._likely_size)
        refuse_pointer(adapter, path.name, data, "weights")
        header = Header(len(data), hashlib.sha256(data).digest())
        known = self._files.get((header, size))
        if known is None:
            known = self._files[header, size] = _checked(adapter, path, data, size)
            self._likely_size = max(self._likely_size, len(data))
        return header, known

    def _pickle(self, adapter: str, path: Path) -> tuple[None, FileTensors]:
        state: dict[str, Tensor] = self.pool.get(path, opener(adapter, path))
        own: dict[str, HeaderTensor] = {}
        end = 0
        for name, tensor in state.items():
            own[name] = HeaderTensor(SAFETENSORS_DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), end)
            end += tensor.nbytes
        return None, (end, own)


def _checked(adapter: str, path: Path, header: bytes, size: int) -> FileTensors:
    """The tensors of a header that safetensors accepts, in its order."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        tensors = parse_header(header)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            adapter, f"{path.name} is truncated or no safetensors file: {error}", "fetch it again"
        ) from None
    if tensors.keys() != set(names):
        raise AdapterError(adapter, f"{path.name} changed while it was being read", "try again when it is written")
    return size - len(header), {name: tensors[name] for name in names}


def weight_paths(
    adapter: str, folder: Path, names: WeightNames, *, allow_pickle: bool, present: Callable[[Path], bool]
) -> WeightPaths:
    """The files that hold the weights of the adapter in ``folder``: one, or the shards and their index."""
    whole, index, pickled = (folder / name for name in (names.whole, names.shard_index, names.pickle))
    if present(whole):
        return WeightPaths((whole,))
    if present(index):
        return WeightPaths(_shards(adapter, index, present), index)
    if present(pickled):
        if allow_pickle:
            return WeightPaths((pickled,))
        raise AdapterError(
            adapter,
            f"{names.pickle} is pickled, and a pickle can run code",
            "save it again as safetensors, or «allow_pickle» to read it with weights_only=True",
        )
    refuse_foreign(adapter, folder)
    reason = f"no weights: neither {names.whole} nor {names.shard_index}"
    raise AdapterError(adapter, reason, "is the download complete?")


def is_pickle(path: Path) -> bool:
    return path.suffix == ".bin"


def opener(adapter: str, path: Path) -> Callable[[Path], Any]:
    """What the pool opens a weights file with: the tensors of a pickle, mapped, or a descriptor."""
    return (lambda _: _open_pickle(adapter, path)) if is_pickle(path) else Descriptor


def read_fully(descriptor: int, buffers: Sequence[memoryview], position: int) -> int:
    """Fill ``buffers`` one after another from ``position`` on; the number of bytes read, fewer at the end of the file.

    As much in one call as the kernel gives: readers in threads wait for each other after every call.
    """
    rest = [buffer for buffer in buffers if len(buffer)]
    total = 0
    while rest:
        count = os.preadv(descriptor, rest, position + total)
        if count == 0:
            break
        total += count
        while rest and count >= len(rest[0]):
            count -= len(rest[0])
            del rest[0]
        if count:
            rest[0] = rest[0][count:]
    return total


def copy_tensor(tensor: Tensor, buffer: memoryview) -> None:
    """The bytes of a tensor, row by row."""
    if len(buffer):
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))


def _open_pickle(adapter: str, path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        refuse_pointer(adapter, path.name, file.read(64), "weights")
    try:
        # Mapped, so that pooled files are not in memory; only what torch wrote before 1.6 has to be read whole.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what a pickle raises depends on what is in it
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise  # for want of memory, or of the device; EINVAL is what a truncated archive gives
        # In words of our own: torch advises to load without weights_only, which would run what is in there.
        if other := _NO_TENSOR.search(str(error)):
            raise AdapterError(
                adapter,
                f"{path.name} holds more than tensors ({other[0]}), which may run code and is not loaded",
                "save it again as safetensors",
            ) from None
        reason = f"{path.name} is truncated, or nothing that torch.save wrote of tensors alone"
        raise AdapterError(adapter, reason, "fetch it again, or save it again as safetensors") from None
    dense = isinstance(state, dict) and all(
        isinstance(value, Tensor) and value.layout == torch.strided for value in state.values()
    )
    if not dense:
        raise AdapterError(adapter, f"{path.name} holds other things than named, dense tensors")
    return state


def _weight_map(adapter: str, index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
            return dict(weight_map)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise AdapterError(adapter, f"{index.name} has no weight_map of tensor names to file names in the same folder")


def _shards(adapter: str, index: Path, present: Callable[[Path], bool]) -> tuple[Path, ...]:
    shards = tuple(index.with_name(name) for name in sorted(set(_weight_map(adapter, index).values())))
    for shard in shards:
        if not present(shard):
            raise AdapterError(adapter, f"{shard.name} is missing, but {index.name} names it", "fetch it again")
    return shards


def _check_names(adapter: str, names: Sequence[str], tensors: Sequence[FileTensors]) -> None:
    seen: dict[str, str] = {}
    for name, (_, own) in zip(names, tensors, strict=True):
        for key in own:
            if key in seen:
                raise AdapterError(adapter, f"{name}: tensor {key} is also in {seen[key]}")
            seen[key] = name


def _check_index(adapter: str, index: Path, layout: Layout, weights: Sequence[WeightFile]) -> None:
    there = {layout.stored.get(key, key): weights[info.file].path.name for key, info in layout.tensors.items()}
    for key, name in _weight_map(adapter, index).items():
        if there.get(key) != name:
            raise AdapterError(adapter, f"tensor {key} is not in {name}, where {index.name} says it is")
