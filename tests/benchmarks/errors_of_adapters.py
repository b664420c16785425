"""Squared errors between two directories of PEFT adapters, by numpy in float64, from the files alone.

Shares nothing with lorazip but the file format, so that it can judge lorazip and others alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file

Matrix = npt.NDArray[np.float64]
_SUFFIX_A = ".lora_A.weight"


class Errors(NamedTuple):
    """Over adapters: mean and worst of Σ_m‖ΔW−ΔŴ‖²/Σ_m‖ΔW‖², and the mean over adapters and modules of the ratio."""

    mean: float
    worst: float
    module_mean: float


def compare(originals: Path, others: Path) -> Errors:
    """Errors of every adapter in ``originals`` as the folder of the same name in ``others`` represents it."""
    folders = sorted(path.parent for path in originals.glob("*/adapter_config.json"))
    if not folders:
        raise SystemExit(f"{originals}: no adapters")
    weighted, by_module = zip(*(_errors(folder, others / folder.name) for folder in folders), strict=True)
    return Errors(float(np.mean(weighted)), max(weighted), float(np.mean(by_module)))


def _errors(original: Path, other: Path) -> tuple[float, float]:
    """(energy-weighted squared error, mean over modules of each module's) of one adapter."""
    wanted, found = updates(original), updates(other)
    if wanted.keys() != found.keys():
        raise SystemExit(f"{other}: other modules than {original}")
    energy = {name: squared_norm(*wanted[name]) for name in wanted}
    lost = {name: squared_distance(wanted[name], found[name]) for name in wanted}
    ratios = [lost[name] / energy[name] for name in wanted if energy[name] > 0]
    return sum(lost.values()) / sum(energy.values()), float(np.mean(ratios))


def updates(folder: Path) -> dict[str, tuple[Matrix, Matrix]]:
    """(scale · B, A) of every module; scale = alpha/r of the module, or alpha/√r with rsLoRA."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, tensor in tensors.items():
        if key.endswith(_SUFFIX_A):
            name = key.removeprefix("base_model.model.").removesuffix(_SUFFIX_A)
            a = tensor.double().numpy()
            b = tensors[key.removesuffix(_SUFFIX_A) + ".lora_B.weight"].double().numpy()
            alpha = _of(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
            rank = a.shape[0]
            found[name] = (alpha / (rank**0.5 if config.get("use_rslora") else rank) * b, a)
    return found


def _of(pattern: dict[str, float], name: str, default: float) -> float:
    """The entry of a PEFT pattern for a module, by its name or the end of it; no regular expressions."""
    return next((value for key, value in pattern.items() if f".{name}".endswith(f".{key}")), default)


def squared_norm(b: Matrix, a: Matrix) -> float:
    """‖B A‖² = Σ (BᵀB ∘ AAᵀ)."""
    return float(np.sum((b.T @ b) * (a @ a.T)))


def squared_distance(x: tuple[Matrix, Matrix], y: tuple[Matrix, Matrix]) -> float:
    """‖B_x A_x − B_y A_y‖² = ‖R_B R_Aᵀ‖² with R of the QR of [B_x, −B_y] and of [A_x; A_y]ᵀ, which does not cancel."""
    r_b = np.linalg.qr(np.hstack([x[0], -y[0]])).R
    r_a = np.linalg.qr(np.vstack([x[1], y[1]]).T).R
    return float(np.sum((r_b @ r_a.T) ** 2))
