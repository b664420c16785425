"""Random PEFT adapters on disk: a collection that shares structure, with everything that real ones differ in.

Every update is a mix of a few directions that its group shares, plus a little of its own, so that shared bases have
something to find. The same arguments give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lorazip_core.adapter.formats.writer import write_adapter
from lorazip_core.adapter.module import Module

BASE = "org/base"
Q = Module("layers.0.q_proj", "linear", 24, 20)
V = Module("layers.0.v_proj", "linear", 10, 20)
DOWN = Module("layers.1.down_proj", "linear", 20, 30)
CONV = Module("stem", "conv", 12, 18, (3, 2))
EMBED = Module("embed_tokens", "embedding", 8, 40)
LINEAR = (Q, V, DOWN)
EVERY_KIND = (*LINEAR, CONV, EMBED)
HEAD = "base_model.model.score.weight"


@dataclass(frozen=True)
class Recipe:
    """An adapter to make; ``group`` says with which others it shares directions, ``energy`` scales all its updates."""

    name: str
    rank: int = 4
    modules: tuple[Module, ...] = LINEAR
    group: int = 0
    scale: float = 2.0
    energy: float = 1.0
    own: float = 0.3
    zero: bool = False
    dtype: torch.dtype = torch.float32
    extras: dict[str, torch.Tensor] = field(default_factory=dict)


MIXED = (
    Recipe("a", 3, EVERY_KIND, extras={HEAD: torch.arange(6.0).reshape(2, 3)}),
    Recipe("b/c", 4, LINEAR, energy=20.0, dtype=torch.bfloat16),
    Recipe("b/d", 2, (Q, CONV), scale=1 / 3),
    Recipe("e", 5, (V, DOWN, EMBED), energy=0.01),
    Recipe("f", 3, EVERY_KIND, zero=True),
    Recipe("g", 6, (Q,), dtype=torch.float16, scale=0.5),
    Recipe("h", 3, LINEAR, own=3.0, extras={HEAD: torch.tensor([[1, 2]])}),
)
"""Mixed ranks, dtypes, energies and kinds of modules, missing modules, extras, a zero B and a loner."""


def plain(count: int, *, groups: int = 1, rank: int = 4, modules: tuple[Module, ...] = LINEAR) -> tuple[Recipe, ...]:
    """``count`` adapters alike, named ``t00``, ``t01``, …; adapter i is of group i mod ``groups``."""
    return tuple(Recipe(f"t{i:02}", rank, modules, group=i % groups) for i in range(count))


def write_collection(root: Path, recipes: tuple[Recipe, ...], *, seed: int = 0) -> Path:
    """Write every adapter to ``root/NAME`` in the order of ``recipes``; returns ``root``."""
    for recipe in recipes:
        factors = {module: _factors(recipe, module, seed) for module in recipe.modules}
        write_factors(root / recipe.name, factors, scale=recipe.scale, extras=recipe.extras)
    return root


def write_factors(
    folder: Path,
    factors: dict[Module, tuple[torch.Tensor, torch.Tensor]],
    *,
    scale: float = 1.0,
    extras: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write one adapter of updates ``scale`` · B A with B [d_out, r] and A [r, d_in]."""
    ranks = {module.name: a.shape[0] for module, (_, a) in factors.items()}
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": BASE,
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {name: scale * other for name, other in ranks.items() if other != rank},
        "target_modules": sorted(ranks),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, config, factors, extras or {}, "random")


def rewrite(source: Path, target: Path, *, seed: int = 0) -> None:
    """Write the adapter at ``source`` as other factors of the same updates: (B R, R⁻¹ A), R well conditioned."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "adapter_model.safetensors")
    for key_a in [key for key in tensors if "lora_A" in key or "lora_embedding_A" in key]:
        key_b = key_a.replace("_A", "_B")
        a, b = tensors[key_a].double(), tensors[key_b].double()
        rank = a.shape[0]
        turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
        turn = turn * torch.linspace(0.5, 2, rank, dtype=torch.float64)
        tensors[key_a] = torch.linalg.solve(turn, a.flatten(1)).reshape(a.shape).float().contiguous()
        tensors[key_b] = (b.flatten(1) @ turn).reshape(b.shape).float().contiguous()
    target.mkdir(parents=True)
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    save_file(tensors, target / "adapter_model.safetensors")


def dense_updates(folder: Path) -> dict[str, np.ndarray]:
    """ΔW [d_out, d_in] of every module of an adapter that this file wrote, in float64, by numpy."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    updates = {}
    for key_a, a in tensors.items():
        if "lora_A" not in key_a and "lora_embedding_A" not in key_a:
            continue
        name = key_a.removeprefix("base_model.model.").split(".lora_")[0]
        b = tensors[key_a.replace("_A", "_B")]
        rank = a.shape[0]
        scale = config["alpha_pattern"].get(name, config["lora_alpha"]) / rank
        updates[name] = scale * b.double().flatten(1).numpy() @ a.double().flatten(1).numpy()
    return updates


def _factors(recipe: Recipe, module: Module, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    mine = _generator(seed, module.name, recipe.name)
    b, a = _normal(mine, module.d_out, recipe.rank), _normal(mine, recipe.rank, module.d_in)
    shared = _generator(seed, module.name, f"group {recipe.group}")
    left, right = _normal(shared, module.d_out, 5), _normal(shared, 5, module.d_in)
    b = left @ _normal(mine, 5, recipe.rank) + recipe.own * b
    a = _normal(mine, recipe.rank, 5) @ right + recipe.own * a
    b = b * (0.0 if recipe.zero else recipe.energy / 100)
    return b.to(recipe.dtype), a.to(recipe.dtype)


def _generator(seed: int, *words: str) -> torch.Generator:
    """Numbers that depend on the seed and on what they are for, not on what else is made."""
    digest = hashlib.sha256("\0".join((str(seed), *words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
