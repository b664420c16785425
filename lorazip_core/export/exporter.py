"""The verb: every adapter asked for, decoded and written, and a report of what was written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from ..adapter.formats.lora_bias import biased_module, unfolded
from ..adapter.formats.peft_config import folded_config, gives, own_config
from ..adapter.formats.registry import parse_config
from ..adapter.formats.writer import WRITTEN, write_adapter
from ..adapter.module import Module
from ..base.atomic import atomic_directory, check_output
from ..base.digests import canonical_json, safe_name
from ..base.errors import AdapterError, Unsupported, UsageError
from ..base.filesystem import check_space, tree, write_file
from ..base.progress import Progress, Silent
from ..base.stopping import check_stop
from ..base.threads import in_order
from ..bundle.choose import choose
from ..bundle.contradictions import refuse_contradictions
from ..bundle.kinds import EXPORT_NAME
from ..bundle.manifest import AdapterEntry
from ..bundle.output_path import check_output_path
from ..bundle.reader import Bundle
from ..bundle.tensor_file import DTYPES
from . import vllm
from .factors import Written, folded_factors, own_factors
from .readme import Changes, readme
from .size import check_room, export_bytes

_SILENT = Silent()

Format = Literal["peft"]
Target = Literal["vllm"]
_CPU = torch.device("cpu")
_LONGEST_NAME = 255  # bytes of a name on the usual file systems


class _Options(NamedTuple):
    """How adapters are written; ``one_rank`` is for an engine that knows a single rank and scale per adapter."""

    rank: int | None
    dtype: str | None
    pad: bool
    one_rank: bool


class ExportedAdapter(msgspec.Struct, frozen=True):
    """An adapter that was written. ``path`` is relative to the output."""

    name: str
    path: str
    rank: int
    scheme: str
    squared_error: float | None
    """Against the original: what the manifest claims, if the update written is exactly the one stored; else null."""
    squared_distance: float | None = None
    """‖ΔŴ−ΔW'‖² / ‖ΔW‖² of the update ΔŴ stored and ΔW' written, measured; null if ΔW is zero and they differ."""
    squared_error_bound: float | None = None
    """(√claim + √squared_distance)²: against the original, the squared error is at most this."""


class ExportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an export wrote. In the output itself it is ``export.json``, with "." for the output."""

    schema: Literal["lorazip.export/1"] = "lorazip.export/1"
    output: str
    format: Format
    target: Target | None
    adapters: list[ExportedAdapter]
    max_lora_rank: int | None
    """The --max-lora-rank to start vLLM with; null without that target."""


def export(
    bundle_path: Path,
    output: Path,
    *,
    format: Format = "peft",
    adapters: Sequence[str] = (),
    target: Target | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    pad: bool = True,
    force: bool = False,
    progress: Progress = _SILENT,
) -> ExportReport:
    """Write adapters of a bundle (all, or those named) as PEFT adapters into ``output``/<name>, all of them or none.

    ``adapters`` are names or patterns of `fnmatch`. ``rank`` truncates every module further. ``dtype`` (bf16, f16,
    f32) defaults to that of the bundle. ``pad`` gives all modules of an adapter one rank, with zeros. An adapter of
    scheme ``original`` keeps its own factors, dtypes, ranks and scales. ``target="vllm"`` refuses what vLLM cannot
    serve and always gives one rank and one scale. The bytes do not depend on the number of threads.

    Raises UsageError for an unknown adapter or a senseless option, Unsupported for what ``target`` does not take,
    OutputExists, BundleDamaged for a file that is not what the manifest says, and what opening a bundle raises.
    """
    _check_options(bundle_path, output, format, target, rank, dtype, pad)
    bundle = Bundle(bundle_path, ("read", "export"))
    refuse_contradictions(bundle_path, bundle.manifest)
    chosen = choose(bundle, adapters)
    folders = _folders([adapter.name for adapter in chosen])
    bundle.check_sizes(file for adapter in chosen for file in _files(bundle, adapter))
    check_room(bundle, chosen)
    if target == "vllm":
        vllm.check_adapters(bundle, chosen)
    check_output(output, force=force, not_ours=not_of_export)
    options = _Options(rank, dtype, pad, one_rank=target == "vllm")
    check_space(output, export_bytes(bundle, chosen, rank, dtype, pad=pad, one_rank=options.one_rank))
    with (
        atomic_directory(output, force=force, not_ours=not_of_export) as partial,
        progress.stage("export", len(chosen)) as advance,
    ):
        bundle.check_files(_shared_files(bundle, chosen))

        def write(place: tuple[AdapterEntry, str]) -> ExportedAdapter:
            check_stop()
            return _export_one(bundle, place[0], partial, place[1], options)

        exported = []
        with closing(in_order(write, zip(chosen, folders, strict=True), _CPU)) as results:
            for one in results:
                exported.append(one)
                advance(1)
        report = ExportReport(
            output=str(output),
            format=format,
            target=target,
            adapters=exported,
            max_lora_rank=vllm.max_lora_rank([one.rank for one in exported]) if target == "vllm" else None,
        )
        here = msgspec.structs.replace(report, output=".")
        write_file(partial / EXPORT_NAME, canonical_json(msgspec.to_builtins(here)))
    return report


def not_of_export(folder: Path) -> str | None:
    """Why a directory may not be replaced as an export, in words; None for one that has nothing but what it wrote."""
    try:
        report = msgspec.json.decode((folder / EXPORT_NAME).read_bytes(), type=ExportReport)
    except FileNotFoundError:
        return f"it has no {EXPORT_NAME}"
    except (IsADirectoryError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return f"{EXPORT_NAME} is not that of an export"
    ours = {(Path(adapter.path) / name).as_posix() for adapter in report.adapters for name in WRITTEN}
    for path in tree(folder):
        if path not in ours and path != EXPORT_NAME and not path.endswith("/"):
            return f"{EXPORT_NAME} does not name {path}"
    return None


def _check_options(
    bundle: Path, output: Path, format: str, target: str | None, rank: int | None, dtype: str | None, pad: bool
) -> None:
    if format != "peft":
        raise Unsupported(f"export format {format!r}", "this lorazip writes peft")
    if target not in (None, "vllm"):
        raise Unsupported(f"export target {target!r}", "this lorazip knows vllm")
    if target == "vllm" and not pad:
        raise UsageError("vLLM knows one rank for all modules of an adapter", "pad, or export without the target vllm")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}: must be at least 1")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    check_output_path(output, [bundle])


def _shared_files(bundle: Bundle, adapters: Sequence[AdapterEntry]) -> list[str]:
    """The bases and shards that ``adapters`` are decoded from, each once."""
    files: dict[str, None] = {}
    for adapter in adapters:
        if adapter.cluster is not None:
            files |= dict.fromkeys((bundle.manifest.clusters[adapter.cluster].basis, bundle.shard(adapter).path))
    return list(files)


def _files(bundle: Bundle, adapter: AdapterEntry) -> list[str]:
    """The files that an adapter is exported from."""
    own = [file for file in (adapter.config, adapter.individual, adapter.extras) if file is not None]
    return own + _shared_files(bundle, [adapter])


def _folders(names: Sequence[str]) -> list[str]:
    """Where each adapter goes: to its name, or to a safe one where that is too long or collides with a file."""
    folders = []
    for name in names:
        parts = name.split("/")
        if name == ".":
            folders.append("." if len(names) == 1 else safe_name(name))
        else:
            reserved = {EXPORT_NAME, *WRITTEN}.intersection(parts)
            too_long = any(len(part.encode()) > _LONGEST_NAME for part in parts)
            folders.append(safe_name(name) if reserved or too_long else name)
    return folders


def _export_one(bundle: Bundle, adapter: AdapterEntry, root: Path, folder: str, options: _Options) -> ExportedAdapter:
    original = bundle.config(adapter)
    updates = _own_updates(bundle, adapter, options)
    own = updates is not None
    if updates is None:
        updates = _folded_updates(bundle, adapter, options)
    ranks = {module: update.rank for module, update in updates.items()}
    largest = max(ranks.values())
    padded = not own and options.pad and min(ranks.values()) < largest
    if padded:
        updates = {module: update.padded(largest) for module, update in updates.items()}
        ranks = dict.fromkeys(ranks, largest)
    exported = _measured(adapter, folder, largest, math.fsum(update.moved for update in updates.values()))
    changes = Changes(
        rank=None if own else largest,
        truncated=_truncates(bundle, adapter, options.rank),
        padded=padded,
        dtype=", ".join(sorted({_name(side.dtype) for update in updates.values() for side in (update.b, update.a)})),
        squared_distance=exported.squared_distance,
        squared_error_bound=exported.squared_error_bound,
    )
    write_adapter(
        root / folder,
        own_config(original, list(updates)) if own else folded_config(original, ranks),
        {module: (update.b, update.a) for module, update in updates.items()},
        _extras(bundle, adapter, updates),
        readme(bundle, adapter, changes),
    )
    return exported


def _own_updates(bundle: Bundle, adapter: AdapterEntry, options: _Options) -> dict[Module, Written] | None:
    """An adapter of scheme ``original`` as it was, or None where that is not what it is or what is wanted."""
    if not bundle.scheme(adapter).keeps_factors or _truncates(bundle, adapter, options.rank):
        return None
    try:
        config = parse_config(adapter.name, bundle.config_text(adapter))
    except AdapterError:  # a configuration that did not make these scales
        return None
    updates = {entry.module: own_factors(bundle, adapter, entry, options.dtype) for entry in bundle.modules(adapter)}
    ranks = {module: update.rank for module, update in updates.items()}
    scales = {module: update.scale for module, update in updates.items()}
    return updates if gives(config, ranks, scales, one_rank=options.one_rank) else None


def _folded_updates(bundle: Bundle, adapter: AdapterEntry, options: _Options) -> dict[Module, Written]:
    return {
        entry.module: folded_factors(bundle, adapter, entry, options.rank, options.dtype)
        for entry in bundle.modules(adapter)
    }


def _truncates(bundle: Bundle, adapter: AdapterEntry, rank: int | None) -> bool:
    """Whether any module has a higher rank than is asked for."""
    return rank is not None and any(bundle.rank(adapter, entry.name) > rank for entry in bundle.modules(adapter))


def _measured(adapter: AdapterEntry, folder: str, rank: int, moved: float) -> ExportedAdapter:
    """What there is to report of an adapter whose update was moved by so much, in squared norm."""
    if moved == 0:
        claim = adapter.squared_error
        return ExportedAdapter(adapter.name, folder, rank, adapter.scheme, claim, 0.0, claim)
    distance = moved / adapter.squared_norm if adapter.squared_norm else math.inf
    if not math.isfinite(distance):  # of an update that is zero, or claimed to be next to it
        return ExportedAdapter(adapter.name, folder, rank, adapter.scheme, None)
    root = math.sqrt(adapter.squared_error) + math.sqrt(distance)
    bound = root * root if math.isfinite(root * root) else None
    return ExportedAdapter(adapter.name, folder, rank, adapter.scheme, None, distance, bound)


def _extras(bundle: Bundle, adapter: AdapterEntry, updates: dict[Module, Written]) -> dict[str, Tensor]:
    """The tensors that are no LoRA factors, without the scales that are in those of the bundle."""
    extras = bundle.extras(adapter)
    by_name = {module.name: update for module, update in updates.items()}
    for key, tensor in extras.items():
        update = by_name.get(biased_module(key) or "")
        if update is not None and update.scale not in (0, 1):
            extras[key] = unfolded(tensor, update.scale, update.b.dtype)
    return extras


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
