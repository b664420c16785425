"""The model card of an exported adapter: where it comes from, what was done to it, and how to load it."""

from __future__ import annotations

import json
import re
from typing import NamedTuple
from urllib.parse import quote

from ..adapter.lock import Origin, is_inner_path
from ..bundle.manifest import AdapterEntry
from ..bundle.reader import Bundle

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_UNKNOWN = Origin()


class Changes(NamedTuple):
    """What the export itself did to the adapter."""

    rank: int | None
    """The rank of all its modules, or the largest; None if it has its own factors under its own configuration."""
    truncated: bool
    padded: bool
    dtype: str
    squared_distance: float | None
    """‖ΔŴ−ΔW'‖² / ‖ΔW‖² of the update in the bundle and the one written, measured; None where ΔW is zero."""
    squared_error_bound: float | None


def readme(bundle: Bundle, adapter: AdapterEntry, changes: Changes) -> str:
    """The text of ``README.md``, with the front matter of a model card."""
    base = bundle.manifest.base_model_of(adapter)
    origin = adapter.origin or _UNKNOWN
    front = ["library_name: peft"]
    if base and _HUB_ID.fullmatch(base):
        front.insert(0, f"base_model: {json.dumps(base)}")
    if origin.license and _LICENSE.fullmatch(origin.license):
        front.append(f"license: {json.dumps(origin.license)}")
    front += ["tags:", "- lora", "- lorazip"]
    sources = "\n".join(
        f"| {_code(file.path)} | {file.size_bytes} | `{file.sha256}` |" for file in bundle.sources(adapter)
    )
    return f"""---
{chr(10).join(front)}
---

# {_line(adapter.name if adapter.name != "." else "LoRA adapter")}

A LoRA adapter of {_code(base) if base else "an unnamed base model"}, exported from a lorazip bundle.

## Origin

The adapter {_code(adapter.name)}{_source(origin)}, read from these files. {_license(origin)}

| file | bytes | sha256 |
|---|---|---|
{sources}

## Compression

- {_scheme(bundle, adapter, changes)}
- {_error(adapter, changes)}
- {_factors(bundle, adapter, changes)}

## Use

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


def _source(origin: Origin) -> str:
    """The repository, linked where its name and commit can only be those of the Hub.

    A local directory is left out: it says nothing to whoever reads a model card, and much of who wrote it.
    """
    if not origin.repository:
        return ""
    repository, commit = _code(origin.repository), origin.commit
    if commit and _REPOSITORY.fullmatch(origin.repository) and _COMMIT.fullmatch(commit):
        folder = f"/{quote(origin.subfolder)}" if is_inner_path(origin.subfolder) else ""
        repository = f"[{repository}](https://huggingface.co/{origin.repository}/tree/{commit}{folder})"
    folder = f", folder {_code(origin.subfolder)}" if origin.subfolder else ""
    return f" of {repository}{f' at commit {_code(commit)}' if commit else ''}{folder}"


def _license(origin: Origin) -> str:
    named = f": {_code(origin.license)}" if origin.license else ""
    return f"Its licence is that of the original adapter{named}."


def _scheme(bundle: Bundle, adapter: AdapterEntry, changes: Changes) -> str:
    scheme = bundle.scheme(adapter)
    if scheme.keeps_factors:
        if changes.rank is not None:
            return f"Scheme `{adapter.scheme}`: the bundle has its own factors, from which the export computed others."
        as_they_were = ", as they were" if changes.squared_distance == 0 else ""
        return f"Scheme `{adapter.scheme}`: {scheme.about}{as_they_were}."
    rank, sharing = adapter.rank, 1
    if adapter.cluster is not None:
        cluster = bundle.manifest.clusters[adapter.cluster]
        rank, sharing = cluster.rank, sum(len(shard.adapters) for shard in cluster.shards)
    return f"Scheme `{adapter.scheme}`: {scheme.about.format(rank=rank, adapters=sharing)}."


def _error(adapter: AdapterEntry, changes: Changes) -> str:
    claim = f"{adapter.squared_error:.6g} (‖ΔW − ΔŴ‖² / ‖ΔW‖² over all its modules)"
    if changes.squared_distance == 0:
        return f"Squared error against the original: {claim}."
    did = f"{'truncated it further and ' if changes.truncated else ''}rounded it to {changes.dtype}"
    if changes.squared_distance is None or changes.squared_error_bound is None:
        return f"Squared error of the bundle against the original: {claim}. The export {did}."
    return (
        f"Squared error of the bundle against the original: {claim}. The export {did}, which moved the update by "
        f"{changes.squared_distance:.6g} of ‖ΔW‖² (squared, measured). So the squared error against the original is at "
        f"most {changes.squared_error_bound:.6g}."
    )


def _factors(bundle: Bundle, adapter: AdapterEntry, changes: Changes) -> str:
    if changes.rank is None:
        return f"Its own factors, {changes.dtype}, with the ranks and scales of its own configuration."
    padded = ", padded with zeros to one rank for all modules" if changes.padded else ""
    if not bundle.scheme(adapter).keeps_factors:
        form = "A = Vᵀ and B = U Σ"
    elif changes.truncated:
        form = "A = Vᵀ and B = U Σ of each truncated update, else its own A and B,"
    else:
        form = "its own A, and its own B"
    return (
        f"Rank {changes.rank}{padded}, {changes.dtype}: {form} with the scale folded in, so that "
        "`lora_alpha` equals the rank of every module."
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def _code(text: str) -> str:
    return f"`{_line(text).replace('`', chr(39)).replace('|', '/') or ' '}`"  # two ticks alone would open a longer one
