"""Real adapters beside synthetic ones: spectra, energies, overlaps, HOSVD, errors of shared bases, held-out errors.

Synthetic figures are means over several collections of 32, each compared with itself alone, as the real one is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from collection_model import moments
from matched_collection import BATCH, CPU, CollectionModel, between_modules, cosines, draw_batch
from real_adapters import Svds, svds
from torch import Tensor

from lorazip_core.adapter.collection import Collection
from lorazip_core.base.threads import in_order
from lorazip_core.clustering.alternation import Probes, alternate
from lorazip_core.maths.cp import solve_diag
from lorazip_core.maths.cp_search import fit_diag
from lorazip_core.maths.stack import ScaledStack, Stack
from lorazip_core.maths.tucker import Basis, fit_joint
from lorazip_core.reading.updates import Updates

HANDFUL = 6
_RANKS = (8, 16, 32, 64)
_QUANTILES = (0.1, 0.5, 0.9)

Figures = dict[str, list[float]]
OfModules = Sequence[Svds]
"""One for each module, of the same adapters."""


def show(collection: Collection, model: CollectionModel, seed: int, batches: int) -> None:
    """Print every figure of the real collection and of the synthetic ones."""
    count = len(collection.adapters)
    real = [svds(collection, module.name) for module in model.modules]
    members = slice(0, min(count, BATCH))
    synthetic = [[of.subset(members) for of in draw_batch(model, number, seed)] for number in range(batches)]
    # Spread over layers, and over q, k, v, which follow each other in every layer.
    picked = sorted({min(len(real) * i // HANDFUL // 3 * 3 + i % 3, len(real) - 1) for i in range(HANDFUL)})
    print(f"{count} real adapters; synthetic: mean of {batches} collections of {members.stop}; τ = {model.tau:.2f}")
    print("overlaps and cosines of all modules; HOSVD and errors of the modules", end=" ")
    print(", ".join(model.modules[i].name for i in picked))
    print(f"\n{'':46} {'real':>31}   {'synthetic':>31}")
    for describe, modules in ((_energies, range(len(real))), (_shared, range(len(real))), (_bases, picked)):
        of_real = describe([real[i] for i in modules])
        drawn = [describe([updates[i] for i in modules]) for updates in synthetic]
        for name, values in of_real.items():
            means = torch.tensor([figures[name] for figures in drawn]).mean(0).tolist()
            print(f"{name:46} {_row(values):>31}   {_row(means):>31}", flush=True)


def _row(values: Sequence[float]) -> str:
    return " ".join(f"{value:7.4f}" for value in values)


def _quantiles(values: Tensor) -> list[float]:
    return torch.quantile(values.double().flatten(), torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()


def _energies(updates: OfModules) -> Figures:
    """Quantiles over adapters and modules of s²_k/Σs², of a module's share and of an adapter's energy."""
    squares = torch.stack([of.s for of in updates], dim=1).double().square()
    energy = squares.sum(2)
    shares = squares / energy[..., None]
    total = energy.sum(1)
    found = {
        f"s²_{k}/Σs², q10 q50 q90": _quantiles(shares[..., k - 1]) for k in (1, 2, 4, 8, 16) if k <= shares.shape[-1]
    }
    found["adapter's energy / mean, q10 q50 q90"] = _quantiles(total / total.mean())
    found["module's share · M, q10 q50 q90"] = _quantiles(energy / total[:, None] * energy.shape[1])
    return found


def _shared(updates: OfModules) -> Figures:
    """What pairs of adapters share: in the leading subspaces of each other, and in the directions of their updates."""
    overlaps: dict[int, list[Tensor]] = {1: [], 4: [], 16: []}
    for of in updates:
        for k, found in overlaps.items():
            found.append(_overlaps(of, k))
    pairs = [cosines(of) for of in updates]
    first = [moments(of.u[:, :, :1], of.v[:, :, :1]) for of in updates]
    figures: Figures = {}
    for k, found in overlaps.items():
        together = torch.cat(found)
        figures[f"‖U_jᵀD_iV_j‖²/‖D_i‖², k={k}, mean"] = [float(together.mean())]
        figures[f"  q10 q50 q90, k={k}"] = _quantiles(together)
        figures[f"  q99 max, k={k}"] = [float(together.quantile(0.99)), float(together.max())]
    figures["cosine ⟨D_i,D_j⟩, mean, std"] = [float(torch.cat(pairs).mean()), float(torch.cat(pairs).std())]
    figures["  q10 q50 q90"] = _quantiles(torch.cat(pairs))
    figures["  q99 max"] = [float(torch.cat(pairs).quantile(0.99)), float(torch.cat(pairs).max())]
    figures["  correlation between modules"] = [between_modules(tuple(pairs))]
    mean = torch.stack(pairs).mean(0)
    n = len(updates[0].s)
    square = torch.zeros(n, n)
    square[torch.triu(torch.ones(n, n, dtype=torch.bool), 1)] = mean
    figures["  mean over modules, of an adapter, q10 q50 q90"] = _quantiles((square + square.mT).sum(1) / (n - 1))
    figures["(u_i1·u_j1)², (v_i1·v_j1)², their signed root"] = [
        float(torch.stack([each.left[0, 0] for each in first]).mean()),
        float(torch.stack([each.right[0, 0] for each in first]).mean()),
        float(torch.stack([each.paired[0] for each in first]).mean()),
    ]
    return figures


def _overlaps(of: Svds, k: int) -> Tensor:
    """‖U_jᵀ D_i V_j‖² / ‖D_i‖² of all ordered pairs, U_j and V_j the k leading singular vectors of D_j."""
    n, _, rank = of.u.shape
    rows, width = of.u * (of.s / of.s.norm(dim=1, keepdim=True))[:, None, :], min(k, rank)
    left = (of.u[:, :, :width].mT.flatten(0, 1) @ rows.transpose(0, 1).flatten(1)).reshape(n, width, n, rank)
    right = (of.v[:, :, :width].mT.flatten(0, 1) @ of.v.transpose(0, 1).flatten(1)).reshape(n, width, n, rank)
    captured = torch.einsum("jair,jbir->jiab", left, right).square().sum((2, 3))
    return captured[~torch.eye(n, dtype=torch.bool)]


def _bases(updates: OfModules) -> Figures:
    """HOSVD, errors of shared bases with one and more clusters, and errors of adapters that a basis has not seen."""
    stacks = [Stack.of(of.unit(), range(len(of.s))) for of in updates]
    weights = torch.stack([of.s.square().sum(1) for of in updates], dim=1)  # energy of each module, [n, M]
    weights = weights / weights.sum(1, keepdim=True)
    figures: Figures = {}
    for side in ("left", "right"):
        spectra = [_cumulative(of.u if side == "left" else of.v, of.s) for of in updates]
        shortest = min(map(len, spectra))
        energy = torch.stack([spectrum[:shortest] for spectrum in spectra]).mean(0)
        for sizes in ((1, 2, 4, 8), (16, 32, 64, 128)):
            few = [k for k in sizes if k <= shortest]
            figures[f"HOSVD {side}, leading {' '.join(map(str, few))}"] = [float(energy[k - 1]) for k in few]
    everyone = list(range(len(updates[0].s)))
    halves = everyone[::2], everyone[1::2]

    def over_modules(kept: Callable[[Stack], Tensor]) -> Tensor:
        """Squared error of each adapter over the modules, [n], from the share ``kept`` of each module's stack."""
        return 1 - (torch.stack(list(in_order(kept, stacks, CPU)), dim=1) * weights).sum(1)

    for rank in _RANKS:
        errors = over_modules(lambda stack, rank=rank: _kept(stack, fit_joint(stack, rank)))  # type: ignore[misc]
        figures[f"joint, R={rank}, squared error mean, worst"] = [float(errors.mean()), float(errors.max())]
    for rank in _RANKS[:3]:
        errors = over_modules(lambda stack, rank=rank: _diag_kept(stack, rank))  # type: ignore[misc]
        figures[f"diag, R={rank}, mean, worst"] = [float(errors.mean()), float(errors.max())]
    for clusters in (2, 4):
        errors = _clustered(stacks, weights, clusters)
        figures[f"joint, R=16, {clusters} clusters, mean, worst"] = [float(errors.mean()), float(errors.max())]
    for rank in _RANKS[1:]:
        errors = over_modules(lambda stack, rank=rank: _held_out(stack, rank, halves))  # type: ignore[misc]
        figures[f"held out, joint, R={rank}, mean, worst"] = [float(errors.mean()), float(errors.max())]
    return figures


def _cumulative(vectors: Tensor, s: Tensor) -> Tensor:
    """Share of Σ_i D_i D_iᵀ / ‖D_i‖² in its k leading eigenvectors, for every k."""
    rows = (vectors * (s / s.norm(dim=1, keepdim=True))[:, None, :]).transpose(0, 1).flatten(1)
    return torch.linalg.svdvals(rows).square().cumsum(0) / len(s)


def _kept(stack: Stack, basis: Basis) -> Tensor:
    return stack.cores(*basis).square().sum((1, 2))


def _diag_kept(stack: Stack, rank: int) -> Tensor:
    u, v = fit_diag(stack, rank)
    projections = stack.sums((stack.bt @ u) * (stack.a @ v))
    return (projections * solve_diag(projections, u, v)).sum(1)


def _held_out(stack: Stack, rank: int, halves: tuple[list[int], list[int]]) -> Tensor:
    """What a basis fitted to the other half keeps of each adapter."""
    kept = torch.zeros(len(stack.adapters))
    for seen, unseen in (halves, halves[::-1]):
        kept[unseen] = _kept(stack.select(set(unseen)), fit_joint(stack.select(set(seen)), rank))
    return kept


def _clustered(stacks: Sequence[Stack], weights: Tensor, clusters: int) -> Tensor:
    """Squared error of each adapter over the modules with one basis for each cluster, [n]."""
    updates = Updates(
        lambda module, members=None: ScaledStack.of(stacks[module].scaled(weights[:, module].sqrt())),
        [(stack.bt.shape[1], stack.a.shape[1]) for stack in stacks],
        torch.tensor([stack.ranks for stack in stacks]).T,
        weights.double(),
        torch.ones_like(weights, dtype=torch.float64),
        CPU,
    )
    tried = Probes(updates, 16).cluster(clusters, seed=0)
    labels = alternate(updates, tried.labels, 16, seed=0).labels

    def kept(stack: Stack) -> Tensor:
        shares = torch.zeros(len(labels))
        for cluster in range(clusters):
            members = [i for i, label in enumerate(labels) if label == cluster]
            own = stack.select(set(members))
            shares[members] = _kept(own, fit_joint(own, 16))
        return shares

    return 1 - (torch.stack(list(in_order(kept, stacks, CPU)), dim=1) * weights).sum(1)
