"""Weight files of an adapter: safetensors, whole or sharded with an index, and pickles for those who allow them."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterError
from .config import LFS_MAGIC

SAFETENSORS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
PICKLE = "adapter_model.bin"
FLOATS = ("F32", "F16", "BF16", "F64")

_PICKLE_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


class TensorInfo(NamedTuple):
    """Where a tensor is, and what a header says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its data; the dtypes of safetensors carry their bits in their names (BF16, F8_E4M3), BOOL is 8."""
        bits = re.match(r"[A-Z]+(\d+)", self.dtype)
        return math.prod(self.shape) * (int(bits[1]) if bits else 8) // 8


class HandlePool:
    """Open weight files, the least recently used closed first, so that a collection of any size stays lazy."""

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
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


def weight_files(adapter: str, folder: Path, *, allow_pickle: bool, present: Callable[[Path], bool]) -> list[Path]:
    """The files that hold the weights of the adapter in ``folder``: one, or the shards and their index (last)."""
    whole, index, pickled = folder / SAFETENSORS, folder / INDEX, folder / PICKLE
    if present(whole):
        return [whole]
    if present(index):
        return [*_shards(adapter, index, present), index]
    if present(pickled):
        if allow_pickle:
            return [pickled]
        raise AdapterError(
            adapter,
            f"{PICKLE} is pickled, and a pickle can run code",
            "save it again as safetensors, or --allow-pickle to read it with weights_only=True",
        )
    raise AdapterError(adapter, f"no weights: neither {SAFETENSORS} nor {INDEX}", "is the download complete?")


def read_header(adapter: str, files: Iterable[Path], pool: HandlePool) -> dict[str, TensorInfo]:
    """Name, dtype and shape of every tensor, without reading the tensors (but for a pickle, which has no header)."""
    found: dict[str, TensorInfo] = {}
    for path in files:
        if path.name == INDEX:
            _check_index(adapter, path, found)
            continue
        handle = pool.get(path, _opener(adapter, path))
        for key in handle.keys():  # noqa: SIM118 - a safetensors handle is not iterable
            if key in found:
                raise AdapterError(adapter, f"{path.name}: tensor {key} is also in {found[key].file.name}")
            if isinstance(handle, dict):
                dtype = _PICKLE_DTYPES.get(handle[key].dtype, str(handle[key].dtype))
                found[key] = TensorInfo(path, dtype, tuple(handle[key].shape))
            else:
                view = handle.get_slice(key)
                found[key] = TensorInfo(path, view.get_dtype(), tuple(view.get_shape()))
    return found


def read_tensor(adapter: str, key: str, info: TensorInfo, pool: HandlePool) -> Tensor:
    """One tensor, in the dtype of the file, on the CPU."""
    handle = pool.get(info.file, _opener(adapter, info.file))
    try:
        tensor: Tensor = handle[key] if isinstance(handle, dict) else handle.get_tensor(key)
        return tensor
    except (SafetensorError, KeyError) as error:
        raise AdapterError(adapter, f"{info.file.name}: tensor {key}: {error}") from None


def _opener(adapter: str, path: Path) -> Callable[[Path], Any]:
    return lambda _: (_open_pickle if path.suffix == ".bin" else _open_safetensors)(adapter, path)


def _open_safetensors(adapter: str, path: Path) -> Any:
    _refuse_pointer(adapter, path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            adapter, f"{path.name} is truncated or no safetensors file: {error}", "fetch it again"
        ) from None


def _open_pickle(adapter: str, path: Path) -> dict[str, Tensor]:
    _refuse_pointer(adapter, path)
    try:
        # Mapped, so that pooled files are not in memory; only what torch wrote before 1.6 has to be read whole.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what a pickle raises depends on what is in it
        reason = (str(error).splitlines() or [""])[0]
        raise AdapterError(adapter, f"{path.name} cannot be read with weights_only=True: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise AdapterError(adapter, f"{path.name} holds other things than named tensors")
    return state


def _refuse_pointer(adapter: str, path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS_MAGIC)) == LFS_MAGIC:
            raise AdapterError(adapter, f"{path.name} is a Git LFS pointer, not weights", "run 'git lfs pull'")


def _weight_map(adapter: str, index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
            return dict(weight_map)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise AdapterError(adapter, f"{index.name} has no weight_map of tensor names to file names in the same folder")


def _shards(adapter: str, index: Path, present: Callable[[Path], bool]) -> list[Path]:
    shards = [index.with_name(name) for name in sorted(set(_weight_map(adapter, index).values()))]
    for shard in shards:
        if not present(shard):
            raise AdapterError(adapter, f"{shard.name} is missing, but {index.name} names it", "fetch it again")
    return shards


def _check_index(adapter: str, index: Path, found: dict[str, TensorInfo]) -> None:
    for key, name in _weight_map(adapter, index).items():
        if key not in found or found[key].file.name != name:
            raise AdapterError(adapter, f"tensor {key} is not in {name}, where {index.name} says it is")
