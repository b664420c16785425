"""The tensors that an update is decoded from, each held against what its scheme and the manifest say of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.errors import BundleDamaged
from ..base.safetensors_header import TORCH_DTYPES
from ..schemes.scheme import ANY, Fault, Shape, Size, TensorSpec
from .manifest import AdapterEntry, ModuleEntry
from .reader import Bundle
from .tensor_file import DTYPES


def stored(bundle: Bundle, adapter: AdapterEntry, module: ModuleEntry) -> dict[str, Tensor]:
    """An adapter's own tensors of a module and those that it shares, by the suffixes of its scheme.

    Raises BundleDamaged for tensors that are not as the manifest says, which would decode to another update or none.
    """
    scheme, size = bundle.scheme(adapter), Size(module.d_out, module.d_in)
    own = bundle.own(adapter, module.name)
    if adapter.cluster is None:
        _check(bundle, str(adapter.individual), module, own, scheme.own_tensors(size, adapter.rank or 0))
        tensors, file = own, str(adapter.individual)
    else:
        cluster = bundle.manifest.clusters[adapter.cluster]
        shard = bundle.shard(adapter)
        shared, file = bundle.shared(cluster, module.name), shard.path
        if (basis := bundle.metadata(file).get("basis_sha256")) != shard.basis_sha256:
            raise BundleDamaged(f"{bundle.path / file}: its cores belong to the basis {basis}, not to {cluster.basis}")
        _check(bundle, cluster.basis, module, shared, scheme.shared_tensors(size, cluster.rank))
        if contradiction := scheme.contradiction(_shapes(shared)):
            raise BundleDamaged(f"{bundle.path / cluster.basis}: module {module.name}: {contradiction}")
        _check(bundle, file, module, own, scheme.own_tensors(size, cluster.rank, _shapes(shared)))
        tensors = own | shared
    if contradiction := scheme.contradiction(_shapes(tensors)):
        raise BundleDamaged(f"{bundle.path / file}: module {module.name}: {contradiction}")
    return tensors


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


def _check(
    bundle: Bundle, file: str, module: ModuleEntry, tensors: dict[str, Tensor], specs: dict[str, TensorSpec]
) -> None:
    dtype = DTYPES[bundle.manifest.parameters.dtype]
    for suffix, spec in specs.items():
        if fault := fault_of(tensors[suffix], spec, dtype):
            raise BundleDamaged(
                f"{bundle.path / file}: tensor {module.name}.{suffix} {fault.message}",
                "restore the bundle, or compress again; 'lorazip verify' names all damage",
            )


def _shapes(tensors: dict[str, Tensor]) -> dict[str, Shape]:
    return {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}


def _shown(shape: tuple[int | range, ...]) -> str:
    return f"[{', '.join(map(_shown_size, shape))}]"


def _shown_size(size: int | range) -> str:
    if size == ANY:
        return "r"
    return f"{size[0]}..{size[-1]}" if isinstance(size, range) else str(size)
