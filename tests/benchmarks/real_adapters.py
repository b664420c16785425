"""The real adapters that the benchmarks measure or imitate; they are beside the repository, not part of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorazip_core.adapter.collection import Collection, open_collection
from lorazip_core.maths.factored import truncated_svd

DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "data" / "smollm2-r16"
NONE_THERE = 2


class Svds(NamedTuple):
    """D_i = U_i diag(s_i) V_iᵀ of n adapters in one module: [n, d_out, r], [n, r] descending, [n, d_in, r]."""

    u: Tensor
    s: Tensor
    v: Tensor

    def subset(self, members: slice) -> Svds:
        return Svds(self.u[members], self.s[members], self.v[members])

    def unit(self) -> list[tuple[Tensor, Tensor]]:
        """Factors B, A of every D_i / ‖D_i‖."""
        b = self.u * (self.s / self.s.norm(dim=1, keepdim=True))[:, None, :]
        return [(b[i], self.v[i].mT.contiguous()) for i in range(len(b))]


def require(folder: Path) -> Path:
    """``folder``, or exit 2 and say on stderr that it is not there."""
    if not folder.is_dir():
        print(f"the real adapters are not there: no {folder}", file=sys.stderr)
        raise SystemExit(NONE_THERE)
    return folder


def open_real(folder: Path) -> Collection:
    """The collection; ValueError unless every adapter has every module at one rank and of linear kind."""
    collection = open_collection(folder)
    names = {module.name for module in collection.modules}
    ranks = {part.rank for adapter in collection.adapters for part in adapter.parts.values()}
    if len(ranks) != 1 or any(adapter.parts.keys() != names for adapter in collection.adapters):
        raise ValueError(f"{folder}: only adapters of equal rank and modules can be imitated")
    if any(module.kind != "linear" for module in collection.modules):
        raise ValueError(f"{folder}: only linear modules can be imitated")
    return collection


def svds(collection: Collection, module: str) -> Svds:
    """Of every update of one module, scale included, in float32."""
    factors = [adapter.factors(module) for adapter in collection.adapters]
    b, a = torch.stack([b for b, _ in factors]), torch.stack([a for _, a in factors])
    us, vt = truncated_svd(b, a, a.shape[1])
    s = us.norm(dim=1)
    return Svds(us / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None, :], s, vt.mT)
