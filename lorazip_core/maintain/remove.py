"""The verb ``remove``: a bundle without some of its adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct

from ..base.atomic import atomic_directory, check_output
from ..base.errors import UsageError
from ..base.filesystem import check_space
from ..base.progress import Progress, Silent
from ..base.stopping import stop_unmasked
from ..base.threads import one_thread
from ..bundle.choose import matching
from ..bundle.contradictions import refuse_contradictions
from ..bundle.output_path import check_output_path
from ..bundle.reader import Bundle
from ..bundle.refit import reasons_to_refit
from ..bundle.writer import BundleWriter, not_of_bundle
from .carry import Staying
from .successor import Joining, successor

_SILENT = Silent()


class RemoveReport(Struct, frozen=True, kw_only=True):
    """What ``remove`` did, or would do."""

    schema: Literal["lorazip.remove/1"] = "lorazip.remove/1"
    bundle: str
    output: str | None
    """The bundle that was written; null if none was."""
    base_model: str | None
    removed: list[str]
    adapters: int
    """How many are left."""
    rewritten: list[str]
    """Files that had others too, and of which the rest is left, with the same tensors."""
    dropped: list[str]
    """Files of which nothing is left."""
    bytes_before: int
    bytes_after: int | None
    """Null if nothing was written."""
    refit: list[str]
    """Why compressing all adapters again would pay; empty if it would not, or if nothing was written."""
    seconds: float


def remove(
    path: Path,
    names: Sequence[str],
    output: Path | None,
    *,
    force: bool = False,
    progress: Progress = _SILENT,
) -> RemoveReport:
    """Write the bundle at ``path`` without the adapters called ``names`` to ``output``, whole or not at all.

    ``names`` are those of adapters or patterns of `fnmatch`. All other adapters keep the tensors that they have, bit
    for bit, and files that have none of the removed ones stay as they are. Without an ``output`` nothing is written,
    and the report says what would be.

    Raises UsageError for a name that the bundle does not have and if none would be left, BundleDamaged and Unsupported
    as opening a bundle does, OutputExists.
    """
    started = time.monotonic()
    if output is not None:
        check_output_path(output, [path])
        check_output(output, force=force, not_ours=not_of_bundle)
    bundle = Bundle(path)
    refuse_contradictions(path, bundle.manifest)
    gone = set(matching(bundle.manifest, path, names))
    everyone = bundle.manifest.adapters
    staying = Staying.without(bundle, gone)
    if not staying.indices:
        raise UsageError(f"{path}: these are all of its adapters", "a bundle has at least one: remove the directory")
    size, refit = None, []
    if output is not None:
        check_space(output, staying.written_bytes(output))
        with (
            one_thread(),
            atomic_directory(output, force=force, not_ours=not_of_bundle) as building,
            stop_unmasked(),
        ):
            writer = BundleWriter(building)
            staying.write(writer, progress)
            manifest = successor(staying, Joining(), writer)
            size, refit = writer.finish(manifest), reasons_to_refit(manifest)
    return RemoveReport(
        bundle=str(path),
        output=None if output is None else str(output),
        base_model=bundle.manifest.base_model,
        removed=[adapter.name for adapter in everyone if adapter.name in gone],
        adapters=len(staying.indices),
        rewritten=sorted(staying.cut),
        dropped=staying.dropped,
        bytes_before=bundle.size_bytes,
        bytes_after=size,
        refit=refit,
        seconds=time.monotonic() - started,
    )
