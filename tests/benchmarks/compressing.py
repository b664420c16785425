"""`lorazip compress` as a process of its own, and all that can be seen of it from outside."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from process import LORAZIP, Finished, Watched, run

MANIFEST = "manifest.json"
_GPU_INTERVAL_MS = 200


@dataclass(frozen=True)
class Settings:
    """What `compress` is asked for."""

    clusters: int = 25  # 0: no shared bases, every adapter on its own
    rank: int = 16
    device: str = "auto"
    more: tuple[object, ...] = ()  # further words, like ("--memory", "2GB")

    def words(self, folder: Path, bundle: Path) -> list[object]:
        shared = ("--clusters", self.clusters, "--rank", self.rank) if self.clusters else ()
        return ["compress", folder, "-o", bundle, *shared, "--device", self.device, *self.more, "--json", "-q"]


@dataclass(frozen=True)
class Compressed:
    """One run. ``seconds`` are of the whole process, ``own_seconds`` what it says itself; None for what is unknown.

    ``device_bytes`` is what it says itself to have had at most on the GPU; ``gpu_bytes`` by how much the memory in use
    on the fullest GPU rose (nvidia-smi), which has the CUDA context and the caches of the allocator in it.
    """

    adapters: int
    seconds: float
    exit_code: int
    watched: Watched | None
    own_seconds: float | None = None
    mean_squared_error: float | None = None
    max_squared_error: float | None = None
    bytes_bundle: int | None = None
    bytes_manifest: int | None = None
    device_bytes: int | None = None
    gpu_bytes: int | None = None
    message: str = ""
    report: dict[str, object] = field(default_factory=dict, repr=False)

    def figures(self) -> dict[str, object]:
        """All of it for a JSON file, less the list of what the report names one by one."""
        named = ("individual", "skipped", "zero")
        kept = {key: value for key, value in self.report.items() if key not in named}
        return {**asdict(self), "watched": self.watched and self.watched._asdict(), "report": kept}


def compress(
    folder: Path,
    bundle: Path,
    settings: Settings,
    *,
    adapters: int,
    data_limit: int | None = None,
    kill_after: float | None = None,
    check: bool = True,
) -> Compressed:
    """Compress ``folder`` into ``bundle``, which stays."""
    command = [*LORAZIP, *settings.words(folder, bundle)]
    with GpuMemory() as gpu:
        done = run(command, watch=True, data_limit=data_limit, kill_after=kill_after, check=check)
    if done.exit_code:
        return Compressed(adapters, done.seconds, done.exit_code, done.watched, message=_last_line(done))
    report = json.loads(done.stdout)
    summary = report["summary"]
    return Compressed(
        adapters=adapters,
        seconds=done.seconds,
        exit_code=0,
        watched=done.watched,
        own_seconds=report["seconds"],
        mean_squared_error=summary["mean_squared_error"],
        max_squared_error=summary["max_squared_error"],
        bytes_bundle=summary["bytes_bundle"],
        bytes_manifest=(bundle / MANIFEST).stat().st_size,
        device_bytes=report.get("device_peak_bytes"),
        gpu_bytes=gpu.rise,
        report=report,
    )


def digest(bundle: Path) -> str:
    """SHA-256 over the paths and bytes of all files of a bundle."""
    found = hashlib.sha256()
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(bundle).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    return found.hexdigest()


def remove(bundle: Path) -> None:
    """Remove a bundle and what an interrupted run left beside it."""
    for path in (bundle, bundle.with_name(f".{bundle.name}.partial")):
        shutil.rmtree(path, ignore_errors=True)


def linked(source: Path, target: Path, count: int) -> Path:
    """``count`` adapters at ``target``, all hard links: the first of ``source``, then all of them again, and so on.

    Adapters of the k-th round are in the folder ``k00001`` and so on, so that no folder holds very many.
    """
    folders = sorted(path.parent for path in source.glob("*/adapter_config.json"))
    if not folders:
        raise SystemExit(f"no adapters in {source}")
    for number in range(count):
        turn, which = divmod(number, len(folders))
        there = target / f"k{turn:05}" / folders[which].name
        there.mkdir(parents=True)
        for path in folders[which].glob("adapter_*"):
            os.link(path, there / path.name)
    return target


def megabytes(value: float | None) -> str:
    """A number of bytes as MB, or a dash."""
    return "-" if value is None else f"{value / 1e6:,.0f}"


def peaks(seen: Iterable[Watched | None]) -> list[str]:
    """Largest anonymous memory and largest fall of the machine's free memory in MB, open files and mappings."""
    there = [one for one in seen if one is not None]
    if not there:
        return ["-"] * 3
    return [
        megabytes(max(one.anonymous for one in there)),
        megabytes(max(one.machine for one in there)),
        f"{max(one.open_files for one in there):,}, {max(one.mappings for one in there):,}",
    ]


def gpu(runs: Sequence[Compressed]) -> str:
    """Largest use of a GPU in MB, by the run's own count, and in brackets the rise that nvidia-smi shows."""
    own = max((one.device_bytes for one in runs if one.device_bytes is not None), default=None)
    rise = max((one.gpu_bytes for one in runs if one.gpu_bytes is not None), default=None)
    return megabytes(own) if rise is None else f"{megabytes(own)} ({megabytes(rise)})"


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*names: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(*names), "|---" * len(names) + "|"]


PEAKS = "peak anonymous, MB", "of the machine, MB", "open files, mappings"


def _last_line(done: Finished) -> str:
    return (done.stderr.strip().splitlines() or [""])[-1][:300]


class GpuMemory(AbstractContextManager["GpuMemory"]):
    """By how much the memory in use of the fullest GPU rises: ``rise`` in bytes, None without nvidia-smi."""

    rise: int | None = None

    def __enter__(self) -> GpuMemory:
        self._process: subprocess.Popen[str] | None = None
        self._file: IO[str] | None = None
        command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
        if shutil.which(command[0]):
            self._file = tempfile.TemporaryFile("w+")
            self._process = subprocess.Popen([*command, "-lms", str(_GPU_INTERVAL_MS)], stdout=self._file, text=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is None or self._file is None:
            return
        self._process.terminate()
        self._process.wait()
        self._file.seek(0)
        self.rise = _rise(self._file.read())
        self._file.close()


def _rise(text: str) -> int | None:
    """The largest rise above the first value of any GPU, from lines ``index, MiB``."""
    seen: dict[str, list[int]] = {}
    for line in text.splitlines():
        index, _, value = line.partition(",")
        if value.strip().isdigit():
            seen.setdefault(index, []).append(int(value))
    return max((max(values) - values[0] for values in seen.values()), default=0) << 20 if seen else None
