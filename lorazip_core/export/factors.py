"""The factors that an export writes, and how far they are from what the bundle stores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..base.errors import Unsupported
from ..bundle.decoder import decode
from ..bundle.manifest import AdapterEntry, ModuleEntry
from ..bundle.reader import Bundle
from ..bundle.stored import stored
from ..bundle.tensor_file import DTYPES
from ..maths.factored import Factors, squared_distance, squared_norm, truncated_svd


class Written(NamedTuple):
    """An update as it is written, scale · B A with B [d_out, r] and A [r, d_in] in the dtype of the export.

    ``moved`` is its squared distance to the update that the bundle stores, in float64: exactly 0 if it is the same.
    """

    b: Tensor
    a: Tensor
    scale: float
    moved: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def padded(self, rank: int) -> Written:
        """The same update with rows and columns of zeros up to ``rank``."""
        missing = rank - self.rank
        b, a = torch.nn.functional.pad(self.b, (0, missing)), torch.nn.functional.pad(self.a, (0, 0, 0, missing))
        return self._replace(b=b, a=a)


def own_factors(bundle: Bundle, adapter: AdapterEntry, module: ModuleEntry, dtype: str | None) -> Written:
    """The factors and scale of an adapter whose scheme keeps them: bit for bit, unless another dtype is asked for."""
    tensors = stored(bundle, adapter, module)
    b, a, scale = tensors["B"], tensors["A"], float(tensors["scale"])
    if dtype is None:
        return Written(b, a, scale, 0.0)
    stored_b, stored_a = _rounded(bundle, adapter, module, (b, a), (DTYPES[dtype], DTYPES[dtype]))
    return Written(stored_b, stored_a, scale, scale**2 * _moved_by_rounding((b, a), (stored_b, stored_a)))


def folded_factors(
    bundle: Bundle, adapter: AdapterEntry, module: ModuleEntry, rank: int | None, dtype: str | None
) -> Written:
    """The decoded factors with the scale folded into B, truncated to ``rank`` and rounded to ``dtype``.

    Without ``dtype`` they get that of the bundle, and those that a scheme keeps their own.
    """
    exact = decode(bundle, adapter, module, torch.float64)
    if dtype is not None:
        dtypes = DTYPES[dtype], DTYPES[dtype]
    elif bundle.scheme(adapter).keeps_factors:
        own = bundle.own(adapter, module.name)
        dtypes = own["B"].dtype, own["A"].dtype
    else:
        dtypes = (DTYPES[bundle.manifest.parameters.dtype],) * 2
    if rank is None or rank >= exact[1].shape[0]:
        stored = _rounded(bundle, adapter, module, exact, dtypes)
        return Written(*stored, 1.0, _moved_by_rounding(exact, stored))
    stored = _rounded(bundle, adapter, module, truncated_svd(*exact, rank), dtypes)
    return Written(*stored, 1.0, float(squared_distance(exact, stored)))


def _moved_by_rounding(exact: Factors, rounded: Factors) -> float:
    """‖B A − B' A'‖² of factors and the same ones rounded.

    B A − B' A' = (B − B') A' + B (A − A'), in which nothing cancels, and which is 0 if nothing was rounded.
    """
    (b, a), (rounded_b, rounded_a) = ((x.double(), y.double()) for x, y in (exact, rounded))
    off_b, off_a = b - rounded_b, a - rounded_a
    if not off_a.any():
        return float(squared_norm(off_b, rounded_a)) if off_b.any() else 0.0
    return float(squared_norm(torch.cat([off_b, b], 1), torch.cat([rounded_a, off_a])))


def _rounded(
    bundle: Bundle,
    adapter: AdapterEntry,
    module: ModuleEntry,
    factors: Factors,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Factors:
    b, a = (factor.to(dtype) for factor, dtype in zip(factors, dtypes, strict=True))
    for factor in (b, a):
        if not torch.isfinite(factor).all():
            dtype_name = str(factor.dtype).removeprefix("torch.")
            raise Unsupported(
                f"{bundle.path}: adapter {adapter.name!r}: the factors of {module.name} do not fit into {dtype_name}",
                "choose another «dtype»",
            )
    return b, a
