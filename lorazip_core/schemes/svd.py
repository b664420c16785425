"""``svd``: every update by itself, truncated to its largest singular values: B̂ = U Σ and Â = Vᵀ.

Ranks follow the spectrum: of all components of an adapter, those are kept that are worth most by the element.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from .factors import FactorsScheme
from .scheme import Counting, Encoding, ModuleGroup, Shape, Size, SteppedScheme, Target, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..maths.factored import Factors
    from ..maths.spectrum import Spectrum


class Svd(FactorsScheme, SteppedScheme):
    """The best approximation of each update at its rank, before it is rounded."""

    name: ClassVar[str] = "svd"
    about: ClassVar[str] = "a truncated SVD of each update on its own, rank {rank}"
    has_own_rank: ClassVar[bool] = True
    default_rank: ClassVar[int | None] = 4

    def encodings(self, groups: Sequence[ModuleGroup], target: Target, dtype: torch.dtype) -> Iterable[Encoding]:
        """At the mean rank asked for, or with the components worth a step; then with ever more, from the fewest."""
        if target._replace(objective="disk") == Target():  # its factors take the same here and there
            return
        spectrum = _spectrum(groups)
        if target.step is not None:
            yield self._encode(groups, spectrum.ranks_worth(target.step), dtype)
            return
        if target.rank is not None:
            yield self._encode(groups, spectrum.ranks_within(target.rank), dtype)
        if target.limit is not None:
            count = spectrum.fewest(target.limit)
            while count <= len(spectrum.components):
                yield self._encode(groups, spectrum.ranks(count), dtype)
                count = max(count + 1, count + count // 64)  # rounding has cost what one component could not make good

    def _encode(self, groups: Sequence[ModuleGroup], ranks: Mapping[str, int], dtype: torch.dtype) -> Encoding:
        from ..base.stopping import check_stop
        from ..maths.encode import encode_individual

        encoding = Encoding({}, {}, ranks)
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

    def predicted(self, s: Tensor, size: Size, step: Tensor, counting: Counting) -> tuple[Tensor, Tensor]:
        """A component is kept if its energy is that of ``step`` in every element, or if it is its module's largest."""

        kept = s.square() >= sum(size) * step**2  # [m, r]
        kept[:, :1] = True
        return (~kept).double(), kept.sum(-1).double() * (8.0 * counting.itemsize * sum(size))

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        return tensors["B"].to(dtype), tensors["A"].to(dtype)

    def own_tensors(self, size: Size, rank: int, shared: Mapping[str, Shape] | None = None) -> dict[str, TensorSpec]:
        return {
            "B": TensorSpec((size.d_out, range(1, rank + 1))),
            "A": TensorSpec((range(1, rank + 1), size.d_in)),
        }


def _spectrum(groups: Sequence[ModuleGroup]) -> Spectrum:
    from ..maths.factored import singular_values
    from ..maths.spectrum import Component, Spectrum

    return Spectrum.of(
        Component(name, place, group.b.shape[1] + group.a.shape[2], energy)
        for group in groups
        for name, energies in zip(group.names, singular_values(*group.exact).square().tolist(), strict=True)
        for place, energy in enumerate(energies)
    )


def _by_rank(group: ModuleGroup, ranks: Mapping[str, int]) -> list[tuple[int, list[int]]]:
    """Every rank that modules of a group are to have, and the positions of these."""
    positions: defaultdict[int, list[int]] = defaultdict(list)
    for position, name in enumerate(group.names):
        positions[ranks[name]].append(position)
    return sorted(positions.items())
