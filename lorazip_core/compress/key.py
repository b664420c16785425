"""What two runs have to have in common for the pieces of one to serve the other."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from .. import __version__
from ..base.digests import canonical_json, sha256_bytes, sha256_file
from ..planning.options import CompressOptions
from ..reading.packs import Budget
from ..reading.scan import Scan


def work_key(
    scanned: Scan, options: CompressOptions, device: torch.device, budget: Budget, calibration: str | None = None
) -> str:
    """A digest of all that decides the bytes of a piece: adapters, options, versions, and what computes.

    ``calibration`` is the SHA-256 of the file of moments.

    Another processor, or one that is told to do without some of its instructions, sums in another order: BLAS chooses
    its kernels by the model.
    """
    names = [adapter.name for adapter in scanned.collection.adapters]
    clusters = sha256_file(options.clusters) if isinstance(options.clusters, Path) else options.clusters
    return sha256_bytes(
        canonical_json(
            {
                "adapters": list(zip(names, scanned.digests(), strict=True)),
                "calibration": calibration,
                "clusters": clusters,
                "device": device.type,
                "dtype": options.dtype,
                "max_bytes": options.most_bytes(len(names)),
                "max_error": options.max_error,
                "max_mean_error": options.max_mean_error,
                "method": options.chosen,
                "objective": options.objective,
                "packs": list(budget),
                "processors": [
                    torch.backends.cpu.get_cpu_capability(),
                    _processor_model(),
                    torch.cuda.get_device_name(device) if device.type == "cuda" else None,
                ],
                "rank": options.kept_rank,
                "seed": options.seed,
                "versions": [__version__, torch.__version__],
                "weights": options.weights,
            }
        )
    )


def _processor_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model name of the processor as the kernel tells it, else what `platform` has, which may be nothing."""
    try:
        told = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        told = None
    return told[1].strip() if told else platform.processor()
