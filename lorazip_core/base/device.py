"""Where to compute, as the command line names it."""

from __future__ import annotations

import re

import torch

from . import team
from .errors import LocalError, UsageError

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device called ``auto``, ``cpu`` or ``cuda[:N]``. Raises UsageError, or LocalError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if wanted is None:
        raise UsageError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(wanted[1] or 0) >= torch.cuda.device_count():
        raise LocalError(f"--device {name}: not there ({torch.cuda.device_count()} CUDA devices)", "use --device cpu")
    if name == "cuda":
        # Of the processes of one host each takes its own GPU, and some share one where there are too few.
        name = f"cuda:{team.local_rank() % torch.cuda.device_count()}"
    return torch.device(name)


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a GPU; 0 of the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def hold_to(device: torch.device, most: int | None) -> None:
    """Have PyTorch refuse memory of a GPU beyond ``most`` bytes; it gives back what it only keeps before it does."""
    if device.type == "cuda" and most is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)
