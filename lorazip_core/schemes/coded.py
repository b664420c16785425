"""``coded``: singular components quantised with one step, their codes entropy coded: ΔŴ = Σ_k 2^(scale_k/32) û_k v̂_kᵀ.

Ranks and bits follow the spectrum, see `maths.quantise`. A file holds several adapters, whose codes share streams, see
`coded_file`; unpacked, a module has û [k, d_out] and v̂ [k, d_in] of int8, and scales [k] of int16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from .factors import apply_rows, rows_of
from .scheme import (
    Counting,
    Encoding,
    JoinedTerms,
    ModuleGroup,
    Objective,
    PackedScheme,
    Shape,
    ShapeOf,
    Size,
    SteppedScheme,
    Target,
    TensorSpec,
    working_dtype,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..maths.factored import Factors
    from ..maths.quantise import Codes, Components, Losses
    from .joined import Joined

DEFAULT_ERROR = 0.1
"""The squared error of those who ask for nothing: up to it, no task was seen to suffer."""
_TYPICAL_BYTES = 0.55  # of each row and column of an update, for `Coded.default_error`
_TRIES = 6
_FIRST_AIM = 0.995  # of the limit: what is lost is within 1% of what is predicted
_NEAR = 0.985  # of the limit: nearer is not worth another try
_FINER = 0.8  # at least, when tries have not come below the limit: of few components, a little changes nothing


class Coded(PackedScheme, SteppedScheme):
    """The smallest for nearly any error: a truncated SVD whose ranks and bits follow the spectrum."""

    name: ClassVar[str] = "coded"
    about: ClassVar[str] = "quantised singular components of each update, up to {rank} of them"
    own: ClassVar[tuple[str, ...]] = ("u", "v", "scale")
    has_own_rank: ClassVar[bool] = True
    pads: ClassVar[bool] = True
    default_rank: ClassVar[int | None] = None
    default_error: ClassVar[float | None] = DEFAULT_ERROR
    uses_inputs: ClassVar[bool] = True

    def encodings(self, groups: Sequence[ModuleGroup], target: Target, dtype: torch.dtype) -> Iterable[Encoding]:
        """With the step asked for; else with the coarsest one that meets the limit, nearly."""
        components = _decomposed(groups)
        if target.step is not None:
            yield _encoding(groups, _tried(components, target.step, target.objective))
            return
        norm = sum(float(each.spectrum.energies.sum()) for each in components)
        if not norm:
            yield _encoding(groups, _tried(components, 1.0, target.objective))
            return
        limit = DEFAULT_ERROR * norm if target.limit is None else target.limit
        nearest = _near(components, limit, target.objective)
        if nearest is not None:
            yield _encoding(groups, nearest)

    def predicted(self, s: Tensor, size: Size, step: Tensor, counting: Counting) -> tuple[Tensor, Tensor]:
        return _quantiser(counting.objective).predicted_of(s, *size, step)

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        from ..maths.quantise import unpacked_scale

        u, v = tensors["u"].to(dtype), tensors["v"].to(dtype)
        if not u.shape[-2]:
            return u.new_zeros(*u.shape[:-2], u.shape[-1], 1), v.new_zeros(*v.shape[:-2], 1, v.shape[-1])
        return (u * unpacked_scale(tensors["scale"], dtype)[..., None]).mT, v

    def joined_terms(self, own: Mapping[str, Joined]) -> JoinedTerms:
        import torch

        from ..maths.quantise import unpacked_scale

        return JoinedTerms(own["u"], own["v"], unpacked_scale(own["scale"].flat, torch.float32))

    def resident(self, adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Components as `coded_resident` lays them out."""
        import torch

        from .coded_resident import CodedModule, lay_out

        modules = [CodedModule(*(own[suffix].numpy() for suffix in self.own)) for own in adapters]
        return {name: torch.from_numpy(array) for name, array in lay_out(modules).items()}

    def resident_bytes(self, resident: Mapping[str, Tensor], size: Size) -> list[int]:
        from .coded_resident import own_bytes

        return own_bytes(resident["starts"].numpy(), resident["forms"].numpy(), size).tolist()

    def joined_bytes(self, own: Mapping[str, Joined], sizes: Sequence[Size]) -> int:
        from .coded_resident import joined_bytes

        return joined_bytes(own["u"], own["v"])

    def apply(self, resident: Mapping[str, Tensor], size: Size, x: Tensor, places: Tensor) -> Tensor:
        from .coded_resident import components

        rows, owners = rows_of(resident["starts"], places)
        own = {suffix: codes.unsqueeze(1) for suffix, codes in components(resident, size, rows).items()}
        return apply_rows(self.decode(own, working_dtype(x)), owners, x, places)

    def decoded_rank(self, shape_of: ShapeOf) -> int:
        return max(1, shape_of("scale")[0])

    def own_tensors(self, size: Size, rank: int, shared: Mapping[str, Shape] | None = None) -> dict[str, TensorSpec]:
        kept = range(rank + 1)
        return {
            "u": TensorSpec((kept, size.d_out), ("I8",)),
            "v": TensorSpec((kept, size.d_in), ("I8",)),
            "scale": TensorSpec((kept,), ("I16",)),
        }

    def typical_bytes(self, size: Size) -> int:
        return round(_TYPICAL_BYTES * sum(size))

    def stored_rank(self, own: Mapping[str, Joined]) -> int:
        return int(own["scale"].shapes.max())

    def contradiction(self, shapes: Mapping[str, Shape]) -> str | None:
        counts = {shape[0] for shape in shapes.values()}
        return "û, v̂ and scales are not equally many" if len(counts) > 1 else None

    def file_tensors(self, adapters: int) -> dict[str, TensorSpec]:
        some = range(2**40)
        return {
            "bases": TensorSpec((adapters,), ("I16",)),
            "kinds": TensorSpec((range(257),), ("U8",)),
            "index": TensorSpec((some,), ("U8",)),
            "codes": TensorSpec((some,), ("U8",)),
        }

    def pack(self, adapters: Sequence[Mapping[str, Joined]]) -> dict[str, Tensor]:
        import numpy as np
        import torch

        from .coded_file import CodedModules, pack

        arrays = []
        for adapter in adapters:
            u, v, scale = (adapter[suffix] for suffix in self.own)
            sizes = np.stack([u.shapes[:, 1], v.shapes[:, 1]], 1)
            flat = (joined.flat.numpy() for joined in (u, v, scale))
            arrays.append(CodedModules(sizes, scale.shapes[:, 0], *flat))
        return {name: torch.from_numpy(array) for name, array in pack(arrays).items()}

    def unpack(self, tensors: Mapping[str, Tensor], sizes: Sequence[Sequence[Size]]) -> list[dict[str, Joined]]:
        import numpy as np
        import torch

        from .coded_file import unpack
        from .joined import Joined

        unpacked = []
        for own in unpack({name: tensor.numpy() for name, tensor in tensors.items()}, sizes):
            u, v = (np.stack([own.counts, own.sizes[:, side]], 1) for side in (0, 1))
            joined = ((own.u, u), (own.v, v), (own.scale, own.counts[:, None]))
            unpacked.append(
                {
                    suffix: Joined(torch.from_numpy(flat), shapes)
                    for suffix, (flat, shapes) in zip(self.own, joined, strict=True)
                }
            )
        return unpacked


class _Quantiser(NamedTuple):
    """How components become codes, and what of them follows from singular values."""

    quantise: Callable[[Components, float], Codes]
    predicted_of: Callable[[Tensor, int, int, Tensor], tuple[Tensor, Tensor]]
    losses_of: Callable[[Sequence[Components]], Losses]


def _quantiser(objective: Objective) -> _Quantiser:
    from ..maths import fixed_rate, quantise

    module = fixed_rate if objective == "resident" else quantise
    return _Quantiser(module.quantise, module.predicted_of, module.losses_of)


class _Tried(NamedTuple):
    """Codes at some step, by group, and what they lose."""

    codes: list[Codes]
    squared_errors: list[float]
    """Of the updates of all groups."""


def _decomposed(groups: Sequence[ModuleGroup]) -> list[Components]:
    """The components of each group; those of one rank are found together."""
    from ..base.stopping import check_stop
    from ..maths.quantise import Components

    of_rank: defaultdict[int, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        of_rank[group.rank].append(place)
    found: dict[int, Components] = {}
    for places in of_rank.values():
        check_stop()
        inputs = [known for place in places if (known := groups[place].inputs) is not None]
        own = Components.of_all([groups[place].exact for place in places], inputs or None)
        found.update(zip(places, own, strict=True))
    return [found[place] for place in range(len(groups))]


def _tried(components: Sequence[Components], step: float, objective: Objective) -> _Tried:
    import torch

    from ..base.stopping import check_stop

    quantise = _quantiser(objective).quantise
    codes = []
    for each in components:
        check_stop()
        codes.append(quantise(each, step))
    return _Tried(codes, torch.cat([each.squared_errors for each in codes]).tolist())


def _near(components: Sequence[Components], limit: float, objective: Objective) -> _Tried | None:
    """Codes that lose at most ``limit``, but not much less; None if no step does: some is always lost."""
    from ..maths.quantise import predicted_step

    if limit <= 0:
        return None
    step = predicted_step(components, _FIRST_AIM * limit, _quantiser(objective).losses_of(components))
    best = None
    for number in range(_TRIES):
        tried = _tried(components, step, objective)
        lost = sum(tried.squared_errors)
        if lost <= limit and (best is None or lost > best[0]):
            best = lost, tried
        if _NEAR * limit <= lost <= limit or lost == 0:
            break
        nearer = (0.5 * (1 + _NEAR) * limit / lost) ** 0.5
        step *= min(nearer, _FINER) if best is None and number >= _TRIES // 2 else nearer
    return None if best is None else best[1]


def _encoding(groups: Sequence[ModuleGroup], tried: _Tried) -> Encoding:
    """What is kept of the components of all modules, in the order of their names.

    In steps as few and large as can be: after each, threads that work on other adapters wait for each other.
    """
    import numpy as np
    import torch

    from .joined import Joined

    names = [name for group in groups for name in group.names]
    sizes = [(group.b.shape[1], group.a.shape[2]) for group in groups for _ in group.names]
    counts: list[int] = torch.cat([codes.kept.sum(-1) for codes in tried.codes]).tolist()
    u: list[Tensor] = []
    v: list[Tensor] = []
    scales: list[Tensor] = []
    for group, codes in zip(groups, tried.codes, strict=True):
        own = counts[len(u) : len(u) + len(group.names)]
        of, place = codes.kept.nonzero(as_tuple=True)  # module by module
        for parts, vectors in ((u, codes.u.mT[of, place]), (v, codes.v[of, place]), (scales, codes.scale[of, place])):
            length = vectors[0].numel() if len(vectors) else 0
            parts += vectors.flatten().split_with_sizes([count * length for count in own])
    order = sorted(range(len(names)), key=names.__getitem__)
    shapes = np.array([(counts[place], *sizes[place]) for place in order])
    both = torch.cat([*(u[place] for place in order), *(v[place] for place in order)]).cpu()
    flat_u, flat_v = both.split_with_sizes((shapes[:, :1] * shapes[:, 1:]).sum(0).tolist())
    joined = {
        "u": Joined(flat_u, shapes[:, [0, 1]]),
        "v": Joined(flat_v, shapes[:, [0, 2]]),
        "scale": Joined(torch.cat([scales[place] for place in order]).cpu(), shapes[:, :1]),
    }
    ranks = dict(zip(names, counts, strict=True))
    return Encoding({}, dict(zip(names, tried.squared_errors, strict=True)), ranks, joined)
