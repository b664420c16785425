"""``svd``: every update by itself, truncated to its largest singular values: B̂ = U Σ and Â = Vᵀ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from .factors import FactorsScheme
from .scheme import Encoding, ModuleGroup, Ranks, Shape, Size, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..maths.factored import Factors


class Svd(FactorsScheme):
    """The best approximation of each update at its rank, before it is rounded."""

    name: ClassVar[str] = "svd"
    about: ClassVar[str] = "a truncated SVD of each update on its own, rank {rank}"
    default_rank: ClassVar[int | None] = 4

    def attempts(self, groups: Sequence[ModuleGroup], rank: int | None, limit: float | None) -> Iterable[Ranks]:
        """The rank asked for, then one rank for all modules from the smallest that may do."""
        names = [name for group in groups for name in group.names]
        if rank is not None:
            yield dict.fromkeys(names, rank)
        if limit is not None:
            for candidate in range(_smallest_rank(groups, limit), max(group.rank for group in groups) + 1):
                yield dict.fromkeys(names, candidate)

    def encode(self, groups: Sequence[ModuleGroup], ranks: Ranks, dtype: torch.dtype) -> Encoding:
        from ..base.stopping import check_stop
        from ..maths.encode import encode_individual

        assert ranks is not None
        encoding = Encoding({}, {})
        for group in groups:
            for rank, modules in _by_rank(group, ranks):
                check_stop()
                b, a = group.exact
                if len(modules) < len(group.names):
                    b, a = b[modules], a[modules]
                (stored_b, stored_a), lost = encode_individual(b, a, rank, dtype)
                names = [group.names[module] for module in modules]
                for name, own_b, own_a, error in zip(names, stored_b.cpu(), stored_a.cpu(), lost.tolist(), strict=True):
                    encoding.tensors[f"{name}.B"], encoding.tensors[f"{name}.A"] = own_b, own_a
                    encoding.squared_errors[name] = error
        return encoding

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        return tensors["B"].to(dtype), tensors["A"].to(dtype)

    def own_tensors(self, size: Size, rank: int, shared: Mapping[str, Shape] | None = None) -> dict[str, TensorSpec]:
        return {
            "B": TensorSpec((size.d_out, range(1, rank + 1))),
            "A": TensorSpec((range(1, rank + 1), size.d_in)),
        }


def _by_rank(group: ModuleGroup, ranks: Mapping[str, int]) -> list[tuple[int, list[int]]]:
    """Every rank that modules of a group are to have, and the positions of these."""
    positions: defaultdict[int, list[int]] = defaultdict(list)
    for position, name in enumerate(group.names):
        positions[ranks[name]].append(position)
    return sorted(positions.items())


def _smallest_rank(groups: Sequence[ModuleGroup], limit: float) -> int:
    """The least rank at which the exact truncated SVDs lose no more energy than ``limit``; rounding may need more."""
    import torch

    from ..maths.factored import truncated_svd

    energy = torch.zeros(max(group.rank for group in groups), dtype=torch.float64)
    for group in groups:
        spectrum = truncated_svd(*group.exact, group.rank)[0].double().square().sum(-2).sum(0).cpu()
        energy[: len(spectrum)] += spectrum
    lost = energy.flip(0).cumsum(0).flip(0)  # lost[r] is what a truncation at rank r loses
    return max(1, int((lost > limit).sum()))
