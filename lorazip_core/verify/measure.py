"""The true errors of a bundle, from the original adapters and the decoder; the encoder has no part in it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import closing
from itertools import chain, groupby
from typing import NamedTuple

import torch

from ..adapter.reader import Adapter, distinct_parts
from ..base.errors import AdapterError
from ..base.progress import Advance
from ..base.stopping import check_stop
from ..base.threads import thread_pool
from ..bundle.decoder import Decoder
from ..bundle.losses import Losses
from ..bundle.manifest import AdapterEntry, SourceEntry
from ..bundle.reader import Bundle
from ..maths.factored import Factors, squared_norm_and_distance
from ..model.calibration import Calibration
from ..reading.blocks import Block, in_blocks
from ..reading.groups import by_layout
from ..reading.placement import HOST, Placement
from ..schemes.registry import packed_scheme
from .ahead import FILES, Ahead

_CPU = torch.device("cpu")
# Elements in the factors of one batch, also decoded ones: 32 MiB of float64, on a GPU 256 MiB.
_BATCH_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}


class Pair(NamedTuple):
    """An adapter in the bundle and the original that it came from, with the same modules."""

    entry: AdapterEntry
    original: Adapter


class Original(NamedTuple):
    """What reading an original has told: its files, and its errors if they were wanted."""

    files: list[SourceEntry]
    measured: Losses | None
    outputs: Losses | None = None
    """As measured, but weighted by what is known of inputs; of the modules of which something is."""


Seen = Original | AdapterError
"""An AdapterError for an original that cannot be read."""


def measure(
    bundle: Bundle,
    pairs: Sequence[Pair],
    advance: Advance,
    *,
    measurable: Container[str],
    device: torch.device = _CPU,
    placement: Placement = HOST,
    calibration: Calibration | None = None,
) -> dict[str, Seen]:
    """Read all originals, every file once: by the adapter's name its files and, of ``measurable`` ones, the errors.

    With a ``calibration`` also the errors of outputs.

    Errors are computed in float64 on ``device``, where ``placement`` brings the originals. Memory does not grow with
    the collection. ``advance`` is told 1 for each pair.
    """
    if not pairs:
        return {}
    ordered = sorted(pairs, key=lambda pair: _home(bundle, pair.entry))  # those that share bases next to each other
    originals = [pair.original for pair in ordered]

    def look(block: Block) -> list[tuple[str, Seen]]:
        own = [ordered[number] for number in block.adapters]
        try:
            measured, outputs = _errors(block, own, measurable, decoder, calibration)
        except AdapterError as error:  # one too large for memory, alone in its block, that is read piece by piece
            return [(pair.entry.name, error) for pair in own]
        return [
            (pair.entry.name, files if isinstance(files, AdapterError) else Original(files, *both))
            for pair, files, *both in zip(own, block.files, measured, outputs, strict=True)
        ]

    modules = {name: part.module for parts, _ in distinct_parts(originals) for name, part in parts.items()}
    groups = by_layout(originals, list(modules.values()))
    order = [ordered[number].entry for group in groups for number in group.adapters.tolist()]
    with thread_pool(FILES) as pool:
        ahead = None
        if placement.kind != "host":  # else several threads compute, each of which unpacks what it needs
            ahead = Ahead(bundle, _packed(order, measurable), pool)
        decoder = Decoder(bundle, device, _BATCH_ELEMENTS[device.type], ahead)
        with closing(in_blocks(look, originals, groups, device, placement, advance)) as results:
            return dict(chain.from_iterable(results))


def _packed(order: Sequence[AdapterEntry], measurable: Container[str]) -> Iterator[str]:
    """The files of several adapters that are needed in this ``order``, of those that are measurable."""
    homes = (str(entry.individual) for entry in order if packed_scheme(entry.scheme) and entry.name in measurable)
    return (home for home, _ in groupby(homes))


def _home(bundle: Bundle, entry: AdapterEntry) -> str:
    """The file of the bundle that has what only this adapter, or only its shard, is decoded from."""
    return entry.individual or bundle.shard(entry).path


def _errors(
    block: Block, pairs: list[Pair], measurable: Container[str], decoder: Decoder, calibration: Calibration | None
) -> tuple[list[Losses | None], list[Losses | None]]:
    """The errors of those of a block that are measurable and could be read, of weights and of outputs."""
    known = frozenset() if calibration is None else calibration.known
    measured, outputs = _unmeasured(block, pairs, measurable, known)
    homes = [
        None if errors is None else _home(decoder.bundle, pair.entry)
        for pair, errors in zip(pairs, measured, strict=True)
    ]
    parts = block.group.parts
    for rows in _runs(homes, lambda row: decoder.most_adapters(pairs[row].entry, parts)):
        stored = block.stored(rows, [pair.original for pair in pairs[rows]])
        scales = torch.from_numpy(block.group.scales[block.rows][rows]).to(decoder.device)
        for columns, y in decoder.batches([pair.entry for pair in pairs[rows]], parts):
            check_stop()
            b, a = (side.to(decoder.device).double() for side in stored(columns))
            x = b.mul_(scales[:, columns, None, None]), a
            names = [parts[column].module.name for column in columns]
            _put(measured[rows], names, x, y)
            if calibration is not None:
                places = [place for place, name in enumerate(names) if name in known]
                if places:
                    names = [names[place] for place in places]
                    inputs = calibration.inputs_of(tuple(names), decoder.device)
                    weighted = ((b[..., places, :, :], inputs.root(a[..., places, :, :])) for b, a in (x, y))
                    _put(outputs[rows], names, *weighted)
    return measured, outputs


def _unmeasured(
    block: Block, pairs: list[Pair], measurable: Container[str], known: Container[str]
) -> tuple[list[Losses | None], list[Losses | None]]:
    """Where errors go, of weights and of outputs; None for what is not to be measured."""
    measured: list[Losses | None] = []
    outputs: list[Losses | None] = []
    for pair, files in zip(pairs, block.files, strict=True):
        wanted = not isinstance(files, AdapterError) and pair.entry.name in measurable
        names = [name for name in pair.original.parts if name in known]
        measured.append(Losses(pair.original.parts) if wanted else None)
        outputs.append(Losses(names) if wanted and names else None)
    return measured, outputs


def _put(losses: list[Losses | None], modules: list[str], x: Factors, y: Factors) -> None:
    """‖X‖² and ‖X − Y‖² of all adapters [n] and modules [m]."""
    found = torch.stack(squared_norm_and_distance(x, y), -1).tolist()
    for errors, of_adapter in zip(losses, found, strict=True):
        assert errors is not None
        for module, both in zip(modules, of_adapter, strict=True):
            errors.put(module, *both)


def _runs(homes: list[str | None], most: Callable[[int], int]) -> Iterator[slice]:
    """Neighbours of one home, at most so many at a time as ``most`` says of the first; those without are left out."""
    stop = 0
    for home, same in groupby(homes):
        start, stop = stop, stop + len(list(same))
        if home is not None:
            step = most(start)
            for first in range(start, stop, step):
                yield slice(first, min(first + step, stop))
