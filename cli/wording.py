"""What the core says of its parameters, as the command line has it: «max_error» is --max-error here."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from lorazip_core.base.text import PARAMETER

Report = TypeVar("Report", bound=msgspec.Struct)

OPTIONS = {
    "adapters": "--adapter",
    "against": "--against",
    "allow_mixed_base": "--allow-mixed-base",
    "allow_pickle": "--allow-pickle",
    "budget": "--budget",
    "budget_per_adapter": "--budget-per-adapter",
    "calibration": "--calibration",
    "clusters": "--clusters",
    "device": "--device",
    "device_memory": "--device-memory",
    "dtype": "--dtype",
    "force": "--force",
    "jobs": "--jobs",
    "limit": "--limit",
    "locked": "--locked",
    "max_error": "--max-error",
    "max_kl": "--max-kl",
    "max_mean_error": "--max-mean-error",
    "memory": "--memory",
    "method": "--method",
    "min_kept": "--min-kept",
    "model": "--model",
    "objective": "--objective",
    "output": "-o",
    "port": "--port",
    "prompt_tokens": "--prompt-tokens",
    "prune": "--prune",
    "rank": "--rank",
    "replace": "--replace",
    "search": "--search",
    "skip_bad": "--skip-bad",
    "tags": "--tag",
    "target": "--target",
    "update": "--update",
}
"""The option of every parameter that the core's messages name."""

# The lists of a report whose items have texts, and those texts; all else in it are names, paths, figures and kinds.
_LISTS = ("warnings", "findings", "skipped", "left_out", "failures")
_TEXTS = ("message", "hint", "reason")


def in_options(text: str) -> str:
    """A message of the core with options in place of parameters."""
    return PARAMETER.sub(lambda found: OPTIONS.get(found[1], found[0]), text)


def report_in_options(report: Report) -> Report:
    """A report whose texts are `in_options`."""
    lists = {name: getattr(report, name, None) for name in _LISTS}
    return msgspec.structs.replace(
        report, **{name: list(map(_item, items)) for name, items in lists.items() if isinstance(items, list)}
    )


def _item(item: msgspec.Struct) -> msgspec.Struct:
    texts = {name: in_options(getattr(item, name)) for name in _TEXTS if hasattr(item, name)}
    return msgspec.structs.replace(item, **texts)
