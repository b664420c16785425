"""Write a synthetic collection of any size whose adapters are as alike as real ones; or show how alike (--show).

    python tests/benchmarks/matched_collection.py --out DIR [--count 300] [--seed 0] [--modules REGEX]
    python tests/benchmarks/matched_collection.py --show

Modules, shapes, rank, alpha and everything else that it needs is computed from the real adapters (--data, by default
../shared/data/smollm2-r16) each time. Singular vectors come from `collection_model`. Singular values and energies:
with x_i all logarithms of one real adapter (the energy of each module and its ratios of singular values) and x̄ their
mean, a synthetic one has x̄ + cos φ (x_a − x̄) + sin φ (x_b − x̄) for two real adapters a, b and an angle φ in
[0, π/2], at random: the same means and covariances, without copies. Adapter i is the same whatever --count and
--modules are.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from collection_model import ModuleModel, draw, draw_scores, fit, rotation, seed_of
from real_adapters import DEFAULT, Svds, open_real, require, svds
from torch import Tensor

from lorazip_core.adapter.collection import Collection
from lorazip_core.adapter.formats.writer import write_adapter
from lorazip_core.adapter.module import Module
from lorazip_core.base.threads import in_order

BATCH = 32  # adapters drawn at a time; each batch has random numbers of its own
CPU = torch.device("cpu")
_PROBES = 12  # modules on which τ is set
_TAUS = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)
_NORM_A = 0.6  # singular values of A: near those of a fresh PEFT initialisation, which training hardly changes
_README = "Random, with the statistics of real adapters: see docs/benchmarks.md of lorazip.\n"


@dataclass(frozen=True)
class CollectionModel:
    """Everything that a synthetic adapter is drawn from."""

    modules: tuple[Module, ...]
    config: dict[str, object]
    scale: float
    models: tuple[ModuleModel, ...]
    tau: float
    log_energy: Tensor  # [n, M]: ln ‖D_im‖²
    log_ratios: Tensor  # [n, M, r]: ln s²_k / s²_1


def learn(collection: Collection, pattern: str, seed: int) -> CollectionModel:
    """Fit the model to the modules of ``collection`` whose name has a match of the regular expression ``pattern``."""
    modules = tuple(module for module in collection.modules if re.search(pattern, module.name))
    if not modules:
        raise SystemExit(f"no module matches {pattern!r}")

    def learned(module: Module) -> tuple[ModuleModel, Tensor, Tensor]:
        real = svds(collection, module.name)
        return fit(real, seed_of(seed, "fit", module.name)), real.s, cosines(real)

    models, values, cosine = zip(*in_order(learned, modules, CPU), strict=True)
    squares = torch.stack(values, dim=1).double().square().clamp_min(1e-30)
    reference = collection.adapters[0]
    return CollectionModel(
        modules,
        json.loads(reference.config_text),
        reference.parts[modules[0].name].scale,
        models,
        _fit_tau(models, cosine, seed),
        squares.sum(2).log(),
        (squares / squares[:, :, :1]).log(),
    )


def cosines(of: Svds) -> Tensor:
    """⟨D_i, D_j⟩ / (‖D_i‖ ‖D_j‖) of all pairs i < j."""
    b, a = (torch.stack(side) for side in zip(*of.unit(), strict=True))
    n = len(b)
    left = b.mT.flatten(0, 1) @ b.mT.flatten(0, 1).mT
    right = a.flatten(0, 1) @ a.flatten(0, 1).mT
    inner = (left * right).reshape(n, b.shape[2], n, b.shape[2]).sum((1, 3))
    return inner[torch.triu(torch.ones(n, n, dtype=torch.bool), 1)]


def between_modules(cosine: tuple[Tensor, ...]) -> float:
    """Mean correlation over pairs of modules of the cosines of all pairs of adapters: are the same ones alike?"""
    if len(cosine) < 2:
        return 0.0
    correlations = torch.corrcoef(torch.stack(cosine))
    return float(correlations[torch.triu(torch.ones_like(correlations, dtype=torch.bool), 1)].nanmean())


def _fit_tau(models: tuple[ModuleModel, ...], real: tuple[Tensor, ...], seed: int) -> float:
    """τ at which `between_modules` of draws is that of the real ones, on a few modules."""
    step = max(1, len(models) // _PROBES)
    picked = range(0, len(models), step)
    wanted = between_modules(tuple(real[i] for i in picked))
    reached = []
    for tau in _TAUS:
        runs = []
        for run in range(3):
            generator = torch.Generator().manual_seed(seed_of(seed, "tau", run))
            scores = _scores(models, generator)
            drawn = (draw(models[i], scores, tau, generator, rotate=False) for i in picked)
            # The leading components are nearly all of an update.
            runs.append(
                between_modules(tuple(cosines(Svds(u[:, :, :1], torch.ones(len(u), 1), v[:, :, :1])) for u, v in drawn))
            )
        reached.append(sum(runs) / len(runs))
    for i in range(1, len(_TAUS)):
        if reached[i] >= wanted:
            share = (wanted - reached[i - 1]) / max(reached[i] - reached[i - 1], 1e-9)
            return _TAUS[i - 1] + min(max(share, 0.0), 1.0) * (_TAUS[i] - _TAUS[i - 1])
    return _TAUS[-1]


def _scores(models: tuple[ModuleModel, ...], generator: torch.Generator) -> Tensor:
    """F [BATCH, r, d] of a batch of adapters, for the largest module."""
    size = max(max(model.left.shape[1], model.right.shape[1]) for model in models)
    return draw_scores(BATCH, models[0].left.shape[0], size, generator)


def draw_batch(model: CollectionModel, number: int, seed: int) -> Iterator[Svds]:
    """Adapters ``number`` · BATCH … of the collection, module by module, in the order of ``model.modules``."""
    generator = torch.Generator().manual_seed(seed_of(seed, "adapters", number))
    scores = _scores(model.models, generator)
    n = len(model.log_energy)
    first, second = (torch.randint(n, (BATCH,), generator=generator) for _ in range(2))
    angle = torch.rand(BATCH, generator=generator, dtype=torch.float64) * math.pi / 2

    def mixed(x: Tensor) -> Tensor:
        mean = x.mean(0)
        cos, sin = (f(angle).reshape(-1, *(1 for _ in mean.shape)) for f in (torch.cos, torch.sin))
        return mean + cos * (x[first] - mean) + sin * (x[second] - mean)

    energy = mixed(model.log_energy).exp()
    ratios = mixed(model.log_ratios).exp().sort(dim=-1, descending=True).values
    s = (ratios * (energy / ratios.sum(-1))[..., None]).sqrt().float()

    def drawn(index: int) -> Svds:
        module = model.modules[index]
        own = torch.Generator().manual_seed(seed_of(seed, "adapters", number, module.name))
        u, v = draw(model.models[index], scores, model.tau, own)
        sides = ("left", module.d_out), ("right", module.d_in)
        q, p = (rotation(size, seed_of(seed, side, module.name)) for side, size in sides)
        return Svds(q @ u, s[:, index], p @ v)

    yield from in_order(drawn, range(len(model.modules)), CPU)


def factors(of: Svds, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """B [n, d_out, r] and A [n, r, d_in] in bf16 with scale · B A = U diag(s) Vᵀ; A = a R Vᵀ, R a random rotation."""
    n, rank = of.s.shape
    turn = torch.linalg.qr(torch.randn(n, rank, rank, generator=torch.Generator().manual_seed(seed))).Q
    a = _NORM_A * turn @ of.v.mT
    b = of.u * (of.s / (_NORM_A * scale))[:, None, :] @ turn.mT
    return b.to(torch.bfloat16), a.to(torch.bfloat16)


def write(model: CollectionModel, out: Path, count: int, seed: int) -> None:
    """Write ``count`` adapters to ``out``/s00000, …, a batch at a time."""
    for number in range(-(-count // BATCH)):
        made = [
            factors(of, model.scale, seed_of(seed, "turn", number, module.name))
            for module, of in zip(model.modules, draw_batch(model, number, seed), strict=True)
        ]
        for i in range(min(BATCH, count - number * BATCH)):
            own = {module: (b[i], a[i]) for module, (b, a) in zip(model.modules, made, strict=True)}
            write_adapter(out / f"s{number * BATCH + i:05}", model.config, own, {}, _README)
        print(f"{min(count, (number + 1) * BATCH)} of {count} adapters", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT, help="the real adapters")
    parser.add_argument("--out", type=Path, help="where to write the collection; must not exist")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", default="", metavar="REGEX", help="only modules whose name matches")
    parser.add_argument("--show", action="store_true", help="compare with the real ones instead")
    parser.add_argument("--batches", type=int, default=3, help="with --show: synthetic collections to average over")
    options = parser.parse_args(argv)
    if options.show == (options.out is not None):
        parser.error("either --out or --show")
    if options.out is not None and options.out.exists():
        parser.error(f"{options.out} exists")
    torch.set_num_threads(1)
    collection = open_real(require(options.data))
    if options.show:
        from matched_statistics import show

        model = learn(collection, options.modules, options.seed)
        show(collection, model, options.seed, options.batches)
    else:
        write(learn(collection, options.modules, options.seed), options.out, options.count, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
