"""Reading a whole collection: the same numbers wherever the bytes go, every file once, files that change."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from testing import peft_fixtures as fixtures
from testing.random_adapters import LINEAR, MIXED, Q, Recipe, plain, write_collection

from lorazip_core.adapter import weights
from lorazip_core.adapter.collection import Collection, open_collection
from lorazip_core.adapter.formats.peft import factor_keys
from lorazip_core.adapter.reader import Adapter
from lorazip_core.base.digests import sha256_file
from lorazip_core.base.errors import AdapterError, AdapterErrors
from lorazip_core.maths.stack import ScaledStack, Stack
from lorazip_core.reading import blocks, buffers, contents, sources
from lorazip_core.reading.buffers import Buffers
from lorazip_core.reading.module_groups import ModuleGroups
from lorazip_core.reading.placement import Placement, choose_placement
from lorazip_core.reading.scan import Scan, scan
from lorazip_core.reading.sources import Files
from lorazip_core.reading.stacks import Stacks

CPU = torch.device("cpu")
GPU = torch.device("cuda")
KEY_B, KEY_A = factor_keys(Q)
WEIGHTS = fixtures.WEIGHTS
# The arrays that are meant for a GPU, here in ordinary memory; blocks of all, of some adapters, and of one.
PLACEMENTS = {
    "host": Placement("host", 0),
    "resident": Placement("resident", 2**30),
    "resident in blocks": Placement("resident", 20_000),
    "streamed": Placement("streamed", 20_000),
    "streamed one by one": Placement("streamed", 1),
}


def scanned(root: Path, kind: str = "host", *, skip_bad: bool = False, singular: bool = False, **options: Any) -> Scan:
    collection = open_collection(root, skip_bad=skip_bad, **options)
    return scan(
        collection, skip_bad=skip_bad, advance=lambda steps: None, placement=PLACEMENTS[kind], singular=singular
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of adapter, some of equal layout and other scales, sharded, pickled, and with metadata of its own."""
    root = write_collection(tmp_path_factory.mktemp("mixed"), (*MIXED, *plain(5), Recipe("u", 4, scale=1 / 7)))
    fixtures.to_shards(root / "t01")
    shutil.copytree(root / "a", root / "pickled")
    fixtures.to_pickle(root / "pickled")
    save_file(load_file(root / "t02" / WEIGHTS), root / "t02" / WEIGHTS, metadata={"trained": "on Tuesday" * 9})
    return root


def expected_stack(collection: Collection, module: int, members: Sequence[int] | None = None) -> ScaledStack:
    name = collection.modules[module].name
    wanted = range(len(collection.adapters)) if members is None else members
    having = [i for i in wanted if name in collection.adapters[i].parts]
    factors = [[side.float() for side in collection.adapters[i].stored_factors(name)] for i in having]
    stack = Stack.of([(b, a) for b, a in factors], having)
    scales = [collection.adapters[i].parts[name].scale for i in stack.adapters]
    return ScaledStack(stack, torch.tensor(scales, dtype=torch.float64))


def assert_same(actual: ScaledStack, expected: ScaledStack) -> None:
    rows, others = actual.rows, expected.rows
    assert (rows.adapters, rows.groups) == (others.adapters, others.groups)
    assert torch.equal(actual.factors, expected.factors)
    for mine, other in ((rows.bt, others.bt), (rows.a, others.a)):
        assert mine.dtype == torch.float32
        assert mine.is_contiguous()
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_stacks_are_those_of_the_adapters(mixed: Path, kind: str) -> None:
    found = scanned(mixed, kind, allow_pickle=True)
    updates = found.updates("adapter", CPU)
    count = len(found.collection.adapters)
    for module in range(len(found.collection.modules)):
        assert_same(updates.load(module), expected_stack(found.collection, module))
        for members in (range(0, count, 2), range(3, 9), [count - 1]):
            name = found.collection.modules[module].name
            if any(name in found.collection.adapters[i].parts for i in members):
                assert_same(updates.load(module, list(members)), expected_stack(found.collection, module, members))
    kept = updates.kept([1, 0])
    assert_same(kept.load(1), updates.load(0))
    assert_same(kept.load(1, [0, 1]), updates.load(0, [0, 1]))


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_norms_and_digests(mixed: Path, kind: str) -> None:
    found = scanned(mixed, kind, allow_pickle=True)
    for number, adapter in enumerate(found.collection.adapters):
        for column, module in enumerate(found.collection.modules):
            norm = float(found.norms[number, column])
            if module.name in adapter.parts:
                b, a = adapter.factors(module.name, torch.float64)
                assert norm == pytest.approx(float((b @ a).square().sum()), rel=1e-12)
            else:
                assert norm == 0
        assert [(adapter.folder / source.path) for source in found.files[number]] == list(adapter.files)
        for source, path in zip(found.files[number], adapter.files, strict=True):
            assert (source.size_bytes, source.sha256) == (path.stat().st_size, sha256_file(path))


def test_norms_do_not_depend_on_how_a_collection_is_cut(mixed: Path) -> None:
    """To the last bit, since they are in the manifest."""
    norms = [scanned(mixed, kind, allow_pickle=True).norms for kind in PLACEMENTS if kind != "host"]
    assert all(torch.equal(norms[0], other) for other in norms[1:])


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_small_pieces_give_the_same(mixed: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scanned(mixed, kind, allow_pickle=True)
    monkeypatch.setattr(blocks, "PIECE", 1000)
    monkeypatch.setattr(buffers.InMemory, "piece", 1000)
    pieces = scanned(mixed, kind, allow_pickle=True)
    assert pieces.files == whole.files
    assert torch.equal(pieces.norms, whole.norms)


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_every_file_is_read_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_collection(tmp_path, plain(5))
    read: Counter[str] = Counter()
    read_fully = contents.read_fully

    def counting(descriptor: int, into: Sequence[memoryview], position: int) -> int:
        count = read_fully(descriptor, into, position)
        read[os.path.realpath(f"/proc/self/fd/{descriptor}")] += count
        return count

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read from the file again")

    collection = open_collection(root)
    monkeypatch.setattr(contents, "read_fully", counting)
    monkeypatch.setattr(Adapter, "read_into", refuse)
    scan(collection, skip_bad=False, advance=lambda steps: None, placement=PLACEMENTS[kind])
    assert read == {str(adapter.files[1]): adapter.files[1].stat().st_size for adapter in collection.adapters}


def test_an_adapter_too_large_for_the_buffers(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scanned(mixed, allow_pickle=True)
    monkeypatch.setattr(blocks, "_HOST_BYTES", 4096)
    monkeypatch.setattr(blocks, "PIECE", 1000)
    monkeypatch.setattr(buffers.InMemory, "piece", 1000)
    small = scanned(mixed, allow_pickle=True)
    assert small.files == whole.files
    assert torch.equal(small.norms, whole.norms)


def assert_singular_values(found: Scan) -> None:
    assert found.singular is not None
    for adapter, values in zip(found.collection.adapters, found.singular, strict=True):
        for part, own in zip(adapter.parts.values(), values.split_with_sizes(ranks(adapter)), strict=True):
            b, a = (side.double() for side in adapter.stored_factors(part.module.name))
            most = min(part.rank, *b.shape[:1], *a.shape[1:])
            expected = torch.linalg.svdvals(abs(part.scale) * b @ a)[:most]
            torch.testing.assert_close(own[:most], expected, rtol=1e-6, atol=1e-6 * float(expected[0]))


def ranks(adapter: Adapter) -> list[int]:
    return [part.rank for part in adapter.parts.values()]


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_singular_values_are_found_while_adapters_are_read(mixed: Path, kind: str) -> None:
    found, without = (scanned(mixed, kind, allow_pickle=True, singular=wanted) for wanted in (True, False))
    assert_singular_values(found)
    assert without.singular is None
    assert torch.equal(found.norms, without.norms)
    assert found.files == without.files


def put(root: Path, key: str, value: float) -> None:
    fixtures.edit_weights(root, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_what_is_bad_is_named_and_left_out(tmp_path: Path, kind: str) -> None:
    head = "base_model.model.score.weight"
    recipes = [Recipe(f"t{i}", 3, LINEAR, extras={head: torch.ones(2, 3)}) for i in range(7)]
    root = write_collection(tmp_path, tuple(recipes))
    put(root / "t1", KEY_A, float("nan"))
    put(root / "t3", head, float("inf"))
    put(root / "t4", KEY_B, float("-inf"))
    put(root / "t6", KEY_B, 3e38)
    with pytest.raises(AdapterErrors) as caught:
        scanned(root, kind)
    assert {error.adapter: error.reason for error in caught.value.errors} == {
        "t1": f"tensor {KEY_A} has NaN or Inf (its training diverged; leave it out)",
        "t3": f"tensor {head} has NaN or Inf (its training diverged; leave it out)",
        "t4": f"tensor {KEY_B} has NaN or Inf (its training diverged; leave it out)",
        "t6": f"module {Q.name}: its update overflows float32 (its training diverged)",
    }
    assert [error.adapter for error in caught.value.errors] == ["t1", "t3", "t4", "t6"]
    found = scanned(root, kind, skip_bad=True, singular=True)
    assert [adapter.name for adapter in found.collection.adapters] == ["t0", "t2", "t5"]
    assert_singular_values(found)
    assert found.norms.isfinite().all()
    updates = found.updates("adapter", CPU)
    for module in range(len(found.collection.modules)):
        assert_same(updates.load(module), expected_stack(found.collection, module))
        assert updates.load(module).rows.a.isfinite().all()


def test_a_module_that_only_a_bad_adapter_has_leaves_with_it(tmp_path: Path) -> None:
    root = write_collection(tmp_path, (Recipe("a", 3, (Q,)), Recipe("b", 3, LINEAR), Recipe("c", 3, (Q,))))
    put(root / "b", KEY_A, float("nan"))
    for kind in PLACEMENTS:
        found = scanned(root, kind, skip_bad=True)
        assert found.norms.shape == (2, 1)
        assert_same(found.updates("adapter", CPU).load(0), expected_stack(found.collection, 0))


CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut within the tensors": (lambda data: data[:-10], "adapter_model.safetensors: tensor .* is truncated"),
    "cut within the header": (lambda data: data[:20], "adapter_model.safetensors: it is truncated"),
    "empty": (lambda data: b"", "it is truncated"),
    "longer": (lambda data: data + b"x", "changed while it was being read"),
    "another header": (lambda data: data.replace(b"q_proj", b"x_proj"), "changed while it was being read"),
}


@pytest.mark.parametrize("kind", ["host", "resident", "streamed"])
@pytest.mark.parametrize("change", CHANGES)
def test_files_that_change_after_they_were_opened(tmp_path: Path, kind: str, change: str) -> None:
    root = write_collection(tmp_path, plain(3))
    collection = open_collection(root)
    edit, reason = CHANGES[change]
    path = root / "t01" / WEIGHTS
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(AdapterErrors, match=f"'t01': {reason}|'t01': .*{reason}") as caught:
        scan(collection, skip_bad=False, advance=lambda steps: None, placement=PLACEMENTS[kind])
    assert len(caught.value.errors) == 1
    kept = scan(collection, skip_bad=True, advance=lambda steps: None, placement=PLACEMENTS[kind])
    assert [adapter.name for adapter in kept.collection.adapters] == ["t00", "t02"]


def test_a_file_that_is_cut_after_the_scan(tmp_path: Path) -> None:
    """No signal ends the process, as reading a map would; the tensor is named."""
    found = scanned(write_collection(tmp_path, plain(3)), "streamed")
    path = tmp_path / "t01" / WEIGHTS
    os.truncate(path, path.stat().st_size - 10)
    last = found.collection.modules[2]
    with pytest.raises(AdapterError, match=rf"'t01': {WEIGHTS}: tensor {factor_keys(last)[0]} is truncated"):
        found.updates("adapter", CPU).load(2)
    with pytest.raises(AdapterError, match="is truncated"):
        Stacks(found.collection, CPU, Files(found.collection.adapters, CPU, readers=3)).load(2)


def test_several_readers_and_small_turns(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CPU_STAGING", 5000)
    collection = open_collection(mixed, allow_pickle=True)
    loader = Stacks(collection, CPU, Files(collection.adapters, CPU, readers=3))
    for module in range(len(collection.modules)):
        assert_same(loader.load(module), expected_stack(collection, module))


def test_where_the_bytes_go() -> None:
    assert choose_placement(CPU, 10**9, 10**8, 10**12).kind == "host"
    assert choose_placement(GPU, 60, 1, 100).kind == "resident"
    assert choose_placement(GPU, 61, 1, 100) == ("streamed", 12)
    assert choose_placement(GPU, 10**12, 10**8, 80 * 10**9) == ("streamed", 2**31)
    assert choose_placement(GPU, 61, 13, 100).kind == "host"  # two of them would take more than a quarter


def test_buffers_are_bounded_and_used_again() -> None:
    pool = Buffers(100)
    with pool.lend(60) as first, pool.lend(40) as second:
        assert (len(first), len(second)) == (60, 40)
        addresses = {first.data_ptr(), second.data_ptr()}
    with pool.lend(30) as again:
        assert again.data_ptr() in addresses
    with pool.lend(100) as whole:
        assert len(whole) == 100
    assert pool._held == 100


def test_what_is_alike_is_opened_and_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_collection(tmp_path, (*plain(6), Recipe("u", 4, scale=7.0)))
    save_file(load_file(root / "t05" / WEIGHTS), root / "t05" / WEIGHTS, metadata={"more": "x" * 100})
    opened: list[Path] = []

    def counting(path: Path, **options: Any) -> Any:
        opened.append(path)
        return safe_open(path, **options)

    monkeypatch.setattr(weights, "safe_open", counting)
    adapters = open_collection(root).adapters
    assert [path.parent.name for path in opened] == ["t00", "t05"]
    assert len({id(adapter.layout) for adapter in adapters}) == 1
    assert len({id(adapter.parts) for adapter in adapters[:6]}) == 1
    assert adapters[6].parts is not adapters[0].parts
    assert {part.scale for part in adapters[6].parts.values()} == {7.0}
    assert len({adapter.weights[0].header for adapter in adapters}) == 2


def test_a_known_header_on_a_file_of_another_size_is_no_valid_file(tmp_path: Path) -> None:
    root = write_collection(tmp_path, plain(3))
    with (root / "t01" / WEIGHTS).open("ab") as file:
        file.write(b"more")
    with pytest.raises(AdapterErrors, match=r"'t01': adapter_model\.safetensors is truncated or no safetensors file"):
        open_collection(root)


def test_tensors_at_odd_addresses(tmp_path: Path) -> None:
    """safetensors allows tensors in any order, also where none of their items is aligned."""
    root = write_collection(tmp_path, plain(3))
    for path in root.glob(f"*/{WEIGHTS}"):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # they are maps of the file
        tensors["base_model.model.flag"] = torch.tensor([True])
        header: dict[str, Any] = {}
        data = b""
        for name, tensor in sorted(tensors.items()):
            begin = len(data)
            data += tensor.numpy().tobytes()
            dtype = "BOOL" if tensor.dtype == torch.bool else "F32"
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, len(data)]}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, tensors[name])
    for kind in PLACEMENTS:
        found = scanned(root, kind)
        module = found.collection.modules.index(Q)
        stack = found.updates("adapter", CPU).load(module)
        assert_same(stack, expected_stack(found.collection, module))
        assert found.norms[:, module].tolist() == pytest.approx(stack.exact().squared_norms().tolist(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.complex64, torch.bool, torch.uint16])
def test_extras_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    extra = torch.tensor([[0.0, 1.0, 1.0]]).to(dtype)
    root = write_collection(tmp_path, (Recipe("a", 3, extras={"base_model.model.x": extra}), Recipe("b", 3)))
    for kind in PLACEMENTS:
        read = scanned(root, kind).collection.adapters[0].extra("base_model.model.x")
        assert (read.dtype, read.shape) == (dtype, extra.shape)
        assert torch.equal(read.view(torch.uint8), extra.view(torch.uint8))


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_an_adapter_by_itself_has_all_its_modules(mixed: Path, kind: str) -> None:
    """Those of one shape, rank and dtype together, whether its data stayed where it was read to or is read again."""
    found = scanned(mixed, kind, allow_pickle=True)
    groups_of = ModuleGroups(found, CPU)
    for number, adapter in enumerate(found.collection.adapters):
        groups = groups_of.of(number)
        assert sorted(name for group in groups for name in group.names) == sorted(adapter.parts)
        kinds = [(group.b.shape[1:], group.a.shape[1:], group.b.dtype, group.a.dtype) for group in groups]
        assert len(set(kinds)) == len(kinds)
        for group in groups:
            for name, b, a, scale in zip(group.names, group.b, group.a, group.scales.tolist(), strict=True):
                for side, expected in zip((b, a), adapter.stored_factors(name), strict=True):
                    assert side.dtype == expected.dtype
                    assert torch.equal(side, expected)
                assert scale == adapter.parts[name].scale


def test_what_stayed_is_not_read_again(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = scanned(mixed, "resident", allow_pickle=True)
    monkeypatch.setattr(Adapter, "read_into", None)
    monkeypatch.setattr(Adapter, "each_stored", None)
    groups_of = ModuleGroups(found, CPU)
    assert all(groups_of.of(number) for number in range(len(found.collection.adapters)))
    with pytest.raises(TypeError):
        ModuleGroups(scanned(mixed, "streamed", allow_pickle=True), CPU).of(0)


def test_few_open_files_are_enough(tmp_path: Path) -> None:
    """150 adapters where a process may open 64 files, read as `compress` does."""
    made = write_collection(tmp_path / "made", plain(1)) / "t00"
    for number in range(150):
        folder = tmp_path / "many" / f"{number:03}"
        folder.mkdir(parents=True)
        for file in made.iterdir():
            os.link(file, folder / file.name)
    code = """
        import sys, torch
        from pathlib import Path
        from lorazip_core.adapter.collection import open_collection
        from lorazip_core.reading.placement import Placement
        from lorazip_core.reading.scan import scan
        from lorazip_core.reading.sources import Files
        from lorazip_core.reading.stacks import Stacks
        cpu = torch.device("cpu")
        for kind in ("host", "streamed", "resident"):
            collection = open_collection(Path(sys.argv[1]))
            found = scan(collection, skip_bad=False, advance=lambda n: None, placement=Placement(kind, 2**20))
            stacks = Stacks(collection, cpu, Files(collection.adapters, cpu, readers=8))
            updates = found.updates("adapter", cpu)
            for module in range(3):
                assert torch.equal(updates.load(module).rows.a, stacks.load(module).rows.a)
        print(len(found.norms))
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "many")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    assert (ran.returncode, ran.stdout) == (0, "150\n"), ran.stderr
