"""Bounds on memory: how work is cut to fit, what is refused before anything is read or written, and the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, cast

import pytest
import torch
import typer
from testing import random_adapters as ra

from lorazip_cli.main import main
from lorazip_cli.options import size
from lorazip_core.adapter.collection import Collection, open_collection
from lorazip_core.base.errors import LocalError
from lorazip_core.reading import memory
from lorazip_core.reading.memory import Bounds, Task, WorkPlan, fit_into_memory
from lorazip_core.reading.packs import CPU_BUDGET
from lorazip_core.reading.placement import HOST

MIB, GIB = 2**20, 2**30
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("8GiB", 8 * GIB),
        ("500 MB", 500_000_000),
        ("1000000", 1_000_000),
        ("1.5GiB", 3 * GIB // 2),
        ("7B", 7),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("1TB", 10**12),
        ("0.5TiB", 2**39),
        ("8G", 8 * 10**9),
        ("8Gi", 8 * GIB),
        ("1.5GB", 1_500_000_000),
        ("500mb", 500_000_000),
        ("8gib", 8 * GIB),
        ("0.001 K", 1),
        ("1.000000001G", 10**9 + 1),
    ],
)
def test_sizes_are_read(value: str, expected: int) -> None:
    assert size(value) == expected


@pytest.mark.parametrize(
    "value", ["0", "0GiB", "0.1", "-1", "-1GiB", "lots", "", "GiB", "8  G", "1e9", "8GiB ", "8iB", "1,5GB"]
)
def test_what_is_no_size_is_refused(value: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size"):
        size(value)


def plan(device: torch.device, collection: Collection, bounds: Bounds) -> WorkPlan:
    """For joint at rank 16 in one cluster."""
    return fit_into_memory(device, collection, Task("joint", 16, 1, False), bounds)


def a_collection(
    modules: Sequence[int],
    adapters: int = 1000,
    size_bytes: int = 20 * MIB,
    dtype: str = "F32",
    sources: Sequence[int] = (),
) -> Collection:
    """Adapters that are all of one layout, with so many elements in the factors of each of the modules.

    ``sources`` are the bytes of tensors with the factors of experts.
    """
    keys = {"key_b": "b", "key_a": "a"}
    parts = {f"m{number}": SimpleNamespace(parameters=count, **keys) for number, count in enumerate(modules)}
    tensors = {"b": SimpleNamespace(dtype="F32"), "a": SimpleNamespace(dtype=dtype)}
    tensors |= {f"source{number}": SimpleNamespace(size_bytes=size) for number, size in enumerate(sources)}
    cuts = [SimpleNamespace(source=f"source{number}") for number in range(len(sources))]
    layout = SimpleNamespace(size=size_bytes, interleaved_bytes=sum(sources), tensors=tensors, interleaved=cuts)
    one = SimpleNamespace(parts=parts, layout=layout)
    shapes = [SimpleNamespace(name=name, d_out=4096, d_in=4096) for name in parts]
    return cast(Collection, SimpleNamespace(adapters=[one] * adapters, modules=shapes))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 cores, a process that holds 200 MiB, and 80 GiB free on the GPU."""
    monkeypatch.setattr(memory, "cores", lambda: 16)
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 200 * MIB)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 80 * GIB)


class TestOnTheCpu:
    def test_without_a_bound_all_cores_work(self) -> None:
        assert plan(CPU, a_collection([1000]), Bounds()) == WorkPlan(16, CPU_BUDGET, HOST)

    def test_fewer_work_within_less(self) -> None:
        collection = a_collection([1000])
        workers = [plan(CPU, collection, Bounds(bound * MIB)).workers for bound in (65536, 4096, 2048, 1024, 512)]
        assert workers == sorted(workers, reverse=True)
        assert workers[0] == 16
        assert workers[-1] == 1
        assert len(set(workers)) > 3
        assert all(plan(CPU, collection, Bounds(bound * MIB)).budget == CPU_BUDGET for bound in (512, 65536))

    def test_the_largest_module_of_all_adapters_decides(self) -> None:
        """It is one pack, however small the others are."""
        small, large = a_collection([1000, 1000]), a_collection([1000, 40_000])
        bound = Bounds(2 * GIB)
        assert plan(CPU, large, bound).workers < plan(CPU, small, bound).workers
        assert plan(CPU, a_collection([40_000] * 96), bound) == plan(CPU, large, bound)

    def test_what_does_not_fit_is_refused_with_what_it_needs(self) -> None:
        collection = a_collection([100_000])
        with pytest.raises(LocalError, match="«memory»: 1024 MiB is too little, ") as refused:
            plan(CPU, collection, Bounds(1 * GIB))
        needed = int(str(refused.value).split("too little, ")[1].split()[0])
        assert needed > 1024
        assert plan(CPU, collection, Bounds(needed * MIB)).workers == 1
        with pytest.raises(LocalError):
            plan(CPU, collection, Bounds((needed - 1) * MIB))

    def test_other_kinds_of_adapters_count_as_often_as_they_are(self) -> None:
        mixed = a_collection([1000], 300)
        mixed.adapters.extend(a_collection([1000, 50], 200).adapters)  # type: ignore[attr-defined]
        numbers, updates = memory._counts(mixed)
        assert dict(numbers) == {"m0": 500 * 1000, "m1": 200 * 50}
        assert dict(updates) == {"m0": 500, "m1": 200}

    @pytest.mark.parametrize("method", ["joint", "diag"])
    def test_factors_in_float64_take_more(self, method: Literal["joint", "diag"]) -> None:
        """A pack of them is a stack and a batch of float64."""
        task = Task(method, 16, 1, False)
        base, narrow = memory.host_bytes(CPU, a_collection([100_000, 50]), task)
        assert memory.host_bytes(CPU, a_collection([100_000, 50], dtype="F64"), task) == (
            base,
            narrow + 1000 * 100_000 * memory._WIDE_BYTES,
        )

    def test_each_worker_holds_a_tensor_of_experts_and_its_parts(self) -> None:
        task = Task("joint", 16, 1, False)
        _, without = memory.host_bytes(CPU, a_collection([100_000]), task)
        _, experts = memory.host_bytes(CPU, a_collection([100_000], sources=[MIB, 48 * MIB, MIB]), task)
        assert experts == without + 2 * 48 * MIB

    def test_the_bound_on_a_gpu_says_nothing_here(self) -> None:
        assert plan(CPU, a_collection([1000]), Bounds(None, 1)) == WorkPlan(16, CPU_BUDGET, HOST)


class TestOnAGpu:
    def test_what_fits_stays_there(self) -> None:
        assert plan(GPU, a_collection([100_000]), Bounds()).placement.kind == "resident"

    def test_what_does_not_is_streamed_in_smaller_blocks_and_packs(self) -> None:
        collection = a_collection([100_000])
        bounds = [80, 40, 24, 8]
        found = [plan(GPU, collection, Bounds(None, bound * GIB)) for bound in bounds]
        assert [each.placement.kind for each in found] == ["resident", "resident", "streamed", "streamed"]
        assert found[2].placement.block_bytes > found[3].placement.block_bytes
        for bound, each in zip(bounds, found, strict=True):
            resident = 1000 * 20 * MIB if each.placement.kind == "resident" else 0
            assert resident + each.budget.elements * memory._GPU_BYTES <= bound * GIB
        assert plan(GPU, collection, Bounds(None, 80 * GIB)).budget == found[0].budget

    def test_no_more_than_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        collection = a_collection([100_000])
        monkeypatch.setattr(memory, "free_bytes", lambda device: 8 * GIB)
        assert plan(GPU, collection, Bounds(None, 80 * GIB)) == plan(GPU, collection, Bounds(None, 8 * GIB))
        assert plan(GPU, collection, Bounds()) == plan(GPU, collection, Bounds(None, 8 * GIB))

    def test_packs_depend_on_the_bound_by_steps(self) -> None:
        """The bytes depend on the packs, so that a few bytes more or less that are free must not decide."""
        collection = a_collection([100_000], size_bytes=200 * MIB)
        budgets = {plan(GPU, collection, Bounds(None, 20 * GIB + step * 10 * MIB)).budget for step in range(100)}
        assert len(budgets) <= 2
        for budget in budgets:
            assert budget.elements.bit_count() == 1

    def test_one_large_adapter_is_read_by_way_of_the_host(self) -> None:
        collection = a_collection([100_000], 10, 4 * GIB)
        assert plan(GPU, collection, Bounds(None, 16 * GIB)).placement == HOST

    def test_what_does_not_fit_is_refused(self) -> None:
        collection = a_collection([100_000])
        with pytest.raises(LocalError, match=r"«device_memory»: 1024 MiB is too little, \d+ MiB is the least"):
            plan(GPU, collection, Bounds(None, 1 * GIB))
        with pytest.raises(LocalError, match=r"«memory»: 2048 MiB is too little, \d+ MiB is the least"):
            plan(GPU, collection, Bounds(2 * GIB))
        plan(GPU, collection, Bounds(3 * GIB))

    def test_factors_in_float64_take_more(self) -> None:
        wide = a_collection([100_000], dtype="F64")
        for bound in (80, 24, 8):
            found = plan(GPU, wide, Bounds(None, bound * GIB))
            resident = 1000 * 20 * MIB if found.placement.kind == "resident" else 0
            assert resident + found.budget.elements * (memory._GPU_BYTES + memory._WIDE_BYTES) <= bound * GIB
        least = 1000 * 100_000 * (memory._GPU_BYTES + memory._WIDE_BYTES)
        plan(GPU, a_collection([100_000]), Bounds(None, least))
        with pytest.raises(LocalError, match="«device_memory»"):
            plan(GPU, wide, Bounds(None, least))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("adapters"), ra.MIXED)


class TestTheCommands:
    @pytest.mark.parametrize("verb", ["compress", "cluster"])
    def test_too_little_is_told_before_anything_is_written(
        self, verb: str, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([verb, str(adapters), "-o", str(tmp_path / "out"), "--memory", "1MB"]) == 8
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("lorazip: error: --memory: 1 MiB is too little, ")
        assert err.endswith("takes (allow more, or compress fewer adapters at a time)\n")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("option", ["--memory", "--device-memory"])
    @pytest.mark.parametrize("verb", ["compress", "cluster"])
    def test_no_size_is_a_mistake_of_usage(
        self, verb: str, option: str, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([verb, str(adapters), "-o", str(tmp_path / "out"), option, "lots"]) == 2
        err = capsys.readouterr().err
        assert option in err
        assert "'lots' is no size: give bytes, or K, M, G, T or Ki, Mi, Gi, Ti, like 500MB or 8G" in err

    def test_one_worker_and_many_make_the_same_bytes(
        self, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert plan(CPU, open_collection(adapters), Bounds(400 * MIB)).workers == 1
        options = ["--rank", "4", "--clusters", "2", "--max-error", "0.02", "-q", "--device", "cpu"]
        for name, bound in (("free", []), ("bounded", ["--memory", "400MiB"])):
            assert main(["compress", str(adapters), "-o", str(tmp_path / name), *options, *bound]) == 0
            assert main(["cluster", str(adapters), "-o", str(tmp_path / f"{name}.json"), "-q", *bound]) == 0
        free, bounded = (
            {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            for folder in (tmp_path / "free", tmp_path / "bounded")
        )
        assert free == bounded
        assert (tmp_path / "free.json").read_bytes() == (tmp_path / "bounded.json").read_bytes()


def test_a_process_knows_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    before = memory.anonymous_bytes()
    held = torch.ones(16 * MIB)
    assert before + 60 * MIB < memory.anonymous_bytes() < before + 80 * MIB
    assert held.sum() > 0
