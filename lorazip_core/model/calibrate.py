"""``calibrate``: the second moments of what goes into the modules of a base model, over rows of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from msgspec import Struct

from ..adapter.collection import open_collection
from ..base.device import find_device
from ..base.errors import UsageError
from ..base.progress import Progress, Silent
from ..base.stopping import check_stop
from ..base.text import printable
from ..bundle.manifest import SkippedEntry
from .base_model import BaseModel, load_base_model
from .batches import equal_lengths
from .fitting import misfit
from .inputs import linear_modules, sharing, summing
from .moments import RANK, Moment, to_bytes
from .options import ModelDtype, ModelOptions
from .prompts import Example, Prompts

_SILENT = Silent()


class CalibrateReport(Struct, frozen=True, kw_only=True):
    """What ``calibrate --json`` prints."""

    schema: Literal["lorazip.calibrate/1"] = "lorazip.calibrate/1"
    output: str
    model: str
    rows: str
    adapters: str | None
    """The collection whose modules were looked at; null for all linear modules but the head."""
    dtype: ModelDtype
    prompt_tokens: int
    rank: int
    examples: int
    """Distinct rows."""
    tokens: int
    """All of their tokens, prompts and answers."""
    modules: int
    inputs: int
    """Distinct inputs: modules that get the same one share what is stored."""
    size_bytes: int
    left_out: list[SkippedEntry]
    """Modules that the collection targets and that have no moments, and why."""


class Calibrated(NamedTuple):
    """The report, and the file that it is about, which is to be written."""

    report: CalibrateReport
    data: bytes


def calibrate(
    options: ModelOptions,
    output: Path,
    *,
    adapters: Path | None = None,
    rank: int = RANK,
    device: str = "cpu",
    allow_pickle: bool = False,
    progress: Progress = _SILENT,
) -> Calibrated:
    """Run ``options.rows`` through the base model as it is, and average x xᵀ over all tokens of prompts and answers.

    Of each distinct input, d_in² float32 are held on ``device``. The same rows give the same bytes on the same machine,
    with as many threads. Raises as `ModelOptions.read`, `load_base_model` and `open_collection` do, and UsageError if
    no module is left.
    """
    rows = options.read().all()
    where = find_device(device)
    base = load_base_model(options.model, where, options.dtype)
    prompts = Prompts(base.tokenizer, options.prompt_tokens)
    examples = [prompts.example(row) for row in rows]
    base.check_length(examples)
    modules, left_out = linear_modules(base.model), list[SkippedEntry]()
    if adapters is not None:
        modules, left_out = _targeted(base, adapters, allow_pickle, progress)
    moments = _moments(base, modules, examples, rank, progress) if modules else []
    seen = {module for moment in moments for module in moment.modules}
    left_out += [SkippedEntry(name, "no row reaches it") for name in modules if name not in seen]
    if not moments:
        why = f"{left_out[0].name}: {left_out[0].reason}" if left_out else "the model has no linear module"
        raise UsageError(f"{options.model}: there is no module to look at", why)
    data = to_bytes(moments)
    report = CalibrateReport(
        output=printable(str(output)),
        model=printable(options.model),
        rows=printable(str(options.rows)),
        adapters=None if adapters is None else printable(str(adapters)),
        dtype=options.dtype,
        prompt_tokens=options.prompt_tokens,
        rank=rank,
        examples=len(examples),
        tokens=sum(len(example.ids) for example in examples),
        modules=len(seen),
        inputs=len(moments),
        size_bytes=len(data),
        left_out=left_out,
    )
    return Calibrated(report, data)


def _targeted(
    base: BaseModel, adapters: Path, allow_pickle: bool, progress: Progress
) -> tuple[list[str], list[SkippedEntry]]:
    """The modules of a collection that have a vector for input, in the order of the model, and why others are left out.

    Only the names matter, so adapters that cannot be used are passed over.
    """
    collection = open_collection(adapters, skip_bad=True, allow_mixed_base=True, allow_pickle=allow_pickle)
    for skipped in collection.skipped:
        progress.note(f"left out: {skipped.name}: {skipped.reason}")
    targets: set[str] = set()
    left_out: list[SkippedEntry] = []
    for module in collection.modules:
        embedding = "its input is no vector but a token" if module.kind == "embedding" else None
        if reason := embedding or misfit(base.model, [module]):
            left_out.append(SkippedEntry(module.name, reason))
        else:
            targets.add(module.name)
    return [name for name, _ in base.model.named_modules() if name in targets], left_out


def _moments(
    base: BaseModel, modules: list[str], examples: list[Example], rank: int, progress: Progress
) -> list[Moment]:
    def run(ids: torch.Tensor) -> None:
        check_stop()
        base.logits(ids, torch.ones_like(ids), range(ids.shape[1] - 1, ids.shape[1]))

    with torch.inference_mode():
        shortest = min(examples, key=lambda example: len(example.ids))
        groups = sharing(base.model, modules, lambda: run(torch.tensor([shortest.ids], device=base.device)))
        with (
            progress.stage("running the model", len(examples)) as advance,
            summing(base.model, [names[0] for names in groups]) as sums,
        ):
            for ids in equal_lengths(examples, base.device):
                run(ids)
                advance(len(ids))
        found = []
        with progress.stage("finding directions", len(groups)) as advance:
            for names in groups:
                check_stop()
                if names[0] in sums:
                    total, (vectors,) = sums[names[0]]
                    found.append(Moment.of_sum(names, total, vectors, rank))
                advance(1)
    return found
