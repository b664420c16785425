"""All adapters of a bundle on a device, at once, and y += ΔŴ x of a batch that mixes them.

Every scheme says what is held of a module and how it is applied (`Scheme.resident`, `Scheme.apply`). Adapters of one
module that can be held together are a part: those of a scheme, a cluster and dtypes.

A module is W [d_out, d_in] here, a convolution's d_in being channels · ∏kernel. What of an adapter is no update of a
module (biases, magnitudes, saved modules) is not part of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.stopping import check_stop
from ..bundle.manifest import AdapterEntry
from ..bundle.reader import Bundle
from ..bundle.stored import stored
from ..schemes.scheme import Scheme, Size

NONE = -1
"""Instead of a row: no adapter."""


class Part(NamedTuple):
    """Adapters of one module that are held together."""

    scheme: Scheme
    places: Tensor
    """[n] of int32: the place of every adapter of the bundle, or `NONE`; equal ones are one tensor."""
    own: dict[str, Tensor]
    """As `Scheme.resident` has it."""
    shared: dict[str, Tensor]


class HeldModule(NamedTuple):
    """A module of any adapter."""

    size: Size
    parts: list[Part]


class Held(NamedTuple):
    """Those inputs of a module whose adapter a part holds."""

    inputs: Tensor
    """[k]: which of the inputs."""
    places: Tensor
    """[k]: the place of their adapter."""


class Batch:
    """The rows [b] of a batch, which a part looks up once, not in every module and at every step; see `Resident.batch`.

    Each row is for equally many inputs of a module, which follow each other: all tokens of a sequence, or of all beams.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._held: dict[tuple[int, int], Held] = {}

    def held(self, part: Part, repeats: int) -> Held:
        """Where ``part`` holds the adapter of an input, of which there are ``repeats`` for each row."""
        key = id(part.places), repeats  # many modules have the same places, as one tensor
        if key not in self._held:
            of_rows = torch.where(self.rows >= 0, part.places[self.rows.clamp_min(0)], NONE)
            places = of_rows.repeat_interleave(repeats)
            inputs = (places >= 0).nonzero().squeeze(1)
            self._held[key] = Held(inputs, places[inputs])
        return self._held[key]


class Resident:
    """The updates of all adapters of a bundle on a device. A row is an adapter, in the order of the manifest."""

    def __init__(self, names: list[str], modules: dict[str, HeldModule], own_bytes: list[int]) -> None:
        self.rows = {name: row for row, name in enumerate(names)}
        """The row of every adapter."""
        self.modules = modules
        self.own_bytes = own_bytes
        """What each adapter adds, by row; the rest of `nbytes` is shared."""

    @classmethod
    def of(cls, bundle: Bundle, device: torch.device, adapters: Sequence[AdapterEntry] | None = None) -> Resident:
        """Read all ``adapters`` of a bundle, or those given; all their codes are in memory once, one byte each.

        Raises as `stored`, and LocalError for what cannot be held.
        """
        adapters = bundle.manifest.adapters if adapters is None else adapters
        collected: defaultdict[str, defaultdict[object, dict[int, dict[str, Tensor]]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        shared: dict[tuple[str, int], dict[str, Tensor]] = {}
        for row, adapter in enumerate(adapters):
            check_stop()
            scheme = bundle.scheme(adapter)
            for module in bundle.modules(adapter):
                tensors = stored(bundle, adapter, module)
                own = {suffix: tensors[suffix] for suffix in scheme.own}
                collected[module.name][_together(adapter, own)][row] = own
                if adapter.cluster is not None:
                    shared.setdefault(
                        (module.name, adapter.cluster), {suffix: tensors[suffix] for suffix in scheme.shared}
                    )
        own_bytes = [0] * len(adapters)
        places: dict[tuple[int, ...], Tensor] = {}
        modules = {}
        for entry in bundle.manifest.modules:
            check_stop()
            size, parts = Size(entry.d_out, entry.d_in), []
            for members in collected.pop(entry.name, {}).values():
                first = adapters[min(members)]
                scheme = bundle.scheme(first)
                key = tuple(members)
                if key not in places:
                    places[key] = _places(key, len(adapters)).to(device)
                own = scheme.resident(list(members.values()))
                for row, added in zip(key, scheme.resident_bytes(own, size), strict=True):
                    own_bytes[row] += added
                of_cluster = {} if first.cluster is None else shared[entry.name, first.cluster]
                parts.append(Part(scheme, places[key], _on(own, device), _on(of_cluster, device)))
            if parts:
                modules[entry.name] = HeldModule(size, parts)
        return cls([adapter.name for adapter in adapters], modules, own_bytes)

    def batch(self, rows: Tensor) -> Batch:
        """What `apply` takes for the adapters of ``rows`` [b], or `NONE`. Raises ValueError for what is no row."""
        if len(rows) and not NONE <= int(rows.min()) <= int(rows.max()) < len(self.rows):
            raise ValueError(f"rows of {len(self.rows)} adapters are {NONE} to {len(self.rows) - 1}")
        return Batch(rows)

    def apply(self, module: str, x: Tensor, batch: Batch | Tensor) -> Tensor:
        """ΔŴ x [..., d_out] for every x [..., d_in] with the adapter of its row, zeros for `NONE`, in the dtype of x.

        Each row of the batch (or of a tensor, which is looked up for this call alone) is for equally many x, which
        follow each other. It is computed from the stored values in float32, or in the dtype of x if that is wider, and
        rounded once. An adapter that lacks the module gives zeros. Raises KeyError for a module that no adapter has,
        and ValueError for rows that are no adapters and for inputs of another size.
        """
        batch = self.batch(batch) if isinstance(batch, Tensor) else batch
        size, parts = self.modules[module]
        inputs, count = x.reshape(-1, x.shape[-1]), len(batch.rows)
        repeats, rest = divmod(len(inputs), count) if count else (0, len(inputs))
        if rest or x.shape[-1] != size.d_in:
            raise ValueError(f"{module} takes [k * {count}, {size.d_in}] here, not {list(x.shape)}")
        y = inputs.new_zeros(len(inputs), size.d_out)
        for part in parts:
            at, places = batch.held(part, repeats)
            if len(at):
                y[at] = part.scheme.apply(part.own | part.shared, size, inputs[at], places).to(x.dtype)
        return y.view(*x.shape[:-1], size.d_out)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on the device."""
        tensors = {id(tensor): tensor.nbytes for tensor in self._tensors()}
        return sum(tensors.values())

    def _tensors(self) -> Iterable[Tensor]:
        for module in self.modules.values():
            for part in module.parts:
                yield from (part.places, *part.own.values(), *part.shared.values())


def _together(adapter: AdapterEntry, own: Mapping[str, Tensor]) -> object:
    """What the adapters of a part have in common."""
    return adapter.scheme, adapter.cluster, tuple(tensor.dtype for tensor in own.values())


def _places(rows: tuple[int, ...], adapters: int) -> Tensor:
    places = torch.full((adapters,), NONE, dtype=torch.int32)
    places[list(rows)] = torch.arange(len(rows), dtype=torch.int32)
    return places


def _on(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
