"""How fast, and how good, is `joint` beside the fast iteration of the paper, run as its authors run it?

    python tests/benchmarks/eigen_iteration.py DIR --bundle BUNDLE [--modules 3] [--device cuda] [--json FILE]

DIR is a collection, BUNDLE what `lorazip compress DIR --clusters K --rank R` made of it. Clusters, R and the weights of
adapters are taken from its manifest; the modules are the first ones, the middle one and so on, spread over all. The
iteration of "Compress then Serve" (arXiv 2407.00066), per module and cluster, from random orthonormal U and V:

    X_j = A_j V,   Y_j = B_jᵀ U,   P_j = X_jᵀ Y_j,
    U ← qr(Σ_j B_j X_j P_j),   V ← qr(Σ_j A_jᵀ Y_j P_jᵀ),

until max(‖U − U_old U_oldᵀ U‖ / ‖U‖, the same for V) < 1e-3, with a Python loop over the adapters in every round. It
is theirs but for two things, which make it comparable: the scale and the weight of an adapter are folded into B_j, and
--rounds ends it when it has not converged by then (the table says how often). Before anything is timed, factors are on
the device in float32, and both solvers have run once. Squared errors are of unrounded bases: orthonormalised in
float64, with least-squares cores, Σ_i w_i ‖D_i − U Σ_i Vᵀ‖² / Σ_i w_i ‖D_i‖² over the adapters of all clusters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from compressing import head, row
from torch import Tensor

from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.reader import Adapter
from lorazip_core.bundle.reader import Bundle
from lorazip_core.maths.batch import Batch
from lorazip_core.maths.stack import ScaledStack, Stack
from lorazip_core.maths.tucker import fit_joint_batch

CONVERGED = 1e-3  # of the authors
MOST_ROUNDS = 1000

Bases = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """One module: the weighted updates √w_i D_i = B_i A_i of each cluster, in float32 on the device."""

    module: str
    clusters: dict[int, list[Bases]]  # B [d_out, r] and A [r, d_in] of every member

    @property
    def shape(self) -> tuple[int, int]:
        b, a = self.factors()[0]
        return b.shape[0], a.shape[1]

    def factors(self) -> list[Bases]:
        return [pair for members in self.clusters.values() for pair in members]


@dataclass(frozen=True)
class Solved:
    """Bases of every cluster of every module, in the order of the problems, and the seconds that all of it took."""

    bases: list[dict[int, Bases]]
    seconds: float


@dataclass
class Row:
    """Both on one module. ``rounds`` of the iteration are one number a cluster."""

    module: str
    eigen_error: float
    joint_error: float
    eigen_seconds: float
    rounds: list[int]


def solve_joint(problems: Sequence[Problem], rank: int, seed: int) -> list[dict[int, Bases]]:
    """What `lorazip compress` does for these modules: those of one shape are solved together."""
    found: dict[str, dict[int, Bases]] = {problem.module: {} for problem in problems}
    for shape in sorted({problem.shape for problem in problems}):
        stacks, owners, keys = [], [], []
        for problem in (each for each in problems if each.shape == shape):
            numbered = [len(keys) + i for i, members in enumerate(problem.clusters.values()) for _ in members]
            stacks.append(ScaledStack.of(Stack.of(problem.factors(), range(len(numbered)))))
            owners.append(torch.tensor(numbered)[list(stacks[-1].adapters)])
            keys += [(problem.module, cluster) for cluster in problem.clusters]
        u, v = fit_joint_batch(Batch.of(stacks, owners, len(keys)), rank, seed=seed)
        for number, (module, cluster) in enumerate(keys):
            found[module][cluster] = u[number], v[number]
    return [found[problem.module] for problem in problems]


def eigen_iteration(
    members: Sequence[Bases], rank: int, generator: torch.Generator, *, most: int = MOST_ROUNDS
) -> tuple[Bases, int]:
    """U [d_out, R], V [d_in, R] and the number of rounds; ``most`` of them without having converged."""
    b_0, a_0 = members[0]
    u, v = (_random(size, rank, generator, b_0) for size in (b_0.shape[0], a_0.shape[1]))
    done = 0
    while done < most:
        done += 1
        sum_u, sum_v = torch.zeros_like(u), torch.zeros_like(v)
        for b, a in members:
            x, y = a @ v, b.mT @ u
            p = x.mT @ y
            sum_u += b @ (x @ p)
            sum_v += a.mT @ (y @ p.mT)
        new_u, new_v = torch.linalg.qr(sum_u).Q, torch.linalg.qr(sum_v).Q
        moved = torch.stack([_moved(new_u, u), _moved(new_v, v)]).max()
        u, v = new_u, new_v
        if float(moved) < CONVERGED:
            break
    return (u, v), done


def _random(size: int, rank: int, generator: torch.Generator, like: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(size, min(rank, size), generator=generator).to(like)).Q
    return q


def _moved(new: Tensor, old: Tensor) -> Tensor:
    """‖U − U_old U_oldᵀ U‖ / ‖U‖."""
    return (new - old @ (old.mT @ new)).norm() / new.norm()


def lost(members: Sequence[Bases], bases: Bases) -> tuple[float, float]:
    """Σ ‖D_i − U Σ_i Vᵀ‖² with the best Σ_i, and Σ ‖D_i‖², in float64."""
    u, v = (torch.linalg.qr(side.double()).Q for side in bases)
    total = kept = 0.0
    for b, a in members:
        b64, a64 = b.double(), a.double()
        total += float(((b64.mT @ b64) * (a64 @ a64.mT)).sum())
        kept += float(((u.mT @ b64) @ (a64 @ v)).square().sum())
    return total - kept, total


def squared_error(problem: Problem, bases: dict[int, Bases]) -> float:
    """Of all clusters of a module together."""
    pairs = [lost(members, bases[cluster]) for cluster, members in problem.clusters.items()]
    return sum(part for part, _ in pairs) / sum(whole for _, whole in pairs)


def timed(device: torch.device, solve: Callable[[], list[dict[int, Bases]]]) -> Solved:
    """Run ``solve``, waiting for the device before and after."""
    _wait(device)
    started = time.monotonic()
    bases = solve()
    _wait(device)
    return Solved(bases, time.monotonic() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load(directory: Path, bundle: Path, count: int, device: torch.device) -> tuple[list[Problem], int]:
    """Problems of ``count`` modules, and the rank of the bases; SystemExit unless it is a `joint` bundle of DIR."""
    manifest = Bundle(bundle).manifest
    rank = manifest.parameters.rank
    if manifest.parameters.method != "joint" or manifest.parameters.weights != "adapter" or rank is None:
        raise SystemExit(f"{bundle}: only joint bundles with --weights adapter can be compared")
    adapters = {adapter.name: adapter for adapter in open_collection(directory).adapters}
    entries = [entry for entry in manifest.adapters if entry.cluster is not None and entry.squared_norm > 0]
    if missing := [entry.name for entry in entries if entry.name not in adapters]:
        raise SystemExit(f"{directory}: no adapter {missing[0]}, which is in {bundle}")
    names = [module.name for module in manifest.modules]
    picked = [names[i * len(names) // min(count, len(names))] for i in range(min(count, len(names)))]
    problems = []
    for module in picked:
        clusters: dict[int, list[Bases]] = {}
        for entry in entries:
            if module in adapters[entry.name].parts:
                pair = _weighted(adapters[entry.name], module, entry.squared_norm, device)
                clusters.setdefault(int(entry.cluster or 0), []).append(pair)
        problems.append(Problem(module, clusters))
    return problems, rank


def _weighted(adapter: Adapter, module: str, squared_norm: float, device: torch.device) -> Bases:
    """√w_i B_i, scale included, and A_i, with w_i = 1 / Σ_m ‖D_im‖²."""
    b, a = adapter.factors(module)
    return (b / squared_norm**0.5).to(device), a.to(device)


def compare(problems: Sequence[Problem], rank: int, device: torch.device, most: int) -> tuple[list[Row], float]:
    """A row for each module, and the seconds of `joint` on all of them."""
    first = Problem(problems[0].module, dict([next(iter(problems[0].clusters.items()))]))
    solve_joint([first], rank, 0)
    eigen_iteration(next(iter(first.clusters.values())), rank, torch.Generator().manual_seed(0), most=2)
    ours = timed(device, lambda: solve_joint(problems, rank, 0))
    rows = []
    for number, problem in enumerate(problems):
        generator = torch.Generator().manual_seed(number)
        rounds: list[int] = []

        def theirs(
            problem: Problem = problem, generator: torch.Generator = generator, rounds: list[int] = rounds
        ) -> list[dict[int, Bases]]:
            bases = {}
            for cluster, members in problem.clusters.items():
                bases[cluster], done = eigen_iteration(members, rank, generator, most=most)
                rounds.append(done)
            return [bases]

        solved = timed(device, theirs)
        errors = squared_error(problem, solved.bases[0]), squared_error(problem, ours.bases[number])
        rows.append(Row(problem.module, *errors, solved.seconds, rounds))
        print(f"{problem.module}: {solved.seconds:.2f} s", file=sys.stderr, flush=True)
    return rows, ours.seconds


def table(rows: Sequence[Row], joint_seconds: float, most: int) -> str:
    """A line for each module, as Markdown, and what follows from all of them."""
    each = joint_seconds / len(rows)
    lines = head(
        "module", "iteration: squared error", "s", "rounds: mean, most", "not converged", "joint: squared error"
    )
    for one in rows:
        counts = f"{mean(one.rounds):.0f}, {max(one.rounds)}"
        unfinished = f"{sum(done == most for done in one.rounds)} of {len(one.rounds)}"
        figures = f"{one.eigen_error:.6f}", f"{one.eigen_seconds:.2f}", counts, unfinished, f"{one.joint_error:.6f}"
        lines.append(row(one.module, *figures))
    theirs = mean(one.eigen_seconds for one in rows)
    better = max(one.joint_error - one.eigen_error for one in rows)
    lines += [
        "",
        f"seconds a module: iteration {theirs:.3f}, joint {each:.3f} ({len(rows)} modules together):"
        f" joint is {theirs / each:.1f} times as fast",
        f"squared error, mean: iteration {mean(one.eigen_error for one in rows):.6f},"
        f" joint {mean(one.joint_error for one in rows):.6f}; joint − iteration at most {better:+.2e}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--bundle", type=Path, required=True, help="what lorazip compress --method joint made of DIR")
    parser.add_argument("--modules", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=MOST_ROUNDS, help="at most, of the iteration")
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    problems, rank = load(options.directory, options.bundle, options.modules, device)
    rows, seconds = compare(problems, rank, device, options.rounds)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    clusters = len(problems[0].clusters)
    print(f"{where}, {len(problems[0].factors())} adapters in {clusters} clusters, R = {rank}", end="\n\n")
    print(table(rows, seconds, options.rounds))
    if options.json:
        report = {"device": where, "rank": rank, "joint_seconds": seconds, "rows": [asdict(one) for one in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
