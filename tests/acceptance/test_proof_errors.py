"""Proof 1: the errors that a bundle claims are the true ones, and joint finds no worse a basis than plain HOOI does."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from acceptance.caching_reader import CachingReader
from acceptance.real_data import Compressed, Say
from testing.reference_reader import ReferenceReader
from torch import Tensor

from lorazip_core.adapter.collection import Collection
from lorazip_core.maths.stack import Stack
from lorazip_core.maths.tucker import fit_joint
from lorazip_core.planning.options import CompressOptions

pytestmark = pytest.mark.acceptance

RUNS = {
    "joint, rank 16": CompressOptions(method="joint", rank=16),
    "joint, rank 64": CompressOptions(method="joint", rank=64),
    "diag, rank 16": CompressOptions(method="diag", rank=16),
    "svd, rank 4": CompressOptions(method="svd", rank=4),
    "joint, rank 16, 4 clusters": CompressOptions(method="joint", rank=16, clusters=4),
}
HOOI_STARTS, HOOI_ROUNDS, HOOI_TOLERANCE = 10, 200, 1e-9
HOOI_RANK = 16


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """The BF16 tensors of a safetensors file in float64."""
    found = {}
    for name, info in safetensors.deserialize(path.read_bytes()):
        assert info["dtype"] == "BF16"
        wide = (np.frombuffer(info["data"], "<u2").astype("<u4") << 16).view("<f4")
        found[name] = wide.astype(np.float64).reshape(info["shape"])
    return found


def squared_error(reader: ReferenceReader, adapter: str, folder: Path) -> float:
    """Σ‖ΔW−ΔŴ‖² / Σ‖ΔW‖² over modules, from dense matrices in float64."""
    config = json.loads((folder / "adapter_config.json").read_bytes())
    original = tensors_of(folder / "adapter_model.safetensors")
    assert len(original) == 2 * len(reader.modules(adapter))
    lost = total = 0.0
    for module in reader.modules(adapter):
        b, a = (original[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
        update = config["lora_alpha"] / config["r"] * (b @ a)
        lost += ((update - reader.update(adapter, module)) ** 2).sum()
        total += (update**2).sum()
    return lost / total


@pytest.mark.parametrize("run", RUNS)
def test_claimed_errors_are_those_of_a_dozen_lines_of_numpy(
    run: str, data: Path, compressed: Compressed, say: Say
) -> None:
    root = data / "smollm2-r16"
    bundle, report = compressed(RUNS[run])
    reader = CachingReader(bundle)
    claims = {name: entry["squared_error"] for name, entry in reader.adapters.items()}
    assert claims.keys() == {folder.name for folder in root.iterdir() if folder.is_dir()}
    true = {name: squared_error(reader, name, root / name) for name in claims}
    deviation = max(abs(claims[name] - true[name]) / true[name] for name in claims)
    say(
        f"{run:27} squared error: mean {np.mean(list(true.values())):.5f}, worst {max(true.values()):.5f}"
        f" ({max(true, key=lambda name: true[name])}); {report.summary.bytes_bundle:9,} bytes;"
        f" claims deviate by {deviation:.1e} at most; {report.seconds:.0f} s"
        + (f"; adapters per cluster {report.clusters}" if len(report.clusters) > 1 else "")
    )
    assert deviation <= 1e-4


def modules_tried() -> list[str]:
    """Spread over layers and q/k/v; LORAZIP_HOOI_MODULES is how many, or ``all``."""
    names = [f"model.layers.{layer}.self_attn.{side}_proj" for layer in range(30) for side in "qkv"]
    wanted = os.environ.get("LORAZIP_HOOI_MODULES", "6")
    count = len(names) if wanted == "all" else int(wanted)
    picked = [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]
    if count < len(names):  # a regular stride would hit the same projection every time
        picked = [f"{name.rpartition('.')[0]}.{'qkv'[i % 3]}_proj" for i, name in enumerate(picked)]
    return picked


@pytest.mark.parametrize("module", modules_tried())
def test_joint_is_no_worse_than_plain_hooi(module: str, collection: Collection, weights: Tensor, say: Say) -> None:
    factors = [adapter.factors(module) for adapter in collection.adapters]
    root = weights.sqrt()
    started = time.monotonic()
    stack = Stack.of(factors, range(len(factors))).scaled(root)
    found = fit_joint(stack, HOOI_RANK)
    seconds = time.monotonic() - started
    b = torch.stack([b for b, _ in factors]).double() * root[:, None, None]
    a = torch.stack([a for _, a in factors]).double()
    u, v = (torch.linalg.qr(side.double()).Q for side in found)
    ours = float((u.T @ b @ (a @ v)).square().sum())
    started = time.monotonic()
    reached = sorted(plain_hooi(b, a, HOOI_RANK, seed) for seed in range(HOOI_STARTS))
    share = float((b.mT @ b * (a @ a.mT)).sum())
    say(
        f"{module:33} kept {ours / share:.6f} of the energy; against the best of {HOOI_STARTS} HOOI runs"
        f" {(ours - reached[-1]) / reached[-1]:+.1e}, their median {(ours - reached[5]) / reached[5]:+.1e};"
        f" {seconds:.1f} s against {time.monotonic() - started:.0f} s"
    )
    assert ours >= reached[-1] * (1 - 2e-6)


def plain_hooi(b: Tensor, a: Tensor, rank: int, seed: int) -> float:
    """max Σ‖Uᵀ B_i A_i V‖² by alternating eigendecompositions, in float64, from a random V; what it reaches."""
    random = torch.randn(a.shape[2], rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v = torch.linalg.qr(random).Q
    reached = 0.0
    for _ in range(HOOI_ROUNDS):
        before = reached
        half = (b @ (a @ v)).permute(1, 0, 2).flatten(1)  # D_i V side by side
        u = torch.linalg.eigh(half @ half.T).eigenvectors[:, -rank:]
        half = (a.mT @ (b.mT @ u)).permute(1, 0, 2).flatten(1)
        values, vectors = torch.linalg.eigh(half @ half.T)
        v, reached = vectors[:, -rank:], float(values[-rank:].sum())
        if reached - before <= HOOI_TOLERANCE * reached:
            break
    return reached
