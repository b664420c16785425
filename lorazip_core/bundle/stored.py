"""The tensors that an update is decoded from, each held against what its scheme and the manifest say of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..base.errors import BundleDamaged
from ..base.safetensors_header import TORCH_DTYPES
from ..schemes.registry import SCHEMES
from ..schemes.scheme import ANY, Fault, Scheme, Shape, Size, TensorSpec
from .manifest import AdapterEntry, ClusterEntry, ModuleEntry, ShardEntry
from .reader import Bundle
from .tensor_file import DTYPES
from .unpacked import Unpacked


def stored(bundle: Bundle, adapter: AdapterEntry, module: ModuleEntry) -> dict[str, Tensor]:
    """An adapter's own tensors of a module and those that it shares, by the suffixes of its scheme.

    Raises BundleDamaged for tensors that are not as the manifest says, which would decode to another update or none.
    """
    scheme, own = bundle.scheme(adapter), bundle.own(adapter, module.name)
    if adapter.cluster is None:
        _check_individual(bundle, adapter, module, own)
        return own
    cluster, shard = bundle.manifest.clusters[adapter.cluster], bundle.shard(adapter)
    shared = stored_shared(bundle, cluster, module)
    _check_basis(bundle, cluster, shard)
    specs = scheme.own_tensors(Size(module.d_out, module.d_in), cluster.rank, _shapes(shared))
    _check(bundle, shard.path, module, own, specs)
    tensors = own | shared
    _check_together(bundle, shard.path, module, scheme, _shapes(tensors))
    return tensors


def check_unpacked(bundle: Bundle, unpacked: Mapping[int, Unpacked]) -> None:
    """Raise as `stored` for the adapters of a file of several, ``unpacked`` from it by their indices.

    Modules that are alike are checked once.
    """
    alike: set[object] = set()
    for index, each_unpacked in unpacked.items():
        adapter, joined = bundle.manifest.adapters[index], each_unpacked.joined
        shapes = np.concatenate([each.shapes for each in joined.values()], 1).tolist()
        all_finite = all(finite(each.flat) for each in joined.values())
        for place, (module, shape) in enumerate(zip(bundle.modules(adapter), shapes, strict=True)):
            key = adapter.rank, module.d_out, module.d_in, *shape
            if key not in alike or not all_finite:
                _check_individual(bundle, adapter, module, {suffix: each[place] for suffix, each in joined.items()})
                alike.add(key)


def stored_shared(bundle: Bundle, cluster: ClusterEntry, module: ModuleEntry) -> dict[str, Tensor]:
    """What the adapters of a cluster share of a module, by suffix. Raises as `stored`."""
    scheme, shared = SCHEMES[cluster.method], bundle.shared(cluster, module.name)
    specs = scheme.shared_tensors(Size(module.d_out, module.d_in), cluster.rank)
    _check(bundle, cluster.basis, module, shared, specs)
    _check_together(bundle, cluster.basis, module, scheme, _shapes(shared))
    return shared


def stored_stacked(
    bundle: Bundle, cluster: ClusterEntry, shard: ShardEntry, module: ModuleEntry, shared: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The own tensors of all adapters of a shard, stacked by `Bundle.rows`, by suffix. Raises as `stored`.

    ``shared`` is what they share of the module.
    """
    scheme, own = SCHEMES[cluster.method], bundle.stacked(shard, module.name)
    _check_basis(bundle, cluster, shard)
    count, size = len(bundle.rows(shard, module.name)), Size(module.d_out, module.d_in)
    specs = scheme.own_tensors(size, cluster.rank, _shapes(shared))
    specs = {suffix: TensorSpec((count, *spec.shape), spec.dtypes) for suffix, spec in specs.items()}
    _check(bundle, shard.path, module, own, specs)
    of_one = {suffix: shape[1:] for suffix, shape in _shapes(own).items()}
    _check_together(bundle, shard.path, module, scheme, of_one | _shapes(shared))
    return own


def fault_of(tensor: Tensor, spec: TensorSpec, dtype: torch.dtype) -> Fault | None:
    """Why a tensor is not what ``spec`` and the ``dtype`` of the bundle say, as the end of a sentence about it."""
    allowed = [TORCH_DTYPES[each] for each in spec.dtypes] or [dtype]
    if not spec.fits(tensor.shape):
        return Fault("wrong-shape", f"is {list(tensor.shape)}, not {_shown(spec.shape)}")
    if tensor.dtype not in allowed:
        return Fault("wrong-dtype", f"is {tensor.dtype}, not {' or '.join(map(str, allowed))}")
    return None if finite(tensor) else Fault("not-finite", "has NaN or Inf")


def finite(tensor: Tensor) -> bool:
    """No NaN or Inf: one pass, and only if the sum is neither a second one, as it can overflow."""
    if not tensor.is_floating_point():
        return True
    total = tensor.sum(dtype=torch.float64)
    return bool(total.isfinite() or tensor.isfinite().all())


def _check_individual(bundle: Bundle, adapter: AdapterEntry, module: ModuleEntry, own: Mapping[str, Tensor]) -> None:
    scheme, file = bundle.scheme(adapter), str(adapter.individual)
    _check(bundle, file, module, own, scheme.own_tensors(Size(module.d_out, module.d_in), adapter.rank or 0))
    _check_together(bundle, file, module, scheme, _shapes(own))


def _check_basis(bundle: Bundle, cluster: ClusterEntry, shard: ShardEntry) -> None:
    if (basis := bundle.metadata(shard.path).get("basis_sha256")) != shard.basis_sha256:
        raise BundleDamaged(
            f"{bundle.path / shard.path}: its cores belong to the basis {basis}, not to {cluster.basis}"
        )


def _check_together(
    bundle: Bundle, file: str, module: ModuleEntry, scheme: Scheme, shapes: Mapping[str, Shape]
) -> None:
    if contradiction := scheme.contradiction(shapes):
        raise BundleDamaged(f"{bundle.path / file}: module {module.name}: {contradiction}")


def _check(
    bundle: Bundle, file: str, module: ModuleEntry, tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]
) -> None:
    dtype = DTYPES[bundle.manifest.parameters.dtype]
    for suffix, spec in specs.items():
        if fault := fault_of(tensors[suffix], spec, dtype):
            raise BundleDamaged(
                f"{bundle.path / file}: tensor {module.name}.{suffix} {fault.message}",
                "restore the bundle, or compress again; 'lorazip verify' names all damage",
            )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}


def _shown(shape: tuple[int | range, ...]) -> str:
    return f"[{', '.join(map(_shown_size, shape))}]"


def _shown_size(size: int | range) -> str:
    if size == ANY:
        return "r"
    return f"{size[0]}..{size[-1]}" if isinstance(size, range) else str(size)
