"""A collection as `frontier.py` sees it: updates by module, what any bundle must keep besides, and Shannon's bound.

The bound is reverse water-filling over Gaussian components. A component s·u·vᵀ whose u is known up to a relative
squared error of δ, and v up to ε, each the best reproduction at that rate, is known up to

    s² (1 − (1−δ)(1−ε))   at   ½ d_out log₂ 1/δ + ½ d_in log₂ 1/ε   bits.

For a price λ of a bit the least of error + λ · bits has a closed form: with a = λ d_out / (2 ln 2 s²) and b the same of
d_in, δ(1−ε) = a and ε(1−δ) = b. A component that does not pay is dropped. Signs, orders, scales, names and which
components there are cost nothing, so no scheme that codes each adapter on its own can do better; one that shares
between adapters might.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lorazip_core.adapter.collection import Collection
from lorazip_core.maths.factored import TINY, truncated_svd

_HALVINGS = 60


class Stack(NamedTuple):
    """The updates of one module: ΔW_i = B_i A_i with B [n, d_out, R], A [n, R, d_in] in float32, the scale in B.

    R is the largest rank of the collection; columns beyond an adapter's own rank are zero.
    """

    b: Tensor
    a: Tensor
    adapters: Tensor  # [n]: numbers
    ranks: Tensor  # [n]

    @property
    def sides(self) -> tuple[int, int]:
        return self.b.shape[1], self.a.shape[2]

    @property
    def parameters(self) -> Tensor:
        """Numbers in the factors of each, [n]."""
        return self.ranks * sum(self.sides)

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """s [n, R], and s^½ u and s^½ v as rows, [n, R, d_out] and [n, R, d_in]."""
        us, vt = truncated_svd(self.b, self.a, self.b.shape[2])
        s = us.norm(dim=1)
        root = s.sqrt()
        us = us / root.clamp_min(torch.finfo(s.dtype).tiny)[:, None, :]
        return s, us.mT.contiguous(), vt * root[:, :, None]


def stacks(collection: Collection) -> Iterator[Stack]:
    """One for each module that any adapter has."""
    widest = max(part.rank for adapter in collection.adapters for part in adapter.parts.values())
    for module in collection.modules:
        having = [i for i, adapter in enumerate(collection.adapters) if module.name in adapter.parts]
        ranks = [collection.adapters[i].parts[module.name].rank for i in having]
        b = torch.zeros(len(having), module.d_out, widest)
        a = torch.zeros(len(having), widest, module.d_in)
        for row, (i, rank) in enumerate(zip(having, ranks, strict=True)):
            b[row, :, :rank], a[row, :rank] = collection.adapters[i].factors(module.name)
        yield Stack(b, a, torch.tensor(having), torch.tensor(ranks))


def besides(collection: Collection) -> int:
    """Bytes of what any bundle must keep besides updates, as tightly as can be: deflated text, tensors once.

    Names of adapters and modules, shapes, each distinct configuration once, and each distinct tensor that is no factor.
    """
    text = {
        "modules": [[module.name, module.d_out, module.d_in] for module in collection.modules],
        "adapters": [adapter.name for adapter in collection.adapters],
        "configs": sorted({adapter.config_text.decode() for adapter in collection.adapters}),
    }
    tensors = {
        adapter.extra(key).contiguous().view(torch.uint8).numpy().tobytes()
        for adapter in collection.adapters
        for key in adapter.extras
    }
    return len(zlib.compress(json.dumps(text).encode(), 9)) + sum(map(len, tensors))


@dataclass
class Spectra:
    """Singular values of all updates of ``count`` adapters, gathered stack by stack."""

    count: int
    _rows: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self._rows = [[] for _ in range(self.count)]

    def add(self, stack: Stack, s: Tensor) -> None:
        d_out, d_in = stack.sides
        for row, i in enumerate(stack.adapters.tolist()):
            own = s[row, : int(stack.ranks[row])].double()
            sizes = torch.tensor([d_out, d_in], dtype=torch.float64).expand(len(own), 2)
            self._rows[i].append(torch.cat([own[:, None], sizes], dim=1))

    def _padded(self) -> Tensor:
        """[adapters, components, 3]: s, d_out, d_in; padded with components of no size."""
        each = [torch.cat(rows) for rows in self._rows]
        longest = max(map(len, each))
        return torch.stack([torch.nn.functional.pad(rows, (0, 0, 0, longest - len(rows))) for rows in each])

    @property
    def energies(self) -> Tensor:
        """‖ΔW‖² of each adapter, [n]."""
        return torch.stack([torch.cat(rows)[:, 0].square().sum() for rows in self._rows])

    @property
    def parameters(self) -> Tensor:
        """Numbers in the factors of each adapter, [n]."""
        return torch.stack([torch.cat(rows)[:, 1:].sum() for rows in self._rows]).long()

    def bound(self, smaller: float) -> Tensor:
        """The least squared error of each adapter, [n], in so much less than its factors in bf16."""
        every = self._padded()
        shares = every[..., 0].square() / self.energies.clamp_min(TINY)[:, None]
        return _least(shares, every[..., 1], every[..., 2], 16 / smaller * self.parameters)

    def bound_of_the_mean(self, bits: float) -> float:
        """The least mean squared error with ``bits`` in all, wherever they go."""
        every = self._padded()
        shares = every[..., 0].square() / self.energies.clamp_min(TINY)[:, None] / self.count
        shares, d_out, d_in = (part.reshape(1, -1) for part in (shares, every[..., 1], every[..., 2]))
        return float(_least(shares, d_out, d_in, torch.tensor([bits], dtype=torch.float64)))


def _least(shares: Tensor, d_out: Tensor, d_in: Tensor, bits: Tensor) -> Tensor:
    """The least Σ of errors, [n], of components [n, K] within ``bits`` [n].

    What is returned is the dual function, error + λ (bits used − bits), at the best λ: never more than the true least.
    """
    low = torch.full_like(bits, -80.0, dtype=torch.float64)  # log₂ λ
    high = torch.full_like(low, 10.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        _, used = _priced(shares, d_out, d_in, middle.exp2())
        dear = used <= bits
        low, high = torch.where(dear, low, middle), torch.where(dear, middle, high)
    error, used = _priced(shares, d_out, d_in, high.exp2())
    return error + high.exp2() * (used - bits)


def _priced(shares: Tensor, d_out: Tensor, d_in: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
    """Errors and bits, [n] each, of what is best where a bit costs ``price`` [n]."""
    each = price[:, None] / (2 * math.log(2) * shares.clamp_min(TINY))
    a, b = each * d_out, each * d_in
    inside = (1 + a - b).square() - 4 * a
    root = inside.clamp_min(0).sqrt()
    delta = (2 * a / (1 + a - b + root)).clamp(TINY, 1)
    epsilon = (2 * b / (1 - a + b + root)).clamp(TINY, 1)
    error = shares * (delta + epsilon - delta * epsilon)
    bits = -(d_out * delta.log2() + d_in * epsilon.log2()) / 2
    pays = (inside > 0) & (a + b < 1) & (error + price[:, None] * bits < shares)
    return torch.where(pays, error, shares).sum(-1), torch.where(pays, bits, 0.0).sum(-1)
