"""The verb: every adapter asked for, decoded and written, and a report of what was written."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor

from ..adapter import Module, write_adapter
from ..bundle import DTYPES, AdapterEntry, Bundle
from ..errors import BundleDamaged, Unsupported, UsageError
from ..files import atomic_directory, canonical_json, safe_name, tree, write_file
from ..linalg import Factors, squared_norm, truncated_svd
from ..progress import Progress, Silent
from ..reconstruct import decode
from ..stopping import check_stop
from . import vllm
from .peft_config import peft_config
from .readme import Changes, readme

REPORT_NAME = "export.json"

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
_SILENT = Silent()

Format = Literal["peft"]
Target = Literal["vllm"]


class ExportedAdapter(msgspec.Struct, frozen=True):
    """An adapter that was written. ``path`` is relative to the output."""

    name: str
    path: str
    rank: int
    scheme: str
    squared_error: float | None
    """What the manifest claims, or null if the export truncated the adapter further."""


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
    force: bool = False,
    progress: Progress = _SILENT,
) -> ExportReport:
    """Write adapters of a bundle (all, or those named) as PEFT adapters into ``output``/<name>, all of them or none.

    ``rank`` truncates every module further. ``dtype`` (bf16, f16, f32) defaults to that of the bundle, and for an
    adapter kept as it was to its own. ``target="vllm"`` refuses what vLLM cannot serve and pads to one rank.

    Raises UsageError for an unknown adapter or a senseless option, Unsupported for what ``target`` does not take,
    OutputExists, and what opening a bundle raises.
    """
    _check_options(bundle_path, output, format, target, rank, dtype)
    bundle = Bundle(bundle_path, ("read", "export"))
    chosen = _choose(bundle, adapters)
    folders = _folders(bundle, [adapter.name for adapter in chosen])
    if target == "vllm":
        vllm.check_adapters(bundle, chosen)
    exported = []
    with (
        atomic_directory(output, force=force, replaceable=is_export) as partial,
        progress.stage("export", len(chosen)) as advance,
    ):
        for adapter, folder in zip(chosen, folders, strict=True):
            check_stop()
            exported.append(_export_one(bundle, adapter, partial, folder, target, rank, dtype))
            advance(1)
        report = ExportReport(
            output=str(output),
            format=format,
            target=target,
            adapters=exported,
            max_lora_rank=vllm.max_lora_rank([one.rank for one in exported]) if target == "vllm" else None,
        )
        here = msgspec.structs.replace(report, output=".")
        write_file(partial / REPORT_NAME, canonical_json(msgspec.to_builtins(here)))
    return report


def is_export(folder: Path) -> bool:
    """Whether a directory holds what an export wrote and nothing else: only such a one may be replaced."""
    try:
        report = msgspec.json.decode((folder / REPORT_NAME).read_bytes(), type=ExportReport)
    except (OSError, msgspec.DecodeError):
        return False
    paths = {(Path(adapter.path) / name).as_posix() for adapter in report.adapters for name in _ADAPTER_FILES}
    return set(tree(folder)) <= paths | {REPORT_NAME}


def _check_options(
    bundle: Path, output: Path, format: str, target: str | None, rank: int | None, dtype: str | None
) -> None:
    if format != "peft":
        raise Unsupported(f"export format {format!r}", "this lorazip writes peft")
    if target not in (None, "vllm"):
        raise Unsupported(f"export target {target!r}", "this lorazip knows vllm")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}: must be at least 1")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(bundle)):
        raise UsageError(f"{output} is inside the bundle", "choose another -o")


def _choose(bundle: Bundle, names: Sequence[str]) -> list[AdapterEntry]:
    known = {adapter.name: adapter for adapter in bundle.manifest.adapters}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "'lorazip info' lists them"
            raise UsageError(f"{bundle.path} has no adapter {name!r}", hint)
    return [adapter for name, adapter in known.items() if not names or name in names]


def _folders(bundle: Bundle, names: Sequence[str]) -> list[str]:
    """Where each adapter goes: to its name, or to a safe one where that would collide with a file of an export."""
    folders = []
    for name in names:
        parts = name.split("/")
        if name == ".":
            folders.append("." if len(names) == 1 else safe_name(name))
        elif {"", ".", ".."}.intersection(parts) or "\0" in name:
            raise BundleDamaged(f"{bundle.path}: the adapter name {name!r} is no path below a folder")
        else:
            reserved = {REPORT_NAME, *_ADAPTER_FILES}.intersection(parts)
            folders.append(safe_name(name) if reserved else name)
    return folders


def _export_one(
    bundle: Bundle,
    adapter: AdapterEntry,
    root: Path,
    folder: str,
    target: Target | None,
    rank: int | None,
    dtype: str | None,
) -> ExportedAdapter:
    factors: dict[Module, Factors] = {}
    norm = kept = 0.0
    truncated = False
    for entry in bundle.modules(adapter):
        module = Module(entry.name, entry.kind, entry.d_out, entry.d_in, tuple(entry.kernel))
        b, a = decode(bundle, adapter, entry.name, torch.float64)
        norm += float(squared_norm(b, a))
        if rank is not None and rank < a.shape[0]:
            b, a = truncated_svd(b, a, rank)
            truncated = True
        kept += float(squared_norm(b, a))
        factors[module] = _rounded(bundle, adapter, module, (b, a), dtype)
    ranks = {module.name: a.shape[0] for module, (_, a) in factors.items()}
    largest = max(ranks.values())
    padded = target == "vllm" and min(ranks.values()) < largest
    if padded:
        factors = {module: vllm.padded(both, largest) for module, both in factors.items()}
        ranks = dict.fromkeys(ranks, largest)
    dtypes = sorted({str(b.dtype).removeprefix("torch.") for b, _ in factors.values()})
    changes = Changes(largest, truncated, max(0.0, 1 - kept / norm) if norm else 0.0, padded, ", ".join(dtypes))
    embeddings = any(module.kind == "embedding" for module in factors)
    write_adapter(
        root / folder,
        peft_config(bundle.config(adapter), ranks, embeddings),
        factors,
        bundle.extras(adapter),
        readme(bundle, adapter, changes),
    )
    claimed = None if truncated else adapter.squared_error
    return ExportedAdapter(adapter.name, folder, largest, adapter.scheme, claimed)


def _rounded(bundle: Bundle, adapter: AdapterEntry, module: Module, factors: Factors, dtype: str | None) -> Factors:
    """The factors in the dtype of the export."""
    if dtype is not None:
        wanted = DTYPES[dtype]
    elif adapter.scheme == "original":
        wanted = bundle.individual(adapter, module.name)[0].dtype
    else:
        wanted = DTYPES[bundle.manifest.parameters.dtype]
    b, a = (_finite(bundle, adapter, module, factor.to(wanted)) for factor in factors)
    return b, a


def _finite(bundle: Bundle, adapter: AdapterEntry, module: Module, factor: Tensor) -> Tensor:
    if not torch.isfinite(factor).all():
        dtype = str(factor.dtype).removeprefix("torch.")
        raise Unsupported(
            f"{bundle.path}: adapter {adapter.name!r}: the factors of {module.name} do not fit into {dtype}",
            "choose another --dtype",
        )
    return factor
