"""How long does reading a collection take? The baseline of `scale.py`, and other ways to read the same files.

    python tests/benchmarks/readers.py DIR HOW THREADS DEVICE

reads every adapter_model.safetensors below DIR, in the order of their paths as UTF-8 bytes, in a process of its own,
keeps nothing, waits until the device has everything, and prints one JSON object. HOW is

    load_file   safetensors.torch.load_file(path, device=DEVICE); with one thread this is **the baseline**
    safe_open   safetensors.safe_open(path, framework="pt", device=DEVICE) and get_tensor of every key
    pread       the bytes alone, nothing parsed: into one (pinned) buffer per thread, and from there to the device

On the CPU safetensors maps the file and reads nothing before somebody looks at it; there every tensor is copied, too.
`seconds` begins when Python, PyTorch and the device have started (`import_seconds`, `device_seconds`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import local
from typing import TYPE_CHECKING

from compressing import PEAKS, head, peaks, row
from process import Watched, run

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
BASELINE = "load_file", 1
OTHERS = (("load_file", 4), ("load_file", 16), ("safe_open", 1), ("pread", 1), ("pread", 16))
_PIECE = 8 << 20  # of a file, to warm the page cache


@dataclass(frozen=True)
class Reading:
    """One way to read a collection, once. Seconds of the process include all start-up, ``seconds`` none."""

    how: str
    threads: int
    adapters: int
    bytes: int
    seconds: float
    import_seconds: float
    device_seconds: float
    process_seconds: float
    watched: Watched | None

    @property
    def name(self) -> str:
        return f"{self.how}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / 1e9 / self.seconds

    def figures(self) -> dict[str, object]:
        """All of it for a JSON file."""
        return {**asdict(self), "watched": self.watched and self.watched._asdict()}


def files_of(folder: Path) -> list[Path]:
    """Every weights file below ``folder``, in the order of their paths as bytes."""
    return sorted(folder.rglob(WEIGHTS), key=lambda path: os.fsencode(path.relative_to(folder).as_posix()))


def warm(folder: Path, threads: int = 8) -> int:
    """Read every file once, so that all of them are in the page cache if it holds them; the number of bytes.

    What others have still to write to the disk is written first, so that it does not slow down what is timed next.
    """
    os.sync()

    def read(path: Path) -> int:
        buffer, size = bytearray(_PIECE), 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
        return size

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(read, files_of(folder)))


def measure(folder: Path, how: str, threads: int, device: str) -> Reading:
    """Read ``folder`` in a fresh process."""
    done = run([sys.executable, __file__, folder, how, threads, device], watch=True)
    return Reading(**json.loads(done.stdout), process_seconds=done.seconds, watched=done.watched)


def table(readings: Sequence[Reading]) -> str:
    """A line for each, as Markdown."""
    lines = head("read with", "s", "GB/s", "s with start-up", "of it import, device", *PEAKS)
    for one in readings:
        start = f"{one.import_seconds:.2f}, {one.device_seconds:.2f}"
        speed = f"{one.gigabytes_per_second:.2f}"
        lines.append(
            row(one.name, f"{one.seconds:.2f}", speed, f"{one.process_seconds:.2f}", start, *peaks([one.watched]))
        )
    return "\n".join(lines)


def _load_file(device: torch.device) -> Callable[[Path], None]:
    from safetensors.torch import load_file

    def read(path: Path) -> None:
        for tensor in load_file(path, device=str(device)).values():
            _look(tensor)

    return read


def _safe_open(device: torch.device) -> Callable[[Path], None]:
    from safetensors import safe_open

    def read(path: Path) -> None:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                _look(file.get_tensor(key))

    return read


def _look(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cpu":
        tensor.clone()


def _pread(device: torch.device) -> Callable[[Path], None]:
    import torch

    own = local()
    on_gpu = device.type == "cuda"

    def read(path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if not hasattr(own, "slot") or len(own.slot) < size:
                own.slot = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
                if on_gpu:
                    own.there = torch.empty(size, dtype=torch.uint8, device=device)
                    own.stream = torch.cuda.Stream(device)
            view, reached = memoryview(own.slot.numpy()), 0
            while reached < size:
                reached += os.preadv(file.fileno(), [view[reached:size]], reached)
        if on_gpu:
            with torch.cuda.stream(own.stream):
                own.there[:size].copy_(own.slot[:size], non_blocking=True)
            own.stream.synchronize()

    return read


READERS = {"load_file": _load_file, "safe_open": _safe_open, "pread": _pread}


def main(argv: Sequence[str], started: float) -> int:
    folder, how, threads, name = Path(argv[0]), argv[1], int(argv[2]), argv[3]
    import safetensors.torch  # noqa: F401 - what the readers import
    import torch

    imported = time.monotonic()
    device = torch.device(name)
    read = READERS[how](device)
    torch.zeros(1, device=device).add_(1).cpu()
    ready = time.monotonic()
    files = files_of(folder)
    if threads == 1:
        for path in files:
            read(path)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(read, files):
                pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.monotonic() - ready
    figures = {
        "how": how,
        "threads": threads,
        "adapters": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "seconds": seconds,
        "import_seconds": imported - started,
        "device_seconds": ready - imported,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], time.monotonic()))
