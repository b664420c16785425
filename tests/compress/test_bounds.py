"""Bounds on memory: what does not fit is refused before any work, and a bound changes nothing in the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from testing import random_adapters as ra

from lorazip_cli.main import main
from lorazip_core.adapter.collection import Collection, open_collection
from lorazip_core.base.errors import LocalError
from lorazip_core.base.filesystem import tree
from lorazip_core.compress.run import compress
from lorazip_core.maths.batch import Batch
from lorazip_core.maths.chunks import ELEMENTS_AT_ONCE
from lorazip_core.maths.stack import ScaledStack, Stack
from lorazip_core.planning.options import CompressOptions
from lorazip_core.reading import memory
from lorazip_core.reading.memory import Bounds, Task, fit_into_memory

CPU = torch.device("cpu")
ONE = Task("joint", 4, 1, False)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("adapters"), ra.plain(8, groups=2))


@pytest.fixture
def collection(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> Collection:
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 100_000_000)
    monkeypatch.setattr(memory, "cores", lambda: 4)
    return open_collection(adapters)


def least(collection: Collection, task: Task) -> int:
    """The smallest bound that is accepted."""
    refused, accepted = 0, 2**40
    while accepted - refused > 1:
        middle = (refused + accepted) // 2
        try:
            fit_into_memory(CPU, collection, task, Bounds(middle))
            accepted = middle
        except LocalError:
            refused = middle
    return accepted


def test_the_bound_decides_how_many_work_at_a_time(collection: Collection) -> None:
    bound = least(collection, ONE)
    assert bound > 100_000_000
    assert fit_into_memory(CPU, collection, ONE, Bounds(bound)).workers == 1
    for plenty in (10 * bound, None):
        assert fit_into_memory(CPU, collection, ONE, Bounds(plenty)).workers == 4
    budgets = {fit_into_memory(CPU, collection, ONE, Bounds(bytes_)).budget for bytes_ in (None, bound, 10 * bound)}
    assert len(budgets) == 1  # the cut of the work is the same


@pytest.mark.parametrize(
    "more",
    [
        Task("joint", 16, 1, False),
        Task("joint", 4, 8, False),
        Task("joint", 4, 8, True),
        Task("diag", 16, 1, False),
    ],
)
def test_what_takes_more_needs_more(collection: Collection, more: Task) -> None:
    assert least(collection, more) > least(collection, ONE._replace(method=more.method))


def test_auto_may_find_many_clusters_and_a_file_looks_for_none() -> None:
    assert Task.of("joint", 16, 3, 80) == Task("joint", 16, 3, True)
    assert Task.of("joint", 16, 1, 80) == Task("joint", 16, 1, False)
    assert Task.of("joint", 16, "auto", 80) == Task("joint", 16, 10, True)
    assert Task.of("joint", 16, Path("clusters.json"), 80) == Task("joint", 16, 80, False)


@pytest.mark.parametrize("clusters", ["1", "2"])
def test_too_little_is_refused_at_once_with_one_line(
    adapters: Path, tmp_path: Path, clusters: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorazip_core.compress.run.scan_for", None)  # no weight is read
    words = ["compress", str(adapters), "-o", str(tmp_path / "out"), "--clusters", clusters, "--memory", "100MiB"]
    assert main([*words, "--device", "cpu", "-q"]) == 8
    (line,) = capsys.readouterr().err.splitlines()
    assert "--memory: 100 MiB is too little" in line
    assert not any(tmp_path.iterdir())


def test_a_bound_changes_no_byte(adapters: Path, tmp_path: Path) -> None:
    compress(adapters, tmp_path / "free", CompressOptions(rank=3, clusters=2))
    compress(adapters, tmp_path / "bound", CompressOptions(rank=3, clusters=2, memory=2**30))
    free, bound = ({p: (tmp_path / n / p).read_bytes() for p in tree(tmp_path / n)} for n in ("free", "bound"))
    assert free == bound


def test_slices_of_a_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems of unequal size, so that these have several chunks each, and two ranks."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    stack = Stack.of([(random(12, rank), random(rank, 10)) for rank in [2] * 9 + [3] * 5], range(14))
    owners = torch.tensor([0] * 7 + [1, 1] + [0, 1, 2, 2, 2])
    u, v = random(3, 12, 4), random(3, 10, 4)
    whole = Batch.of([ScaledStack.of(stack)], [owners], 3)
    cores = whole.chunked_cores(u, v)
    bases = random(3, 5, 4, 2)

    def results() -> list[torch.Tensor]:
        return [
            whole.times_left_gram(u),
            whole.times_right_gram(v),
            *whole.gradients(u, v),
            whole.cores(u, v),
            cores.left_gram(bases),
        ]

    expected = results()
    monkeypatch.setitem(ELEMENTS_AT_ONCE, "cpu", 1)
    for found, wanted in zip(results(), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    dense = torch.zeros(3, 12, 4)
    for b, a, positions in stack.factors():
        for i, d in zip(range(positions.start, positions.stop), b @ a, strict=True):
            dense[owners[i]] += d @ d.mT @ u[owners[i]]
    assert torch.allclose(whole.times_left_gram(u), dense, rtol=1e-4, atol=1e-3)
