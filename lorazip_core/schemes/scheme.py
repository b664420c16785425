"""What the rest of lorazip asks of a scheme, a way to represent the updates of adapters in a bundle.

A scheme is a file beside this one and a line in `registry`. Its tensors are named by the module and a suffix of the
scheme (``model.layers.0.mlp.up_proj.core``); here and in schemes they go by their suffixes.

Schemes load torch when they encode or decode and not when they are imported: whoever reads a manifest needs none.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..base.progress import Share
    from ..maths.factored import Factors
    from ..maths.stack import ScaledStack
    from ..maths.weighting import InputMoments
    from .joined import Joined

Shape = tuple[int, ...]
ShapeOf = Callable[[str], Shape]
"""The shape of the tensor of a module with this suffix."""


ANY = range(1, 2**63)
"""A dimension of any size."""


class Size(NamedTuple):
    """The shape of an update."""

    d_out: int
    d_in: int


class TensorSpec(NamedTuple):
    """What a tensor in a file must be like."""

    shape: tuple[int | range, ...]
    """Every dimension, or the range that it may lie in."""
    dtypes: tuple[str, ...] = ()
    """Those it may have, as safetensors names them; none for the dtype of the bundle."""

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.shape) and all(
            size in allowed if isinstance(allowed, range) else size == allowed
            for size, allowed in zip(shape, self.shape, strict=True)
        )

    @property
    def most_elements(self) -> int:
        return math.prod(size[-1] if isinstance(size, range) else size for size in self.shape)

    @property
    def least_elements(self) -> int:
        return math.prod(size[0] if isinstance(size, range) else size for size in self.shape)


def itemsize(dtype: str) -> int:
    """Bytes of an element, by the name that safetensors gives its dtype: BF16, F8_E4M3, BOOL."""
    bits = re.match(r"[A-Z]+(\d+)", dtype)
    return int(bits[1]) // 8 if bits else 1


def working_dtype(x: Tensor) -> torch.dtype:
    """What `Scheme.apply` computes in: float32, where products of bf16 are exact, or the dtype of x if it is wider."""
    import torch

    return torch.promote_types(x.dtype, torch.float32)


class Fault(NamedTuple):
    """Why a tensor of the right shape and dtype is not what its scheme stores; ``kind`` is that of the finding."""

    kind: str
    message: str


class Scheme(ABC):
    """A way to represent updates; see `SharedScheme` and `IndividualScheme`."""

    name: ClassVar[str]
    """In manifests, on the command line, and as the feature that a reader must know."""
    about: ClassVar[str]
    """One line for people, about one adapter; ``{rank}`` and ``{adapters}``, those that share, are filled in."""
    shared: ClassVar[tuple[str, ...]] = ()
    """The suffixes of the tensors that the adapters of a cluster share, for every module; none if they share none."""
    own: ClassVar[tuple[str, ...]]
    """The suffixes of an adapter's own tensors, for every module."""
    default_rank: ClassVar[int | None] = None
    """The rank where none is asked for; None for a scheme that has no rank."""
    default_error: ClassVar[float | None] = None
    """The squared error of every adapter where nothing is asked for; None for a scheme that has a default rank."""
    is_method: ClassVar[bool] = True
    """Whether it can be asked for; else it is only what some adapters end with."""
    has_own_rank: ClassVar[bool] = False
    """Whether the entry of an adapter in the manifest has a rank: the largest of its modules."""
    keeps_factors: ClassVar[bool] = False
    """Whether its own tensors are B, A and scale as they are in the source, so that export can give them back."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        """B̂ [..., d_out, k] and Â [..., k, d_in] with ΔŴ = B̂ Â, computed in ``dtype``.

        ``tensors`` may have leading dimensions for adapters and modules that are decoded together; what they share
        lacks those of the adapters.
        """

    @abstractmethod
    def decoded_rank(self, shape_of: ShapeOf) -> int:
        """The k of `decode`, from the shapes of the tensors."""

    @abstractmethod
    def resident(self, adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What a device holds of a module to serve n ≥ 1 adapters with these own tensors, besides what they share.

        Nothing is rounded, and what is an adapter's is found from its place, 0 ≤ place < n.
        """

    @abstractmethod
    def resident_bytes(self, resident: Mapping[str, Tensor], size: Size) -> list[int]:
        """[n]: what each of these adapters adds to `resident`, which is on the CPU."""

    @abstractmethod
    def apply(self, resident: Mapping[str, Tensor], size: Size, x: Tensor, places: Tensor) -> Tensor:
        """y [t, d_out] with y_i = ΔŴ x_i, ΔŴ that of the adapter at ``places``_i, in `working_dtype`, for x [t, d_in].

        ``resident`` has what is shared, too. This is the reference for whatever does the same faster.
        """

    @abstractmethod
    def own_tensors(self, size: Size, rank: int, shared: Mapping[str, Shape] | None = None) -> dict[str, TensorSpec]:
        """What an adapter's own tensors of a module are like at ``rank``, or for ``shared`` ones of these shapes."""

    def shared_tensors(self, size: Size, rank: int) -> dict[str, TensorSpec]:
        """What the shared tensors of a module must be like."""
        return {}

    def contradiction(self, shapes: Mapping[str, Shape]) -> str | None:
        """Why the tensors of a module that are there, each of them right, do not fit each other; None if they do."""
        return None

    def fault(self, suffix: str, tensor: Tensor) -> Fault | None:
        """What is wrong with the values of a shared tensor, as it is stored."""
        return None


class Problems(NamedTuple):
    """Updates D_i of modules of one shape that are to be represented together, each module in each cluster by itself.

    A problem is one module for the adapters of one cluster: min Σ_i w_i ‖D_i − D̂_i‖².
    """

    stacks: list[ScaledStack]
    """Of every module, the adapters that have it."""
    owners: list[Tensor]
    """[n] for every stack, in its order: the number of the problem that each adapter belongs to, −1 for none."""
    weights: list[Tensor]
    """[n] for every stack: the w_i."""
    total: int
    """How many problems there are."""


class Solution(NamedTuple):
    """One module of one cluster as it is stored. Rows follow ``members``, ascending numbers of adapters."""

    shared: dict[str, Tensor]
    own: dict[str, Tensor]
    """[n, ...] each."""
    members: tuple[int, ...]
    squared_errors: Tensor
    """[n] in float64: ‖D_i − D̂_i‖² of what is stored, infinite where the dtype cannot hold it."""


class PackSize(NamedTuple):
    """How large problems are that are solved together."""

    elements: int
    """In the factors of all updates."""
    updates: int
    problems: int
    size: Size


class SharedScheme(Scheme):
    """Adapters of a cluster share tensors of every module; each has a small tensor of its own beside them."""

    def resident(self, adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """[n, ...] each: the shapes of own tensors follow from those that are shared."""
        import torch

        return {suffix: torch.stack([own[suffix] for own in adapters]) for suffix in self.own}

    def resident_bytes(self, resident: Mapping[str, Tensor], size: Size) -> list[int]:
        adapters = len(resident[self.own[0]])
        return [sum(tensor.nbytes for tensor in resident.values()) // adapters] * adapters

    @abstractmethod
    def encode(self, problems: Problems, rank: int, *, dtype: torch.dtype, seed: int, share: Share) -> list[Solution]:
        """Solve ``problems`` at ``rank`` and round what is kept to ``dtype``. ``share`` is told how far it is."""

    @abstractmethod
    def project(self, stack: ScaledStack, shared: Mapping[str, Tensor]) -> Solution:
        """The own tensors that represent the updates of ``stack`` best with given ``shared`` ones, on its device.

        They are rounded to the dtype of these, which stay as they are.
        """

    @abstractmethod
    def stored_rank(self, shared: Mapping[str, Shape]) -> int:
        """The rank of shared tensors of these shapes, as the manifest has it: the largest."""

    @abstractmethod
    def working_bytes(self, pack: PackSize, rank: int) -> int:
        """An upper bound on the main memory that `encode` takes on a CPU, the updates included."""

    @abstractmethod
    def working_bytes_of_update(self, rank: int) -> int:
        """The least that `encode` takes for one update on a GPU besides its factors."""


@dataclass(frozen=True)
class ModuleGroup:
    """m modules of one adapter that have equal shapes, ranks and dtypes, with ΔW = scale · B A."""

    names: list[str]
    b: Tensor
    """[m, d_out, r], as the file has it."""
    a: Tensor
    """[m, r, d_in]"""
    scales: Tensor
    """[m] in float64."""
    device: torch.device
    """Where to compute."""
    inputs: InputMoments | None = None
    """What is known of the inputs of the modules."""

    @property
    def rank(self) -> int:
        return int(self.a.shape[1])

    @cached_property
    def exact(self) -> Factors:
        """scale · B and A in float64: in float32 a scale like 1/3 would be rounded, and 1e-15 be taken for 0."""
        b, a = (side.to(self.device).double() for side in (self.b, self.a))
        return b * self.scales.to(self.device)[:, None, None], a


Ranks = Mapping[str, int] | None
"""The rank of every module, by name; None for a scheme that has no rank."""


Objective = Literal["disk", "resident"]
"""Which bytes are to be few: those of the bundle, or those that a device holds of it."""


class Target(NamedTuple):
    """What is wanted of an adapter on its own. Without any, a scheme does as it does by default."""

    rank: int | None = None
    """The mean rank of its modules: as many elements as if all had this one."""
    limit: float | None = None
    """The most that Σ‖ΔW − ΔŴ‖² may be."""
    step: float | None = None
    """How coarse it may be, for a `SteppedScheme`: the larger, the less is kept."""
    objective: Objective = "disk"


class Encoding(NamedTuple):
    """An adapter as it is stored."""

    tensors: dict[str, Tensor]
    """By module and suffix, as its file has them."""
    squared_errors: dict[str, float]
    """By module: ‖ΔW − ΔŴ‖² of what is stored, infinite where the dtype cannot hold it."""
    ranks: Ranks = None
    joined: Mapping[str, Joined] | None = None
    """What a `PackedScheme` has instead of tensors: by suffix, those of all modules in the order of their names."""


class Terms(NamedTuple):
    """An update as a sum of outer products, each value as it is stored: ΔŴ = Σ_j scale_j u_j v_jᵀ."""

    u: Tensor
    """[k, d_out], of integers or floats."""
    v: Tensor
    """[k, d_in]"""
    scale: Tensor
    """[k] in float32."""


class JoinedTerms(NamedTuple):
    """`Terms` of several modules, one after another."""

    u: Joined
    v: Joined
    scale: Tensor
    """[terms] in float32."""


class IndividualScheme(Scheme):
    """Every adapter on its own."""

    def terms(self, own: Mapping[str, Tensor]) -> Terms:
        """The update of a module from an adapter's own tensors, for kernels: decoded, if there is no other way."""
        import torch

        b, a = self.decode(own, torch.float32)
        return Terms(b.mT, a, a.new_ones(len(a)))

    @abstractmethod
    def encodings(self, groups: Sequence[ModuleGroup], target: Target, dtype: torch.dtype) -> Iterable[Encoding]:
        """What to try in turn until it meets the limit of ``target``, rounded to ``dtype``, on the CPU.

        All modules of an adapter are in ``groups``. Nothing is tried where the scheme cannot do what is wanted.
        """


class Counting(NamedTuple):
    """Which bytes of updates are counted."""

    itemsize: int
    """Bytes of an element of the bundle."""
    objective: Objective = "disk"


class SteppedScheme(IndividualScheme):
    """One whose `Target.step` says how much is kept, and whose sizes and errors follow from singular values."""

    uses_inputs: ClassVar[bool] = False
    """Whether it encodes for outputs where `ModuleGroup.inputs` are known; a step is then for these."""

    @abstractmethod
    def predicted(self, s: Tensor, size: Size, step: Tensor, counting: Counting) -> tuple[Tensor, Tensor]:
        """What updates of one size lose and take, about, at a ``step`` [m, 1].

        Lost is a share of the energy of each component [m, r]; bits are those of the updates [m]. ``s`` [m, r] are
        their singular values, descending; if inputs are known, `Components.strengths`.
        """


class PackedScheme(IndividualScheme):
    """Adapters of which several are packed into one file; `own` is what is there once they are unpacked.

    Of an adapter, the own tensors of all its modules, in order, are joined by suffix.
    """

    pads: ClassVar[bool] = False
    """Whether an update stays what it is when its own tensors get more zeros at the end of their first dimension: then
    updates of unequal ranks are decoded together."""

    @abstractmethod
    def pack(self, adapters: Sequence[Mapping[str, Joined]]) -> dict[str, Tensor]:
        """The tensors of a file of these adapters."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], sizes: Sequence[Sequence[Size]]) -> list[dict[str, Joined]]:
        """What `pack` was given, for updates of these sizes. Raises ValueError if the tensors are not such ones."""

    def joined_terms(self, own: Mapping[str, Joined]) -> JoinedTerms:
        """`terms` of all modules of an adapter, of which there is one at least."""
        import torch

        from .joined import Joined

        modules = [self.terms(dict(zip(own, tensors, strict=True))) for tensors in zip(*own.values(), strict=True)]
        u, v = (Joined.of([getattr(terms, side) for terms in modules]) for side in ("u", "v"))
        return JoinedTerms(u, v, torch.cat([terms.scale for terms in modules]))

    def joined_bytes(self, own: Mapping[str, Joined], sizes: Sequence[Size]) -> int:
        """What an adapter with modules of these ``sizes`` adds to `resident`, in all of them together."""
        modules = [dict(zip(own, tensors, strict=True)) for tensors in zip(*own.values(), strict=True)]
        pairs = zip(modules, sizes, strict=True)
        return sum(sum(self.resident_bytes(self.resident([module]), size)) for module, size in pairs)

    @abstractmethod
    def typical_bytes(self, size: Size) -> int:
        """About what an update of this size takes where nothing is asked for; how much it is, only weights can tell."""

    @abstractmethod
    def stored_rank(self, own: Mapping[str, Joined]) -> int:
        """The rank of an adapter with these tensors: the largest of its modules."""

    @abstractmethod
    def file_tensors(self, adapters: int) -> dict[str, TensorSpec]:
        """What the tensors of a file of so many adapters must be like."""
