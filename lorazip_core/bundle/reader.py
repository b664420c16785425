"""A bundle, read: one tensor at a time, straight from its files, each of which is checked before it is used."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..adapter.formats.names import CONFIG_NAME
from ..base.digests import sha256_bytes, sha256_stream
from ..base.errors import BundleDamaged
from ..base.filesystem import naming, system_error
from ..schemes.registry import SCHEMES, packed_scheme
from ..schemes.scheme import Scheme, Size
from .kinds import MANIFEST_NAME
from .manifest import (
    AdapterEntry,
    ClusterEntry,
    FileEntry,
    Manifest,
    ModuleEntry,
    ShardEntry,
    SourceEntry,
    read_manifest,
)
from .size import PACKED_MODULES
from .unpacked import Unpacked

if TYPE_CHECKING:
    from torch import Tensor

_OPEN_FILES = 128
_UNPACKED_BYTES = 2**28  # kept at a time: neighbours in a bundle are in one file, and used at about the same time
# Any other OSError is trouble with reading here, and no damage to the bundle.
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_RESTORE = "restore the bundle, or compress again; 'lorazip verify' names all damage"


class Bundle:
    """An opened bundle; for any thread. Opening reads the manifest only.

    A file is held against the size and digest in the manifest when it is first used, once. What is read afterwards is
    the file that was checked: the handle is made from the descriptor that was hashed, and a file that is opened again
    is hashed again unless it is still the same one, unchanged.
    """

    def __init__(self, path: Path, operations: tuple[str, ...] = ("read",)) -> None:
        """Raises as `read_manifest`; ``operations`` ("read", "export") say which required features matter."""
        self.path = path
        self.manifest: Manifest = read_manifest(path, operations)
        self._lock = Lock()
        self._opening: defaultdict[str, Lock] = defaultdict(Lock)
        self._handles: OrderedDict[str, Any] = OrderedDict()
        self._checked: dict[str, tuple[int, ...]] = {}
        self._rows: dict[tuple[str, frozenset[int]], dict[int, int]] = {}
        self._unpacking: defaultdict[str, Lock] = defaultdict(Lock)
        self._unpacked: OrderedDict[str, dict[int, Unpacked]] = OrderedDict()

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all its files, the manifest included."""
        return sum(entry.size_bytes for entry in self.manifest.files) + (self.path / MANIFEST_NAME).stat().st_size

    @cached_property
    def digest(self) -> str:
        """The ``manifest_sha256`` of its manifest, which stands for all of the bundle."""
        return str(json.loads((self.path / MANIFEST_NAME).read_bytes())["manifest_sha256"])

    def index(self, adapter: AdapterEntry) -> int:
        """The position of an adapter in the manifest."""
        return self._indices[adapter.name]

    def shard(self, adapter: AdapterEntry) -> ShardEntry:
        """The shard that holds the cores of an adapter in a cluster."""
        return self._shards[self.index(adapter)]

    def origin(self, file: str) -> str:
        """The digest of a file of the bundle, or of that which it is the rest of: what is in it was in that one."""
        return self._files[file].origin

    def modules(self, adapter: AdapterEntry) -> list[ModuleEntry]:
        """The modules that an adapter has."""
        return [self.manifest.modules[index] for index in self.manifest.module_sets[adapter.module_set]]

    def rows(self, shard: ShardEntry, module: str) -> dict[int, int]:
        """The row of every adapter, by its index, in the stacked cores of ``module`` in ``shard``; rows ascend."""
        having = self._having[module]
        key = shard.path, having  # few, since most modules are in the same module sets
        if key not in self._rows:
            adapters = self.manifest.adapters
            held = [index for index in shard.adapters if adapters[index].module_set in having]
            self._rows[key] = {index: row for row, index in enumerate(held)}
        return self._rows[key]

    def scheme(self, adapter: AdapterEntry) -> Scheme:
        """How an adapter is represented."""
        return SCHEMES[adapter.scheme]

    def shared(self, cluster: ClusterEntry, module: str) -> dict[str, Tensor]:
        """What the adapters of a cluster share of a module, by the suffixes of its scheme; mapped, not in memory."""
        suffixes = SCHEMES[cluster.method].shared
        return {suffix: self.tensor(cluster.basis, f"{module}.{suffix}") for suffix in suffixes}

    def stacked(self, shard: ShardEntry, module: str) -> dict[str, Tensor]:
        """The adapters' own tensors of a module in a shard, [n, ...], stacked by `rows`; mapped, not in memory."""
        scheme = self.scheme(self.manifest.adapters[shard.adapters[0]])
        return {suffix: self.tensor(shard.path, f"{module}.{suffix}") for suffix in scheme.own}

    def own(self, adapter: AdapterEntry, module: str) -> dict[str, Tensor]:
        """An adapter's own tensors of a module, by the suffixes of its scheme."""
        scheme = self.scheme(adapter)
        if packed_scheme(adapter.scheme):
            return self.unpacked(adapter)[module]
        if adapter.individual is not None:
            return {suffix: self.tensor(adapter.individual, f"{module}.{suffix}") for suffix in scheme.own}
        shard = self.shard(adapter)
        rows = self.rows(shard, module)
        for suffix in scheme.own:
            shape = self._shape(shard.path, f"{module}.{suffix}")
            if shape[:1] != (len(rows),):  # a row would be another adapter's, or none
                where = f"{self.path / shard.path}: tensor {module}.{suffix}"
                raise BundleDamaged(f"{where} is {list(shape)}, not of {len(rows)} rows", _RESTORE)
        row = rows[self.index(adapter)]
        return {suffix: self.tensor(shard.path, f"{module}.{suffix}", row=row) for suffix in scheme.own}

    def packed_in(self, path: str) -> list[AdapterEntry]:
        """The adapters that are packed into one file, in order."""
        return [self.manifest.adapters[index] for index in self._packed[path]]

    def unpacked(self, adapter: AdapterEntry) -> Unpacked:
        """By module, the own tensors of an adapter that shares a file with others."""
        return self.unpacked_in(str(adapter.individual))[self.index(adapter)]

    def unpacked_in(self, path: str) -> dict[int, Unpacked]:
        """Of every adapter in a file of several, by its index, what `unpacked` returns."""
        with self._lock:
            unpacking = self._unpacking[path]
        with unpacking:
            with self._lock:
                found = self._unpacked.get(path)
            if found is None:
                found = self._unpack(path)
                with self._lock:
                    self._unpacked[path] = found
                    while len(self._unpacked) > 1 and self._unpacked_bytes() > _UNPACKED_BYTES:
                        self._unpacked.popitem(last=False)
        return found

    def _unpacked_bytes(self) -> int:
        """Of all unpacked files that are kept."""
        return sum(each.size_bytes for adapters in self._unpacked.values() for each in adapters.values())

    def _unpack(self, path: str) -> dict[int, Unpacked]:
        from ..base.safetensors_header import TORCH_DTYPES

        indices = self._packed[path]
        sets = [self.manifest.adapters[index].module_set for index in indices]
        if sum(len(self.manifest.module_sets[number]) for number in sets) > PACKED_MODULES:
            raise BundleDamaged(f"{self.path / path}: it has more than {PACKED_MODULES:,} modules", _RESTORE)
        modules = [self.modules(self.manifest.adapters[index]) for index in indices]
        scheme = packed_scheme(self.manifest.adapters[indices[0]].scheme)
        assert scheme is not None
        tensors = {}
        for name, spec in scheme.file_tensors(len(indices)).items():
            tensors[name] = self.tensor(path, name)
            if not spec.fits(tensors[name].shape) or tensors[name].dtype not in map(TORCH_DTYPES.get, spec.dtypes):
                found = f"{tensors[name].dtype} {list(tensors[name].shape)}"
                raise BundleDamaged(f"{self.path / path}: tensor {name} is {found}", _RESTORE)
        sizes = [[Size(module.d_out, module.d_in) for module in own] for own in modules]
        try:
            unpacked = scheme.unpack(tensors, sizes)
        except ValueError as error:
            raise BundleDamaged(f"{self.path / path}: {error}", _RESTORE) from None
        return {
            index: Unpacked([module.name for module in own], found)
            for index, own, found in zip(indices, modules, unpacked, strict=True)
        }

    def rank(self, adapter: AdapterEntry, module: str) -> int:
        """The number of columns of B̂, and of rows of Â, that a module is decoded to; no tensor but packed ones is read.

        Raises BundleDamaged for tensors of too few dimensions; else their shapes are taken as they are.
        """
        scheme = self.scheme(adapter)

        def shape_of(suffix: str) -> tuple[int, ...]:
            if packed_scheme(adapter.scheme):
                return tuple(self.unpacked(adapter)[module][suffix].shape)
            if adapter.individual is not None:
                return self._shape(adapter.individual, f"{module}.{suffix}")
            if suffix in scheme.shared:
                assert adapter.cluster is not None
                return self._shape(self.manifest.clusters[adapter.cluster].basis, f"{module}.{suffix}")
            return self._shape(self.shard(adapter).path, f"{module}.{suffix}")[1:]

        try:
            return scheme.decoded_rank(shape_of)
        except IndexError:
            where = adapter.individual or self.shard(adapter).path
            raise BundleDamaged(f"{self.path / where}: a tensor of {module} has too few dimensions", _RESTORE) from None

    def extras(self, adapter: AdapterEntry) -> dict[str, Tensor]:
        """The tensors of an adapter that are no LoRA factors, by their names in the source."""
        if adapter.extras is None:
            return {}
        return {name: self.tensor(adapter.extras, name) for name in self.names(adapter.extras)}

    def sources(self, adapter: AdapterEntry) -> list[SourceEntry]:
        """The files that an adapter was read from, its configuration first."""
        if self.manifest.format_version == 1:
            return adapter.files
        config = self._files[adapter.config]
        return [SourceEntry(CONFIG_NAME, config.size_bytes, config.sha256), *adapter.files]

    def config(self, adapter: AdapterEntry) -> dict[str, Any]:
        """The adapter's original ``adapter_config.json``."""
        try:
            return dict(json.loads(self.config_text(adapter)))
        except (ValueError, TypeError, RecursionError) as error:
            raise BundleDamaged(f"{self.path / adapter.config}: not the JSON of a configuration: {error}") from None

    def config_text(self, adapter: AdapterEntry) -> bytes:
        """The adapter's original ``adapter_config.json``, byte for byte."""
        path, entry = self.path / adapter.config, self._files[adapter.config]
        try:
            with _opened(path) as file, naming(path):
                data = file.read()
        except _NOT_THERE as error:
            raise BundleDamaged(f"{path}: {error.strerror}", _RESTORE) from None
        if found := _differs(entry, len(data), sha256_bytes(data)):
            raise BundleDamaged(f"{path}: {found[1]}", _RESTORE)
        return data

    def check_sizes(self, files: Iterable[str]) -> None:
        """Raise BundleDamaged for the first file that is not there, or not as long as the manifest says: no reading."""
        for file in dict.fromkeys(files):
            path, entry = self.path / file, self._files[file]
            try:
                status = path.stat()
            except _NOT_THERE as error:
                raise BundleDamaged(f"{path}: {error.strerror}", _RESTORE) from None
            if not stat.S_ISREG(status.st_mode):
                raise BundleDamaged(f"{path}: not a file", _RESTORE)
            if found := _differs(entry, status.st_size, entry.sha256):
                raise BundleDamaged(f"{path}: {found[1]}", _RESTORE)

    def check_files(self, files: Iterable[str]) -> None:
        """Check several files side by side, before they are used. Raises BundleDamaged for the first that is damaged.

        Files that many threads share are best checked so: a thread that needs a file waits until it is hashed.
        """
        import torch  # takes seconds: not for whoever reads the manifest only

        from ..base.threads import in_order

        with closing(in_order(self._handle, files, torch.device("cpu"))) as handles:
            for _ in handles:
                pass

    def damage_to(self, file: str) -> tuple[str, str] | None:
        """Why a file of the bundle must not be used, as the kind of finding and its message, or None if it is sound.

        A file that is found sound here is not hashed again when it is read. Raises OSError for one that cannot be
        read: that is trouble here, and tells nothing of the bundle.
        """
        try:
            with _opened(self.path / file) as opened:
                return self._check(file, opened)
        except _NOT_THERE as error:
            return "missing-file", f"{error.strerror}"

    def names(self, file: str) -> list[str]:
        """The names of the tensors in a file of the bundle."""
        return list(self._handle(file).keys())

    def metadata(self, file: str) -> dict[str, str]:
        """The metadata in the header of a file of the bundle."""
        return self._handle(file).metadata() or {}

    def tensor(self, file: str, name: str, row: int | None = None) -> Tensor:
        """One tensor of a file of the bundle, or one row of it. Raises BundleDamaged when it is not there."""
        try:
            handle = self._handle(file)
            tensor: Tensor = handle.get_tensor(name) if row is None else handle.get_slice(name)[row]
        except SafetensorError as error:
            raise BundleDamaged(f"{self.path / file}: tensor {name}: {error}") from None
        return tensor

    def _shape(self, file: str, name: str) -> tuple[int, ...]:
        try:
            return tuple(self._handle(file).get_slice(name).get_shape())
        except SafetensorError as error:
            raise BundleDamaged(f"{self.path / file}: tensor {name}: {error}") from None

    def _handle(self, file: str) -> Any:
        """The open safetensors file, once it is checked; threads that want the same one wait for each other."""
        with self._lock:
            opening = self._opening[file]
        with opening:
            with self._lock:
                if file in self._handles:
                    self._handles.move_to_end(file)
                    return self._handles[file]
            handle = self._open(file)
            with self._lock:
                self._handles[file] = handle
                while len(self._handles) > _OPEN_FILES:
                    self._handles.popitem(last=False)
        return handle

    def _open(self, file: str) -> Any:
        path = self.path / file
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(_opened(path))
            except _NOT_THERE as error:
                raise BundleDamaged(f"{path}: {error.strerror}", _RESTORE) from None
            if damage := self._check(file, opened):
                raise BundleDamaged(f"{path}: {damage[1]}", _RESTORE)
            # By its descriptor: whoever puts another file in its place meanwhile does not get that one read.
            with naming(path):
                try:
                    return safe_open(f"/dev/fd/{opened.fileno()}", framework="pt")
                except SafetensorError as error:
                    if system_error(error) is not None:
                        raise
                    raise BundleDamaged(f"{path}: {error}", _RESTORE) from None
                except (FileNotFoundError, RuntimeError):  # it is open, so this is want of descriptors
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), os.fspath(path)) from None

    def _check(self, file: str, opened: FileIO) -> tuple[str, str] | None:
        """Hold an open file against its entry in the manifest, unless it is the one that was found sound before."""
        entry, status = self._files[file], os.fstat(opened.fileno())
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if self._checked.get(file) == identity:
            return None
        if status.st_size != entry.size_bytes:
            return _differs(entry, status.st_size, "")
        with naming(self.path / file):
            digest = sha256_stream(opened)
        if found := _differs(entry, status.st_size, digest):
            return found
        self._checked[file] = identity
        return None

    @cached_property
    def _files(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in self.manifest.files}

    @cached_property
    def _packed(self) -> dict[str, list[int]]:
        """The indices of the adapters in every file of several."""
        found: defaultdict[str, list[int]] = defaultdict(list)
        for index, adapter in enumerate(self.manifest.adapters):
            if packed_scheme(adapter.scheme):
                found[str(adapter.individual)].append(index)
        return found

    @cached_property
    def _shards(self) -> dict[int, ShardEntry]:
        shards = [shard for cluster in self.manifest.clusters for shard in cluster.shards]
        return {index: shard for shard in shards for index in shard.adapters}

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {adapter.name: index for index, adapter in enumerate(self.manifest.adapters)}

    @cached_property
    def _having(self) -> dict[str, frozenset[int]]:
        """The module sets that every module is in."""
        sets = [frozenset(indices) for indices in self.manifest.module_sets]
        return {
            module.name: frozenset(number for number, indices in enumerate(sets) if index in indices)
            for index, module in enumerate(self.manifest.modules)
        }


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """A plain file, open for reading. Raises BundleDamaged for anything else, such as a pipe, which would block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BundleDamaged(f"{path}: not a file", _RESTORE)
        yield file


def _differs(entry: FileEntry, size: int, sha256: str) -> tuple[str, str] | None:
    """What of a file is not as its entry in the manifest says: its size, or else its digest."""
    if size != entry.size_bytes:
        return "wrong-size", f"{size} bytes, but the manifest says {entry.size_bytes}"
    if sha256 != entry.sha256:
        return "wrong-digest", f"sha256 {sha256}, but the manifest says {entry.sha256}"
    return None
