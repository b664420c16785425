"""The decoder: an adapter's update, as factors, out of a bundle. It knows nothing of how the bundle was made."""

from __future__ import annotations

import torch
from torch import Tensor

from .bundle import AdapterEntry, Bundle
from .linalg import Factors


def decode(bundle: Bundle, adapter: AdapterEntry, module: str, dtype: torch.dtype = torch.float32) -> Factors:
    """B̂ [d_out, k] and Â [k, d_in] with ΔŴ = B̂ Â, computed in ``dtype``.

    For a shared basis as `decode_shared` has them; for an adapter kept individually its own factors, the scale folded
    into B̂.
    """
    if adapter.cluster is None:
        b, a, scale = bundle.individual(adapter, module)
        return b.to(dtype) * scale, a.to(dtype)
    cluster = bundle.manifest.clusters[adapter.cluster]
    u, v = (basis.to(dtype) for basis in bundle.basis(cluster, module))
    return decode_shared(cluster.method, u, v, bundle.core(adapter, module).to(dtype))


def decode_shared(method: str, u: Tensor, v: Tensor, cores: Tensor) -> Factors:
    """B̂ = U Σ [..., d_out, R_V] and Â = Vᵀ [R_V, d_in] for any number of cores Σ [..., R_U, R_V].

    For the ``method`` ``diag`` cores are diagonals [..., R]. U is [d_out, R_U] and V [d_in, R_V].
    """
    return (u * cores.unsqueeze(-2) if method == "diag" else u @ cores), v.mT
