"""The verb: every adapter asked for, decoded and written, and a report of what was written."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import torch
from msgspec import UNSET
from torch import Tensor

from ..adapter import Module, Parameter, fuse, write_adapter
from ..bundle import DTYPES, AdapterEntry, Bundle, ModuleEntry
from ..errors import BundleDamaged, Unsupported, UsageError
from ..files import atomic_directory, canonical_json, check_output, check_space, safe_name, tree, write_file
from ..linalg import Factors, squared_norm, truncated_svd
from ..places import check_place
from ..progress import Progress, Silent
from ..reconstruct import decode
from . import vllm
from .peft_config import peft_config
from .readme import Changes, readme
from .size import export_bytes

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
    check_output(output, force=force, not_ours=not_of_export)
    check_space(output, export_bytes(bundle, chosen, rank, dtype))
    exported = []
    with (
        atomic_directory(output, force=force, not_ours=not_of_export) as partial,
        progress.stage("export", len(chosen)) as advance,
    ):
        for adapter, folder in zip(chosen, folders, strict=True):
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


def not_of_export(folder: Path) -> str | None:
    """Why a directory may not be replaced as an export, in words; None for one that has nothing but what it wrote."""
    try:
        report = msgspec.json.decode((folder / REPORT_NAME).read_bytes(), type=ExportReport)
    except FileNotFoundError:
        return f"it has no {REPORT_NAME}"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return f"{REPORT_NAME} is not that of an export"
    ours = {(Path(adapter.path) / name).as_posix() for adapter in report.adapters for name in _ADAPTER_FILES}
    for path in tree(folder):
        if path not in ours and path != REPORT_NAME and not path.endswith("/"):
            return f"{REPORT_NAME} does not name {path}"
    return None


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
    check_place(output, [bundle])


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
        module = _module(entry)
        b, a = decode(bundle, adapter, entry.name, torch.float64)
        norm += float(squared_norm(b, a))
        if rank is not None and rank < a.shape[0]:
            b, a = truncated_svd(b, a, rank)
            truncated = True
        kept += float(squared_norm(b, a))
        factors[module] = _rounded(bundle, adapter, module, (b, a), dtype)
    ranks: dict[str, int] = {}
    for module, (_, a) in factors.items():
        ranks[module.target] = max(ranks.get(module.target, 0), a.shape[0])
    parameters = {module.target for module in factors if module.parameter}
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
        peft_config(bundle.config(adapter), ranks, embeddings, parameters),
        fuse(factors),
        bundle.extras(adapter),
        readme(bundle, adapter, changes),
    )
    claimed = None if truncated else adapter.squared_error
    return ExportedAdapter(adapter.name, folder, largest, adapter.scheme, claimed)


def _module(entry: ModuleEntry) -> Module:
    parameter = None if entry.parameter is UNSET else Parameter(*msgspec.structs.astuple(entry.parameter))
    return Module(entry.name, entry.kind, entry.d_out, entry.d_in, tuple(entry.kernel), parameter)


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
