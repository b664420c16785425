"""A large synthetic collection, drawn fast: groups of adapters that share directions, at the shapes of large models.

    python tests/benchmarks/grouped_collection.py --out DIR [--count 500] [--shape smollm2] [--layers 3] [--alike]

Each module of adapter i is D_i = Σ_k s_ik u_ik v_ikᵀ, k = 1 … r. A left direction mixes latent directions and noise,

    u_ik = (1 − η_k)^½ Σ_t λ_t^½ z_ikt l_t + η_k^½ ε,    η_k = min(η k^½, ½ + η/2),

where the l_t are those of the adapter's own group (40 a module, variances λ_t falling by a power law), with a
smaller share those of one other group, and of a part that all groups have in common (`Likeness`). v_ik is made alike on
the right. Scores z correlate between u and v and between the modules of an adapter. Singular values fall as
s²_k ∝ k^−a; energies of adapters and of modules are log-normal.

What is matched to real adapters (docs/benchmarks.md, "matched_collection.py"): shares of the leading singular values,
spread of energies over adapters and over modules, and that a basis of R = 16 for a group of forty loses about as much
as one for 32 real adapters does (0.41 to 0.44). What is not: how much *unrelated* tasks share, the few near-twins,
layers that differ from each other, factors A that stay near one common initialisation. For these there is
matched_collection.py, which is slow.

Adapter i depends on the seed, the modules, the rank and the number of groups, not on how many adapters are made. A GPU
draws other numbers than a CPU does, so the files differ between the two (`--device` says which is used).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from collection_model import seed_of
from safetensors.torch import save_file
from torch import Tensor

from lorazip_core.adapter.formats.peft import factor_keys
from lorazip_core.adapter.module import Module

FALL = 1.65  # λ_t ∝ (t + 2)^−FALL, t = 0, 1, …
PAIRING, BETWEEN_MODULES = 0.85, 0.95  # correlations of scores: left with right, and of the modules of an adapter
DECAY = 2.0, 3.4  # a: uniform
ADAPTER_SPREAD, MODULE_SPREAD = 0.5, 0.9  # standard deviations of ln ‖D_i‖² and of ln ‖D_im‖² within an adapter
NORM_A = 0.6  # of the rows of A, about that of a fresh PEFT initialisation
THREADS = 16  # at most
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Likeness(NamedTuple):
    """How much the adapters of a group have in common; by default as much as real ones do, for forty of them."""

    latent: int = 40  # directions of a group in a module
    common_share: float = 0.15  # of what is not noise
    other_share: float = 0.5  # at most, of what is not common; uniform
    noise: float = 0.08  # η of the first component


LIKE_REAL = Likeness()
ALIKE = Likeness(latent=16, common_share=0.0, other_share=0.0, noise=0.02)
"""A basis of R = 16 for a group holds nearly all of it, as if its adapters were versions of one."""


class Shape(NamedTuple):
    """The projections of one base model: [d_out, d_in] = [d_model · share, d_model]."""

    d_model: int
    layers: int
    rank: int
    shares: dict[str, float]


SHAPES = {
    "mistral-7b": Shape(4096, 32, 16, {"q": 1, "k": 1 / 4, "v": 1 / 4, "o": 1}),
    "cpu": Shape(2048, 32, 16, {"q": 1, "k": 1, "v": 1, "o": 1}),
    "smollm2": Shape(576, 30, 16, {"q": 1, "k": 1 / 3, "v": 1 / 3, "o": 1}),
    "tiny": Shape(64, 1, 4, {"q": 1, "k": 1, "v": 1, "o": 1}),
}


@dataclass(frozen=True)
class Recipe:
    """What the adapters of a collection have in common."""

    modules: tuple[Module, ...]
    rank: int
    groups: int = 25
    seed: int = 0
    base: str = "made-up/base"
    likeness: Likeness = LIKE_REAL

    @property
    def bytes_per_adapter(self) -> int:
        """Bytes of the factors of one adapter in bf16."""
        return 2 * self.rank * sum(module.d_out + module.d_in for module in self.modules)


def recipe(
    shape: str,
    *,
    rank: int | None = None,
    letters: Sequence[str] = ("q", "k", "v"),
    layers: int | None = None,
    d_model: int | None = None,
    groups: int = 25,
    seed: int = 0,
    likeness: Likeness = LIKE_REAL,
) -> Recipe:
    """The recipe of a named shape; SystemExit for a projection that it does not have."""
    known = SHAPES[shape]
    if unknown := set(letters) - known.shares.keys():
        raise SystemExit(f"no projection {sorted(unknown)[0]!r} in {shape}: {', '.join(known.shares)}")
    width = d_model or known.d_model
    modules = tuple(
        Module(f"model.layers.{layer}.self_attn.{letter}_proj", "linear", round(width * known.shares[letter]), width)
        for layer in range(layers or known.layers)
        for letter in letters
    )
    return Recipe(modules, rank or known.rank, groups, seed, f"made-up/{shape}", likeness)


class _Side(NamedTuple):
    """Latent directions of the modules of one shape: own of every group [T, M, w, d], and common ones [M, w, d]."""

    groups: Tensor
    common: Tensor


class Source:
    """Draws adapters on one device."""

    def __init__(self, of: Recipe, device: torch.device) -> None:
        self.of, self.device = of, device
        self._weights = (torch.arange(of.likeness.latent, device=device) + 2.0) ** -FALL
        self._weights /= self._weights.sum()
        shapes = sorted({(module.d_out, module.d_in) for module in of.modules})
        self._batches = [[m for m in of.modules if (m.d_out, m.d_in) == shape] for shape in shapes]
        self._latents = [
            tuple(self._latent(len(batch), d, side) for side, d in (("left", d_out), ("right", d_in)))
            for batch, (d_out, d_in) in zip(self._batches, shapes, strict=True)
        ]

    def draw(self, number: int) -> dict[str, Tensor]:
        """The tensors of adapter ``number`` as PEFT names them, bf16, on the CPU."""
        plain = random.Random(seed_of(self.of.seed, "adapter", number))
        latent, common_share, other_share, least_noise = self.of.likeness
        own = number % self.of.groups
        other = (own + plain.randrange(1, max(self.of.groups, 2))) % self.of.groups
        borrowed = plain.uniform(0, other_share)
        decay, energy = plain.uniform(*DECAY), math.exp(plain.gauss(0, ADAPTER_SPREAD))
        mixed = (1 - common_share) * (1 - borrowed), (1 - common_share) * borrowed, common_share
        generator = self._generator("adapter", number)
        rank = self.of.rank
        k = torch.arange(1, rank + 1, device=self.device, dtype=torch.float32)
        noise = (least_noise * k.sqrt()).clamp_max(0.5 + least_noise / 2)[:, None]
        s = (k**-decay / (k**-decay).sum()).sqrt()
        everywhere = (2 * torch.rand(rank, 3 * latent, generator=generator, device=self.device) - 1) * math.sqrt(3)
        scale = torch.cat([(self._weights * share).sqrt() for share in mixed])
        tensors: dict[str, Tensor] = {}
        for batch, sides in zip(self._batches, self._latents, strict=True):
            count = len(batch)
            module_energy = (MODULE_SPREAD * self._normal(generator, count)).exp() * energy
            paired = _blend(everywhere, self._normal(generator, count, rank, 3 * latent), BETWEEN_MODULES)
            vectors = []
            for side in sides:
                scores = _blend(paired, self._normal(generator, count, rank, 3 * latent), math.sqrt(PAIRING)) * scale
                of_own, of_other, of_all = scores.split(latent, dim=-1)
                x = torch.bmm(of_own, side.groups[own])
                x = x.baddbmm_(of_other, side.groups[other]).baddbmm_(of_all, side.common)
                d = x.shape[-1]
                x = x * (1 - noise).sqrt() + self._normal(generator, count, rank, d) * (noise / d).sqrt()
                vectors.append(x)
            u, v = vectors
            # ΔW = (alpha / r) B A with alpha = 2 r: the scale is 2.
            b = u * (module_energy.sqrt()[:, None] * s / (2 * NORM_A))[..., None]
            stored_b, stored_a = b.mT.to(torch.bfloat16).contiguous().cpu(), (NORM_A * v).to(torch.bfloat16).cpu()
            for module, one_b, one_a in zip(batch, stored_b, stored_a, strict=True):
                key_b, key_a = factor_keys(module)
                tensors[key_b], tensors[key_a] = one_b, one_a
        return tensors

    def _latent(self, count: int, d: int, side: str) -> _Side:
        latent = self.of.likeness.latent
        groups = torch.empty(self.of.groups, count, latent, d, device=self.device)
        for number, group in enumerate(groups):
            group.normal_(0, d**-0.5, generator=self._generator(side, d, number))
        return _Side(groups, self._normal(self._generator(side, d, "common"), count, latent, d) * d**-0.5)

    def _normal(self, generator: torch.Generator, *size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=self.device)

    def _generator(self, *words: object) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed_of(self.of.seed, *words))


def _blend(x: Tensor, y: Tensor, correlation: float) -> Tensor:
    return correlation * x + math.sqrt(1 - correlation**2) * y


def name_of(number: int) -> str:
    """The folder of an adapter; the order of names is that of numbers."""
    return f"a{number:05}"


def write(root: Path, of: Recipe, count: int, device: torch.device, *, first: int = 0) -> Iterator[int]:
    """Write adapters ``first`` … ``first + count − 1`` below ``root``, several at once; yields bytes of each."""
    source = Source(of, device)
    config = json.dumps(_config(of), indent=2).encode() + b"\n"

    def make(number: int) -> int:
        folder = root / name_of(number)
        folder.mkdir(parents=True)
        (folder / CONFIG).write_bytes(config)
        save_file(source.draw(number), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)
        return (folder / WEIGHTS).stat().st_size + len(config)

    threads = min(THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(make, range(first, first + count))


def _config(of: Recipe) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": of.base,
        "r": of.rank,
        "lora_alpha": 2 * of.rank,
        "target_modules": sorted({module.name.rpartition(".")[2] for module in of.modules}),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write the collection; must not exist")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--groups", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alike", action="store_true", help="adapters of a group have nearly all in common")
    options = parser.parse_args(argv)
    if options.out.exists():
        parser.error(f"{options.out} exists")
    likeness = ALIKE if options.alike else LIKE_REAL
    of = recipe(options.shape, layers=options.layers, groups=options.groups, seed=options.seed, likeness=likeness)
    sizes = list(write(options.out, of, options.count, torch.device("cpu")))
    print(f"{len(sizes)} adapters, {sum(sizes) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
