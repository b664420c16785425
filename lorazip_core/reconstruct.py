"""The decoder: an adapter's update, as factors, out of a bundle. It knows nothing of how the bundle was made."""

from __future__ import annotations

import torch

from .bundle import AdapterEntry, Bundle
from .linalg import Factors


def decode(bundle: Bundle, adapter: AdapterEntry, module: str, dtype: torch.dtype = torch.float32) -> Factors:
    """B̂ [d_out, k] and Â [k, d_in] with ΔŴ = B̂ Â, computed in ``dtype``.

    For a shared basis B̂ = U Σ and Â = Vᵀ; for an adapter kept individually its own factors, the scale folded into B̂.
    """
    if adapter.cluster is None:
        b, a, scale = bundle.individual(adapter, module)
        return b.to(dtype) * scale, a.to(dtype)
    cluster = bundle.manifest.clusters[adapter.cluster]
    u, v = (basis.to(dtype) for basis in bundle.basis(cluster, module))
    core = bundle.core(adapter, module).to(dtype)
    return (u * core if cluster.method == "diag" else u @ core), v.mT
