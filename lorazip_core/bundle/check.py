"""Everything that can be known of a bundle's soundness without the original adapters.

A file is checked for its kind and size, then its digest, then its content; what fails one step is not taken further, so
that each damaged file is named once and nothing is parsed that its writer did not write.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

import torch
from torch import Tensor

from ..base.errors import BundleDamaged
from ..base.filesystem import tree
from ..base.progress import Advance
from ..base.text import printable
from ..base.threads import in_order
from ..schemes.registry import SCHEMES, packed_scheme
from ..schemes.scheme import PackedScheme, Scheme, Shape, Size, TensorSpec
from .contradictions import contradictions
from .finding import Finding
from .kinds import MANIFEST_NAME
from .manifest import AdapterEntry, ClusterEntry, FileEntry, ModuleEntry, ShardEntry
from .reader import Bundle
from .stored import fault_of
from .tensor_file import DTYPES

# Entries beside the manifest that are no part of the bundle: what hosting, version control and downloads put there.
BESIDE = frozenset({"README.md", "LICENSE", ".gitattributes", ".gitignore", ".git", ".cache"})
_UNPACKERS = 8  # each has a file of several adapters in memory


def check_bundle(bundle: Bundle, advance: Advance) -> list[Finding]:
    """All damage to a bundle whose manifest could be read; ``advance`` is told the bytes of each file once read.

    Raises OSError when a file or folder cannot be read (permissions, a failing disk), which is not damage.
    """
    check = _Check(bundle)
    check.manifest()
    check.entries()
    with closing(in_order(check.wrong_bytes, bundle.manifest.files, torch.device("cpu"))) as results:
        for entry, wrong in zip(bundle.manifest.files, results, strict=True):
            check.bytes_of(entry, wrong)
            advance(entry.size_bytes)
    if next(contradictions(bundle.manifest), None) is None:
        check.contents()
    return check.findings


class _Check:
    """The findings so far, and the files that may be parsed."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.findings: list[Finding] = []
        self._plain: set[str] = set()
        self._sound: set[str] = set()
        self._dtype = DTYPES[bundle.manifest.parameters.dtype]

    def _found(self, kind: str, path: str, message: str) -> None:
        self.findings.append(Finding(kind, path, message, damage=True))

    def _unreadable(self, path: str, error: BundleDamaged) -> None:
        """A finding of what the reader says of a file: less the path, which it names itself, and the hint to verify."""
        self._found("unreadable", path, error.message.removeprefix(f"{self.bundle.path / path}: "))

    def manifest(self) -> None:
        """What the manifest says must fit together beyond the references that its reader checks."""
        for message in contradictions(self.bundle.manifest):
            self._found("contradiction", MANIFEST_NAME, message)

    def entries(self) -> None:
        """Every entry of the folder is a plain file that the manifest lists (or is), or may lie beside the bundle."""
        listed = {entry.path for entry in self.bundle.manifest.files} | {MANIFEST_NAME}
        plain, odd = set(), set()
        for path in tree(self.bundle.path, without=BESIDE):
            if path not in listed:
                self._found("unlisted-file", printable(path), "the manifest does not list it")
            elif not stat.S_ISREG(os.lstat(self.bundle.path / path).st_mode):
                self._found("not-a-file", path, "a link or special file stands where a file should be")
                odd.add(path)
            else:
                plain.add(path)
        for path in sorted(listed - plain - odd):
            self._found("missing-file", path, "the manifest lists it, but it is not there")
        self._plain = plain

    def wrong_bytes(self, entry: FileEntry) -> tuple[str, str] | None:
        """Size and digest of a file that is there are those of the manifest; for any thread: the finding, if not.

        Raises OSError for a file that cannot be read: that is trouble here, and tells nothing of the bundle.
        """
        return self.bundle.damage_to(entry.path) if entry.path in self._plain else None

    def bytes_of(self, entry: FileEntry, wrong: tuple[str, str] | None) -> None:
        """Take down what `wrong_bytes` has said of a file."""
        if wrong is not None:
            self._found(wrong[0], entry.path, wrong[1])
        elif entry.path in self._plain:
            self._sound.add(entry.path)

    def contents(self) -> None:
        """What is in the sound files is what the manifest says, which must not contradict itself."""
        for cluster in self.bundle.manifest.clusters:
            shared = self._basis(cluster)
            for shard in cluster.shards:
                if shard.path in self._sound:
                    self._shard(cluster, shard, shared)
        packed: dict[str, PackedScheme] = {}
        for adapter in self.bundle.manifest.adapters:
            scheme = packed_scheme(adapter.scheme)
            if scheme is None:
                self._individual(adapter)
            elif adapter.individual is not None:
                packed[adapter.individual] = scheme
        self._packed({path: scheme for path, scheme in packed.items() if self._fits(path, scheme)})
        for adapter in {adapter.config: adapter for adapter in self.bundle.manifest.adapters}.values():
            self._config(adapter)
        for extras in dict.fromkeys(adapter.extras for adapter in self.bundle.manifest.adapters):
            if extras in self._sound:
                self._extras(extras)

    def _basis(self, cluster: ClusterEntry) -> dict[str, dict[str, Shape]]:
        """Check what a cluster shares; the shapes, by suffix, of each module whose tensors are in order."""
        if cluster.basis not in self._sound:
            return {}
        scheme = SCHEMES[cluster.method]
        expected = self._expected(
            self._modules(cluster), lambda module: scheme.shared_tensors(_size(module), cluster.rank)
        )
        found: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
        for (module, suffix), tensor in self._tensors(cluster.basis, expected):
            found[module][suffix] = tuple(tensor.shape)
            if fault := scheme.fault(suffix, tensor):
                self._found(fault.kind, cluster.basis, f"tensor {module}.{suffix}: {fault.message}")
        return self._consistent(cluster.basis, scheme, scheme.shared, found)

    def _consistent(
        self, path: str, scheme: Scheme, suffixes: tuple[str, ...], found: dict[str, dict[str, Shape]]
    ) -> dict[str, dict[str, Shape]]:
        """The modules that have all tensors of these ``suffixes``, which fit each other."""
        consistent = {}
        for module, shapes in found.items():
            if contradiction := scheme.contradiction(shapes):
                self._found("wrong-shape", path, f"module {module}: {contradiction}")
            elif shapes.keys() >= set(suffixes):
                consistent[module] = shapes
        return consistent

    def _shard(self, cluster: ClusterEntry, shard: ShardEntry, shared: dict[str, dict[str, Shape]]) -> None:
        scheme = SCHEMES[cluster.method]
        rows = {module.name: len(self.bundle.rows(shard, module.name)) for module in self._modules(cluster)}

        def own_tensors(module: ModuleEntry) -> dict[str, TensorSpec]:
            own = scheme.own_tensors(_size(module), cluster.rank, shared.get(module.name))
            return {suffix: spec._replace(shape=(rows[module.name], *spec.shape)) for suffix, spec in own.items()}

        modules = [module for module in self._modules(cluster) if rows[module.name]]
        for _ in self._tensors(shard.path, self._expected(modules, own_tensors)):
            pass
        try:
            named = self.bundle.metadata(shard.path).get("basis_sha256")
        except BundleDamaged:
            return  # _tensors has said so
        if named != shard.basis_sha256:
            self._found("wrong-basis", shard.path, f"its cores belong to the basis {named}, not to {cluster.basis}")

    def _modules(self, cluster: ClusterEntry) -> list[ModuleEntry]:
        """The modules that any adapter of the cluster has."""
        manifest = self.bundle.manifest
        sets = {manifest.adapters[index].module_set for shard in cluster.shards for index in shard.adapters}
        return [manifest.modules[index] for index in sorted({i for each in sets for i in manifest.module_sets[each]})]

    def _config(self, adapter: AdapterEntry) -> None:
        if adapter.config in self._sound:
            try:
                self.bundle.config(adapter)
            except BundleDamaged as error:
                self._unreadable(adapter.config, error)

    def _extras(self, path: str) -> None:
        """A file of extras, which several adapters may share."""
        try:
            self.bundle.names(path)
        except BundleDamaged as error:
            self._unreadable(path, error)

    def _individual(self, adapter: AdapterEntry) -> None:
        """The file of an adapter that has one of its own."""
        path = adapter.individual
        if path is None or path not in self._sound:
            return
        scheme = self.bundle.scheme(adapter)
        expected = self._expected(
            self.bundle.modules(adapter), lambda module: scheme.own_tensors(_size(module), adapter.rank or 0)
        )
        found: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
        for (module, suffix), tensor in self._tensors(path, expected):
            found[module][suffix] = tuple(tensor.shape)
        self._consistent(path, scheme, scheme.own, found)

    def _fits(self, path: str, scheme: PackedScheme) -> bool:
        """Whether a file in which several adapters are packed has the tensors of one."""
        if path not in self._sound:
            return False
        expected = {
            ("", suffix): spec for suffix, spec in scheme.file_tensors(len(self.bundle.packed_in(path))).items()
        }
        return len(list(self._tensors(path, expected))) == len(expected)

    def _packed(self, schemes: dict[str, PackedScheme]) -> None:
        """What is in files in which several adapters are packed, of which several are unpacked at once."""

        def ranks(path: str) -> list[int] | BundleDamaged:
            try:
                unpacked = self.bundle.unpacked_in(path).values()
            except BundleDamaged as error:
                return error
            return [schemes[path].stored_rank(each.joined) for each in unpacked]

        with closing(in_order(ranks, schemes, torch.device("cpu"), workers=_UNPACKERS)) as results:
            for path, found in zip(schemes, results, strict=True):
                if isinstance(found, BundleDamaged):
                    self._unreadable(path, found)
                    continue
                for adapter, rank in zip(self.bundle.packed_in(path), found, strict=True):
                    if rank != adapter.rank:
                        message = f"adapter {adapter.name!r} has rank {rank}, but the manifest says {adapter.rank}"
                        self._found("wrong-rank", path, message)

    def _expected(
        self, modules: Iterable[ModuleEntry], specs: Callable[[ModuleEntry], dict[str, TensorSpec]]
    ) -> dict[tuple[str, str], TensorSpec]:
        """What a file must have, by module and suffix."""
        return {(module.name, suffix): spec for module in modules for suffix, spec in specs(module).items()}

    def _tensors(
        self, path: str, expected: dict[tuple[str, str], TensorSpec]
    ) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Read a file's tensors one by one, report what is not as expected, and yield what is."""
        try:
            names = set(self.bundle.names(path))
        except BundleDamaged as error:
            self._unreadable(path, error)
            return
        for name in sorted(names - set(map(_name, expected))):
            self._found("unexpected-tensor", path, f"tensor {name} belongs to nothing in the manifest")
        for key, spec in expected.items():
            name = _name(key)
            if name not in names:
                self._found("missing-tensor", path, f"tensor {name} is not there")
                continue
            tensor = self.bundle.tensor(path, name)
            if fault := fault_of(tensor, spec, self._dtype):
                self._found(fault.kind, path, f"tensor {name} {fault.message}")
            else:
                yield key, tensor


def _name(key: tuple[str, str]) -> str:
    """Of a tensor, from its module, which may be none, and its suffix."""
    return ".".join(filter(None, key))


def _size(module: ModuleEntry) -> Size:
    return Size(module.d_out, module.d_in)
