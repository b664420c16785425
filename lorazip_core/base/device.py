"""Where to compute, by the names that users give."""

from __future__ import annotations

import re

import torch

from .errors import LocalError, UsageError

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device called ``auto``, ``cpu`` or ``cuda[:N]``. Raises UsageError, or LocalError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if wanted is None:
        raise UsageError(f"«device» {name}: choose auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(wanted[1] or 0) >= torch.cuda.device_count():
        raise LocalError(f"«device» {name}: not there ({torch.cuda.device_count()} CUDA devices)", "use «device» cpu")
    return torch.device("cuda:0" if name == "cuda" else name)


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a GPU; 0 for the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def limit_memory(device: torch.device, most: int | None) -> None:
    """Have PyTorch use at most so many bytes of a GPU; before it refuses more, it frees what its cache holds."""
    if device.type == "cuda" and most is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)


def load_linear_algebra(device: torch.device) -> None:
    """Have PyTorch load its linear algebra for a GPU, which it does at first use: two threads must not be the first."""
    if device.type == "cuda":
        torch.linalg.inv(torch.eye(2, device=device))
