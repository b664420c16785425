"""``manifest.json``: its fields as types, its digest, and the features a reader must know.

The types are the schema: docs/schemas/bundle-2.json is generated from them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..adapter.lock import Origin
from ..adapter.module import Module, Parameter
from ..base.digests import canonical_json, sha256_bytes
from ..base.errors import BundleDamaged, Unsupported
from ..base.text import megabytes
from ..schemes.registry import SCHEMES, methods
from ..schemes.scheme import Objective
from .kinds import FORMAT, MANIFEST_NAME, check_bundle_path

FORMAT_VERSION: Literal[2] = 2
"""What is written. Format 1 differs in what may be left out and shared, and is read as well."""
_READABLE = (1, 2)

Count = Annotated[int, Meta(ge=0)]
Size = Annotated[int, Meta(ge=1)]
# In Python `$` also matches before a line feed at the end, and JSON schemas know no `\Z`.
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?![\s\S])")]
InnerPath = Annotated[str, Meta(pattern=r"^(bases|cores|individual|extras|configs)/[a-z0-9][a-z0-9._-]*(?![\s\S])")]
SquaredError = Annotated[float, Meta(ge=0)]
Scheme = Annotated[str, Meta(extra_json_schema={"enum": sorted(SCHEMES)})]
Method = Annotated[str, Meta(extra_json_schema={"enum": sorted(methods())})]
SharedMethod = Annotated[str, Meta(extra_json_schema={"enum": sorted(n for n in methods() if SCHEMES[n].shared)})]
Weights = Literal["adapter", "module"]
Dtype = Literal["bf16", "f16", "f32"]

SHARED_EXTRAS = "shared-extras"
"""The feature of a bundle of format 1 in which adapters with equal extras name one file. In format 2 all may."""
# Per operation, the features, to read besides the schemes. What requires another one is refused, by its name.
KNOWN_FEATURES: dict[str, set[str]] = {
    "read": {SHARED_EXTRAS},
    "export": {"linear", "conv", "embedding", "extras", "target_parameters"},
}


class FileEntry(Struct, frozen=True):
    """A file of the bundle."""

    path: InnerPath
    size_bytes: Count
    sha256: Sha256
    rest_of: Sha256 | UnsetType = UNSET
    """Of what is left of a file since adapters were removed: the digest of that file, whose tensors these are, bit for
    bit."""

    @property
    def origin(self) -> str:
        """Its digest, or that of the file it is the rest of: what is in it was in that one."""
        return self.sha256 if self.rest_of is UNSET else self.rest_of


class SourceEntry(Struct, frozen=True):
    """A file that the adapter was read from, relative to its folder."""

    path: str
    size_bytes: Count
    sha256: Sha256


class ParameterEntry(Struct, frozen=True, omit_defaults=True):
    """What a module is of a parameter that is adapted without its module: the matrix itself, or one of its experts."""

    name: str
    """What the module that holds the parameter calls it."""
    expert: Count = 0
    experts: Size = 1


class ModuleEntry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A target module; its update is [d_out, d_in], a convolution's d_in being channels · ∏kernel."""

    name: str
    kind: Literal["linear", "conv", "embedding"] = "linear"
    d_out: Size
    d_in: Size
    kernel: list[Size] = []
    parameter: ParameterEntry | UnsetType = UNSET
    """Only of what is no module of the base model but a parameter, or a part of one."""

    @property
    def module(self) -> Module:
        """The module that this is the entry of."""
        of = None if self.parameter is UNSET else Parameter(*msgspec.structs.astuple(self.parameter))
        return Module(self.name, self.kind, self.d_out, self.d_in, tuple(self.kernel), of)


class ShardEntry(Struct, frozen=True):
    """Cores of some adapters of a cluster. A module's rows are the adapters of this list that have it, in order."""

    path: InnerPath
    adapters: list[Count]
    basis_sha256: Sha256


class ClusterEntry(Struct, frozen=True):
    """Adapters that share a basis."""

    method: SharedMethod
    rank: Size
    basis: InnerPath
    shards: list[ShardEntry]


class ModuleError(Struct, frozen=True):
    """The squared error of one module of an adapter."""

    name: str
    squared_error: SquaredError


class AdapterEntry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An adapter: where it came from, how it is kept, and what that costs."""

    name: str
    scheme: Scheme
    cluster: Count | None = None
    """Index into ``clusters``, or null for an adapter that is kept individually."""
    module_set: Count = 0
    """Index into ``module_sets``."""
    rank: Count | None = None
    """The largest rank of a module of its own; null for a shared basis and for the original factors."""
    individual: InnerPath | None = None
    """The file of its own tensors, which several adapters share if their scheme packs them."""
    extras: InnerPath | None = None
    config: InnerPath
    base_model: str | UnsetType | None = UNSET
    """What its configuration names, if not the ``base_model`` of the bundle."""
    files: list[SourceEntry]
    """What it was read from besides its configuration, of which the bundle has the bytes."""
    squared_norm: SquaredError
    """Σ over its modules of ‖ΔW‖_F²."""
    squared_error: SquaredError
    """Σ‖ΔW−ΔŴ‖² / Σ‖ΔW‖² over its modules, of what is stored; 0 for an adapter whose updates are all zero."""
    mean_module_squared_error: SquaredError
    """Mean over its modules of ‖ΔW−ΔŴ‖² / ‖ΔW‖²."""
    worst_module: ModuleError | None
    because: Literal["method", "max_error"] = "method"
    """Why it has its scheme: the method asked for, or that it would exceed ``max_error``, or the dtype, otherwise."""
    origin: Origin | None = None
    """Where the lock of ``fetch`` says that it comes from; the field is left out when that is not known."""
    left_out: list[str] = []
    """Files in its folder with weights that are not its own, and not in the bundle; the field is left out if none."""
    added: bool = False
    """Whether it was added to a bundle that was there already, so that no basis was fitted to it."""


class SkippedEntry(Struct, frozen=True):
    """An adapter that ``--skip-bad`` left out, or what looked like one: a link to one of the others, or to nothing."""

    name: str
    reason: str


class Parameters(Struct, frozen=True):
    """What the run was asked for. A reader needs no more of it than ``dtype``."""

    method: str
    """Perhaps one of a later version, none of whose adapters has it for its scheme."""
    rank: Size | None
    clusters: Count
    dtype: Dtype
    seed: int
    weights: Weights
    max_error: SquaredError | None
    max_mean_error: SquaredError | UnsetType = UNSET
    budget: Size | UnsetType = UNSET
    """Bytes of the bundle, or with the ``objective`` "resident" of what a device holds of it."""
    objective: Objective | UnsetType = UNSET
    """Which bytes were to be few; "disk" where it is left out."""
    calibration: Sha256 | UnsetType = UNSET
    """The digest of the moments of inputs that errors were weighted by."""

    @property
    def aims(self) -> list[str]:
        """What was wanted of sizes and errors, in words."""
        found = []
        if self.max_error is not None:
            found.append(f"no adapter's squared error above {self.max_error:g}")
        if self.max_mean_error is not UNSET:
            found.append(f"a mean squared error of at most {self.max_mean_error:g}")
        resident = self.objective == "resident"
        if self.budget is not UNSET:
            found.append(f"at most {megabytes(self.budget)}{' on a device' if resident else ''}")
        elif resident:
            found.append("few bytes on a device")
        if self.calibration is not UNSET:
            found.append(f"errors of outputs, by moments {self.calibration[:12]}")
        return found


class Manifest(Struct, frozen=True, kw_only=True):
    """All of ``manifest.json`` but its own digest."""

    format: Literal["lorazip.bundle"] = FORMAT
    format_version: Literal[1, 2] = FORMAT_VERSION
    created_by: str
    requires: dict[str, list[str]]
    base_model: str | None
    parameters: Parameters
    modules: list[ModuleEntry]
    module_sets: list[list[Count]]
    """Distinct lists of indices into ``modules``, ascending."""
    clusters: list[ClusterEntry]
    adapters: list[AdapterEntry]
    skipped: list[SkippedEntry]
    files: list[FileEntry]

    def base_model_of(self, adapter: AdapterEntry) -> str | None:
        """What the configuration of an adapter names as its base model."""
        return self.base_model if adapter.base_model is UNSET else adapter.base_model


def required_to_read(adapters: list[AdapterEntry]) -> list[str]:
    """The features that reading a bundle of these adapters requires."""
    return sorted({adapter.scheme for adapter in adapters})


def required_to_export(modules: list[ModuleEntry], adapters: list[AdapterEntry]) -> list[str]:
    """The features that exporting these adapters of these modules requires."""
    features: set[str] = {module.kind for module in modules}
    if any(module.parameter is not UNSET for module in modules):
        features.add("target_parameters")
    if any(adapter.extras is not None for adapter in adapters):
        features.add("extras")
    return sorted(features)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``: canonical JSON with ``manifest_sha256``, the digest of the rest."""
    fields: dict[str, Any] = msgspec.to_builtins(manifest)
    return canonical_json(fields | {"manifest_sha256": sha256_bytes(canonical_json(fields))})


def read_manifest(bundle: Path, operations: tuple[str, ...]) -> Manifest:
    """Read and check ``manifest.json`` on its own.

    Raises UsageError for what is no bundle at all, BundleDamaged when the manifest is missing or not what was written,
    and Unsupported for another format version or an unknown feature that one of ``operations`` requires.
    """
    path = bundle / MANIFEST_NAME
    check_bundle_path(bundle)
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise BundleDamaged(f"{path}: no such file: not a lorazip bundle, or an unfinished one") from None
    try:
        fields = json.loads(data)
        claimed = fields.pop("manifest_sha256")
        canonical = canonical_json(fields | {"manifest_sha256": claimed})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BundleDamaged(f"{path}: not the JSON of a manifest", "restore the bundle, or compress again") from None
    if data != canonical or claimed != sha256_bytes(canonical_json(fields)):
        raise BundleDamaged(f"{path}: does not match its own digest", "restore the bundle, or compress again")
    _refuse_unknown(path, fields, operations)
    try:
        manifest = msgspec.convert(fields, Manifest)
    except msgspec.ValidationError as error:
        raise BundleDamaged(f"{path}: {error}") from None
    _check_references(path, manifest)
    return manifest


def _refuse_unknown(path: Path, fields: dict[str, Any], operations: tuple[str, ...]) -> None:
    if fields.get("format") != FORMAT:
        raise BundleDamaged(f"{path}: format is {fields.get('format')!r}, not {FORMAT!r}")
    if fields.get("format_version") not in _READABLE:
        readable = " and ".join(map(str, _READABLE))
        raise Unsupported(
            f"{path}: bundle format {fields.get('format_version')!r}; this lorazip reads formats {readable}",
            "update lorazip",
        )
    requires = fields.get("requires")
    if not isinstance(requires, dict):
        return  # the conversion that follows says what is wrong
    for operation in operations:
        features = requires.get(operation, [])
        for feature in features if isinstance(features, list) else ():
            known = KNOWN_FEATURES[operation] | (SCHEMES.keys() if operation == "read" else set())
            if isinstance(feature, str) and feature not in known:
                raise Unsupported(f"{path}: {operation} needs the feature {feature!r}", "update lorazip")


def _check_references(path: Path, manifest: Manifest) -> None:
    """Indices and paths that point at nothing would surface later as a crash; they are damage."""
    listed = {entry.path for entry in manifest.files}
    shards = [shard for cluster in manifest.clusters for shard in cluster.shards]
    named = {cluster.basis for cluster in manifest.clusters} | {shard.path for shard in shards}
    in_shards = sorted(index for shard in shards for index in shard.adapters)
    in_clusters = []
    for index, adapter in enumerate(manifest.adapters):
        if adapter.scheme not in SCHEMES:
            raise BundleDamaged(f"{path}: adapter {adapter.name!r}: {_no_scheme(adapter.scheme)}")
        shared = bool(SCHEMES[adapter.scheme].shared)
        if shared:
            in_clusters.append(index)
        if shared != (adapter.cluster is not None) or shared == (adapter.individual is not None):
            raise BundleDamaged(f"{path}: adapter {adapter.name!r} is neither in a cluster nor individual")
        beyond = adapter.cluster is not None and adapter.cluster >= len(manifest.clusters)
        if beyond or adapter.module_set >= len(manifest.module_sets):
            raise BundleDamaged(f"{path}: adapter {adapter.name!r} points at nothing")
        named |= {adapter.config, *filter(None, (adapter.individual, adapter.extras))}
    for number, cluster in enumerate(manifest.clusters):
        if cluster.method not in SCHEMES or not SCHEMES[cluster.method].shared:
            raise BundleDamaged(f"{path}: cluster {number}: {_no_scheme(cluster.method)} of clusters")
        for shard in cluster.shards:
            for index in shard.adapters:
                if index >= len(manifest.adapters) or manifest.adapters[index].cluster != number:
                    raise BundleDamaged(f"{path}: {shard.path} holds an adapter that is not of its cluster")
    if in_shards != in_clusters or named != listed or len(listed) != len(manifest.files):
        raise BundleDamaged(f"{path}: its lists of files and adapters contradict each other")
    if any(index >= len(manifest.modules) for indices in manifest.module_sets for index in indices):
        raise BundleDamaged(f"{path}: a module set points at nothing")
    if len({adapter.name for adapter in manifest.adapters}) != len(manifest.adapters):
        raise BundleDamaged(f"{path}: two adapters have one name")


def _no_scheme(name: str) -> str:
    return f"{name!r} is no scheme"
