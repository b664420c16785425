"""``coded``: singular components quantised with one step, their codes entropy coded: ΔŴ = Σ_k 2^(scale_k/32) û_k v̂_kᵀ.

Ranks and bits follow the spectrum, see `maths.quantise`. A file holds several adapters, whose codes share streams, see
`coded_file`; unpacked, a module has û [k, d_out] and v̂ [k, d_in] of int8, and scales [k] of int16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from .factors import apply_rows, rows_of
from .scheme import (
    Counting,
    Encoding,
    ModuleGroup,
    Objective,
    PackedScheme,
    Shape,
    ShapeOf,
    Size,
    SteppedScheme,
    Target,
    TensorSpec,
    Terms,
    working_dtype,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..maths.factored import Factors
    from ..maths.quantise import Codes, Components
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
        from ..maths.quantise import Components

        of_groups = [(group, Components.of(group.exact, group.inputs)) for group in groups]
        if target.step is not None:
            yield _encode(of_groups, target.step, target.objective)
            return
        norm = sum(float(components.energies.sum()) for _, components in of_groups)
        if not norm:
            yield _encode(of_groups, 1.0, target.objective)
            return
        limit = DEFAULT_ERROR * norm if target.limit is None else target.limit
        yield from _near(of_groups, limit, target.objective)

    def predicted(self, s: Tensor, size: Size, step: Tensor, counting: Counting) -> tuple[Tensor, Tensor]:
        return _quantiser(counting.objective).predicted_of(s, *size, step)

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        from ..maths.quantise import unpacked_scale

        u, v = tensors["u"].to(dtype), tensors["v"].to(dtype)
        if not u.shape[-2]:
            return u.new_zeros(*u.shape[:-2], u.shape[-1], 1), v.new_zeros(*v.shape[:-2], 1, v.shape[-1])
        return (u * unpacked_scale(tensors["scale"], dtype)[..., None]).mT, v

    def terms(self, own: Mapping[str, Tensor]) -> Terms:
        import torch

        from ..maths.quantise import unpacked_scale

        return Terms(own["u"], own["v"], unpacked_scale(own["scale"], torch.float32))

    def resident(self, adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Components as `coded_resident` lays them out."""
        import torch

        from .coded_resident import CodedModule, lay_out

        modules = [CodedModule(*(own[suffix].numpy() for suffix in self.own)) for own in adapters]
        return {name: torch.from_numpy(array) for name, array in lay_out(modules).items()}

    def resident_bytes(self, resident: Mapping[str, Tensor], size: Size) -> list[int]:
        from .coded_resident import own_bytes

        return own_bytes(resident["starts"].numpy(), resident["forms"].numpy(), size).tolist()

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
    predicted_left: Callable[[Tensor, int, int], Tensor]


def _quantiser(objective: Objective) -> _Quantiser:
    from ..maths import fixed_rate, quantise

    module = fixed_rate if objective == "resident" else quantise
    return _Quantiser(module.quantise, module.predicted_of, module.predicted_left)


def _encode(
    of_groups: Sequence[tuple[ModuleGroup, Components]], step: float, objective: Objective = "disk"
) -> Encoding:
    from ..base.stopping import check_stop

    quantise = _quantiser(objective).quantise
    ranks: dict[str, int] = {}
    encoding = Encoding({}, {}, ranks)
    for group, components in of_groups:
        check_stop()
        codes = quantise(components, step)
        of, place = codes.kept.nonzero(as_tuple=True)  # module by module
        counts = codes.kept.sum(-1).tolist()
        flat = {"u": codes.u.mT[of, place], "v": codes.v[of, place], "scale": codes.scale[of, place]}
        for suffix, tensor in flat.items():
            for name, own in zip(group.names, tensor.cpu().split_with_sizes(counts), strict=True):
                encoding.tensors[f"{name}.{suffix}"] = own
        encoding.squared_errors.update(zip(group.names, codes.squared_errors.tolist(), strict=True))
        ranks.update(zip(group.names, counts, strict=True))
    return encoding


def _near(
    of_groups: Sequence[tuple[ModuleGroup, Components]], limit: float, objective: Objective
) -> Iterable[Encoding]:
    """An encoding that loses at most ``limit``, but not much less; nothing if no step does: some is always lost."""
    from ..maths.quantise import predicted_step

    if limit <= 0:
        return
    left = _quantiser(objective).predicted_left
    step = predicted_step([components for _, components in of_groups], _FIRST_AIM * limit, left)
    best = None
    for tried in range(_TRIES):
        encoding = _encode(of_groups, step, objective)
        lost = sum(encoding.squared_errors.values())
        if lost <= limit and (best is None or lost > best[0]):
            best = lost, encoding
        if _NEAR * limit <= lost <= limit or lost == 0:
            break
        nearer = (0.5 * (1 + _NEAR) * limit / lost) ** 0.5
        step *= min(nearer, _FINER) if best is None and tried >= _TRIES // 2 else nearer
    if best is not None:
        yield best[1]
