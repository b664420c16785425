"""The files of clusters, streamed from pieces: one of bases for each cluster, and cores in shards."""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.stopping import check_stop
from ..base.threads import in_order
from ..bundle.manifest import ClusterEntry, FileEntry, ShardEntry
from ..bundle.tensor_file import TensorLayout
from ..bundle.writer import BundleWriter
from ..reading.packs import Problem
from ..schemes.scheme import SharedScheme
from .pieces import Pieces
from .shared import Encoded
from .solutions import tensor_name

SHARD_ADAPTERS = 512
_WRITERS = 4  # more are in each other's way: every other step is one of the interpreter

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ClusterFiles:
    """Writes the files of the clusters of ``encoded``; ``modules`` has the names, ``has`` [n, M] who has which."""

    writer: BundleWriter
    encoded: Encoded
    pieces: Pieces
    modules: list[str]
    has: Tensor
    scheme: SharedScheme

    def write(self) -> list[ClusterEntry]:
        """Write them, several at once. Clusters are numbered anew, in the order of their numbers in ``encoded``."""
        problems: defaultdict[int, list[Problem]] = defaultdict(list)
        for problem in sorted(self.encoded.places):
            problems[problem.cluster].append(problem)
        clusters = sorted(problems)
        members: defaultdict[int | None, list[int]] = defaultdict(list)
        for number, label in enumerate(self.encoded.labels):
            members[label].append(number)

        def bases(new: int) -> FileEntry:
            return self._bases(f"bases/{new}.safetensors", problems[clusters[new]])

        def cores(shard: tuple[int, ShardEntry]) -> None:
            self._cores(shard[1], problems[clusters[shard[0]]])

        with closing(in_order(bases, range(len(clusters)), _CPU, workers=_WRITERS)) as written:
            files = list(written)
        entries = []
        for new, (cluster, file) in enumerate(zip(clusters, files, strict=True)):
            own = members[cluster]
            held = [own[start : start + SHARD_ADAPTERS] for start in range(0, len(own), SHARD_ADAPTERS)]
            shards = [
                ShardEntry(f"cores/{new}-{number}.safetensors", adapters, file.sha256)
                for number, adapters in enumerate(held)
            ]
            entries.append(ClusterEntry(self.scheme.name, self._rank(problems[cluster]), file.path, shards))
        every = [(new, shard) for new, entry in enumerate(entries) for shard in entry.shards]
        with closing(in_order(cores, every, _CPU, workers=_WRITERS)) as done:
            for _ in done:
                pass
        return entries

    def _bases(self, path: str, problems: list[Problem]) -> FileEntry:
        """What the adapters of one cluster share, of all modules."""
        sources = {
            f"{self.modules[problem.module]}.{suffix}": (problem, suffix)
            for problem in problems
            for suffix in self.scheme.shared
        }
        layouts = {name: self._layout(*source) for name, source in sources.items()}
        with self.writer.tensors(path, layouts) as file:
            for name in file.order:
                check_stop()
                problem, suffix = sources[name]
                piece, found = self.encoded.places[problem]
                one = [(found.position, found.position + 1)]
                for data in self.pieces.read(piece).rows(tensor_name(suffix, found.group), one):
                    file.append_bytes(name, data)
        return FileEntry(path, file.size_bytes, file.sha256)

    def _cores(self, shard: ShardEntry, problems: list[Problem]) -> None:
        """The own tensors of some adapters of one cluster, of all modules that any of them has."""
        held = torch.tensor(shard.adapters, dtype=torch.int64)
        sources = {}
        layouts = {}
        for problem in problems:
            wanted = held[self.has[held, problem.module]]
            for suffix in self.scheme.own if len(wanted) else ():
                name = f"{self.modules[problem.module]}.{suffix}"
                sources[name] = problem, suffix, wanted
                dtype, shape = self._layout(problem, suffix)
                layouts[name] = TensorLayout(dtype, (len(wanted), *shape))
        with self.writer.tensors(shard.path, layouts, basis_sha256=shard.basis_sha256) as file:
            for name in file.order:
                check_stop()
                problem, suffix, wanted = sources[name]
                piece, found = self.encoded.places[problem]
                rows = found.row + torch.searchsorted(found.members, wanted)
                for data in self.pieces.read(piece).rows(tensor_name(suffix, found.group), _runs(rows)):
                    file.append_bytes(name, data)

    def _layout(self, problem: Problem, suffix: str) -> TensorLayout:
        """Of one shared tensor, or of one adapter's own."""
        piece, found = self.encoded.places[problem]
        dtype, shape = self.pieces.read(piece).layouts[tensor_name(suffix, found.group)]
        return TensorLayout(dtype, shape[1:])

    def _rank(self, problems: list[Problem]) -> int:
        """The largest rank of any module."""
        return max(
            self.scheme.stored_rank({suffix: self._layout(problem, suffix).shape for suffix in self.scheme.shared})
            for problem in problems
        )


def _runs(rows: Tensor) -> list[tuple[int, int]]:
    """Ascending numbers as (start, stop) of stretches without a gap."""
    ends = (rows[1:] - rows[:-1] > 1).nonzero()[:, 0] + 1
    stretches = torch.tensor_split(rows, ends)
    return [(int(stretch[0]), int(stretch[-1]) + 1) for stretch in stretches if len(stretch)]
