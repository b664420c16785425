"""All adapters in tables: what the operators add is what `Resident.apply` computes, whatever comes and goes."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing.broken import PACKS, RESEALED, Broken
from testing.device_tables import computed, expected, inputs, layers
from testing.random_bundle import MODULES, SKETCHES, Sketch, make_bundle

from lorazip_core.base.errors import BundleDamaged, LocalError
from lorazip_core.bundle.manifest import AdapterEntry
from lorazip_core.bundle.reader import Bundle
from lorazip_core.bundle.stored import check_unpacked
from lorazip_core.maintain.remove import remove
from lorazip_core.schemes.registry import SCHEMES
from lorazip_core.serving.resident import NONE, Resident
from lorazip_core.serving.store import AdapterStore
from lorazip_core.serving.terms import TermsTable

CPU = torch.device("cpu")
NAMES = [sketch.name for sketch in SKETCHES]
FATAL = {"missing-tensor", "wrong-shape", "wrong-dtype", "not-finite", "wrong-basis"}
"""Findings that what decodes has to make."""
SPLITS = [(0, 1, False), (0, 2, False), (1, 2, False), (3, 4, False), (0, 2, True), (1, 2, True)]
"""The first argument of `layers` and those that follow."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle(make_bundle(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def resident(bundle: Bundle) -> Resident:
    return Resident.of(bundle, CPU)


@pytest.fixture(scope="module")
def stores(bundle: Bundle) -> dict[tuple[int, int, bool], AdapterStore]:
    return {split: store_of(bundle, split) for split in SPLITS}


def store_of(bundle: Bundle, split: tuple[int, int, bool] = SPLITS[0], spare: int = 0) -> AdapterStore:
    rank, ranks, by_rows = split
    own = layers(rank, ranks, by_rows=by_rows)
    return AdapterStore(bundle, own, device=CPU, dtype=torch.float32, spare=spare)


def check(store: AdapterStore, resident: Resident, held: dict[int, str], seed: int = 0) -> None:
    """Every layer, for a batch with all numbers ``held`` and `NONE`."""
    numbers = [NONE, *held]
    rows = [NONE, *(resident.rows[name] for name in held.values())]
    for number, layer in enumerate(store.layers):
        x, y = inputs(layer, len(rows), torch.float32, seed)
        found = computed(store, number, x, numbers, y)
        torch.testing.assert_close(found.double(), expected(resident, layer, x, rows, y), rtol=1e-5, atol=1e-5)
        assert torch.equal(found[0], y[0])


def entry(bundle: Bundle, name: str) -> AdapterEntry:
    """An adapter of a bundle."""
    return next(adapter for adapter in bundle.manifest.adapters if adapter.name == name)


def test_every_scheme_is_there(bundle: Bundle) -> None:
    assert {adapter.scheme for adapter in bundle.manifest.adapters} == SCHEMES.keys()


@settings(deadline=None)
@given(
    st.sampled_from(SPLITS),
    st.lists(st.sampled_from([NONE, *range(len(NAMES))]), max_size=40),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_any_batch_of_any_rank(
    stores: dict[tuple[int, int, bool], AdapterStore],
    resident: Resident,
    split: tuple[int, int, bool],
    rows: list[int],
    padding: int,
    seed: int,
) -> None:
    store = stores[split]
    names = list(resident.rows)
    numbers = [NONE if row == NONE else store.numbers[names[row]] for row in rows]
    for number, layer in enumerate(store.layers):
        x, y = inputs(layer, len(rows) + padding, torch.float32, seed)
        found = computed(store, number, x, numbers, y, padding)
        torch.testing.assert_close(found.double(), expected(resident, layer, x, rows, y), rtol=1e-5, atol=1e-5)
        assert torch.equal(found[len(rows) :], y[len(rows) :])


def test_a_batch_of_many_tokens(bundle: Bundle, resident: Resident) -> None:
    """More than 512 have wide tiles."""
    store, names = store_of(bundle), list(resident.rows)
    rows = np.random.default_rng(0).integers(NONE, len(names), 700).tolist()
    numbers = [NONE if row == NONE else store.numbers[names[row]] for row in rows]
    x, y = inputs(store.layers[1], len(rows), torch.float32)
    found = computed(store, 1, x, numbers, y)
    torch.testing.assert_close(found.double(), expected(resident, store.layers[1], x, rows, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("places", [[0], [1], [0, 2]])
def test_layers_that_have_some_of_the_modules(bundle: Bundle, resident: Resident, places: list[int]) -> None:
    some = [layers()[place] for place in places]
    store = AdapterStore(bundle, some, device=CPU, dtype=torch.float32)
    check(store, resident, {number: name for name, number in store.numbers.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_rounded_once_for_each_kind(bundle: Bundle, resident: Resident, dtype: torch.dtype) -> None:
    """The bases and cores of the bundle are in bf16 as they are; of f16 they lose a little."""
    store = AdapterStore(bundle, layers(), device=CPU, dtype=dtype)
    rows = list(range(len(NAMES)))
    for number, layer in enumerate(store.layers):
        x, y = inputs(layer, len(rows), dtype)
        found = computed(store, number, x, [store.numbers[name] for name in resident.rows], y)
        exact = expected(resident, layer, x, rows, y)
        assert found.dtype == dtype
        margin = torch.finfo(dtype).eps / 2 * exact.abs() + 2e-4 * exact.abs().amax(1, keepdim=True)
        assert ((found.double() - exact).abs() <= margin).all()


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("sets", [[0, 1, 2, 3], [2], [0, 3]])
def test_factors_in_any_dtype_and_modules_that_only_some_have(dtype: str, sets: list[int], tmp_path: Path) -> None:
    sketches = [
        Sketch("a", "svd", [0, 1, 2, 3], 3),
        Sketch("b", "svd", sets, 2),
        Sketch("c", "original", sets, 5, dtype=torch.float16),
        Sketch("d", "original", [1, 3], 1, dtype=torch.float32),
    ]
    bundle = Bundle(make_bundle(tmp_path, dtype=dtype, sketches=sketches))
    store = store_of(bundle)
    check(store, Resident.of(bundle, CPU), {number: name for name, number in store.numbers.items()})


def test_adapters_of_a_shard_that_lack_different_modules(tmp_path: Path) -> None:
    sketches = [
        Sketch("a", "joint", [2, 3], 3),
        Sketch("b/c", "joint", [0, 1, 2, 3], 3),
        Sketch("z", "joint", [1, 3], 3),
        Sketch("e", "diag", [2], 2),
        Sketch("f", "diag", [0, 2, 3], 2),
    ]
    bundle = Bundle(make_bundle(tmp_path, sketches=sketches))
    store = store_of(bundle)
    check(store, Resident.of(bundle, CPU), {number: name for name, number in store.numbers.items()})


def test_modules_of_no_layer_are_left_out(bundle: Bundle, resident: Resident) -> None:
    [_, qv, _] = layers()
    store = AdapterStore(bundle, [qv], device=CPU, dtype=torch.float32)
    check(store, resident, {number: name for name, number in store.numbers.items()})
    assert store.nbytes < 0.6 * store_of(bundle).nbytes


def test_adapters_come_and_go_and_tensors_stay(bundle: Bundle, resident: Resident) -> None:
    store = store_of(bundle, spare=2)
    held = {number: name for name, number in store.numbers.items()}
    calls = [call for layer in range(len(store.layers)) for call in store.calls(layer)]
    where = [tensor.data_ptr() for call in calls for tensor in call.tensors]
    size = store.nbytes
    check(store, resident, held)
    for turn in range(3):
        for name in ("za", "g", "a", "f"):
            removed = next(number for number, own in held.items() if own == name)
            store.remove(removed)
            del held[removed]
            check(store, resident, held, seed=turn)
            batch = store.batch(np.array([removed], np.int32))
            assert not batch[[0, 4, 8]].any()  # nobody has a tile
        for name in ("f", "za", "d", "g", "a", "e"):  # d has fewer modules than a, whose place it gets
            held[store.add(bundle, entry(bundle, name))] = name
            check(store, resident, held, seed=turn)
        for name in ("d", "e"):
            last = max(number for number, own in held.items() if own == name)
            store.remove(last)
            del held[last]
    assert len(held) == len(NAMES)
    again = [call for layer in range(len(store.layers)) for call in store.calls(layer)]
    assert [tensor.data_ptr() for call in again for tensor in call.tensors] == where
    assert [call.numbers for call in again] == [call.numbers for call in calls]
    assert (
        store.nbytes
        == size
        == sum({t.data_ptr(): t.nbytes for table in store._tables for t in tensors(table)}.values())
    )


def tensors(table: object) -> list[torch.Tensor]:
    found = [value if isinstance(value, list) else [value] for value in vars(table).values()]
    return [tensor for each in found for tensor in each if isinstance(tensor, torch.Tensor)]


def added_if_there_is_room(store: AdapterStore, bundle: Bundle, name: str) -> int | None:
    try:
        return store.add(bundle, entry(bundle, name))
    except LocalError:
        return None


@pytest.mark.parametrize("name", ["za", "a", "e"])
def test_a_full_table_refuses_and_nothing_is_taken(bundle: Bundle, resident: Resident, name: str) -> None:
    store = store_of(bundle, spare=3)
    held = {number: own for own, number in store.numbers.items()}
    added: list[int] = []
    while (number := added_if_there_is_room(store, bundle, name)) is not None:
        added.append(number)
    assert added
    for _ in range(3):
        for number in added:
            store.remove(number)
        check(store, resident, held)
        added = [store.add(bundle, entry(bundle, name)) for _ in added]
        with pytest.raises(LocalError, match="no room for"):
            store.add(bundle, entry(bundle, name))
        check(store, resident, held | dict.fromkeys(added, name))


def uneven(tmp_path: Path, random: np.random.Generator) -> Bundle:
    """Adapters with codes, of 2 to 4 components and modules."""
    sketches = [
        Sketch(f"c{number}", "coded", sorted(random.permutation(4)[: random.integers(2, 5)].tolist()), rank)
        for number, rank in enumerate(random.integers(2, 5, 24).tolist())
    ]
    return Bundle(make_bundle(tmp_path, sketches=sketches))


@pytest.mark.parametrize("seed", range(3))
def test_swaps_of_uneven_adapters_never_fail_where_a_place_is_free(seed: int, tmp_path: Path) -> None:
    """All that come have at most 1.5 times the average."""
    random = np.random.default_rng(seed)
    bundle = uneven(tmp_path, random)
    store, resident = store_of(bundle, spare=4), Resident.of(bundle, CPU)
    sizes = {adapter.name: len(store._packed(bundle, [adapter])[0].data) for adapter in bundle.manifest.adapters}
    names = [name for name, size in sizes.items() if size <= 1.5 * np.mean([*sizes.values()])]
    held = {number: name for name, number in store.numbers.items()}
    for turn in range(120):
        if len(held) == len(sizes) + 3:
            remove_one(store, held, random)
        name = str(random.choice(names))
        held[store.add(bundle, entry(bundle, name))] = name
        if turn % 6 == 5:
            check(store, resident, held, seed=turn)


@pytest.mark.parametrize("seed", range(3))
def test_adapters_in_pieces_compute_the_same(seed: int, tmp_path: Path) -> None:
    """Some go, and others come until one does not fit, so that hardly anything is free in one piece."""
    random = np.random.default_rng(seed)
    bundle = uneven(tmp_path, random)
    store, resident = store_of(bundle), Resident.of(bundle, CPU)
    [table] = store._tables
    assert isinstance(table, TermsTable)
    held = {number: name for name, number in store.numbers.items()}
    names = list(held.values())
    for turn in range(12):
        for _ in range(3):
            remove_one(store, held, random)
        name = str(random.choice(names))
        while (number := added_if_there_is_room(store, bundle, name)) is not None:
            held[number] = name
            name = str(random.choice(names))
        check(store, resident, held, seed=turn)
    pieces = [(len(own.terms), len(own.data)) for own in table._held.values()]
    assert (np.max(pieces, 0) > 1).all()


def remove_one(store: AdapterStore, held: dict[int, str], random: np.random.Generator) -> None:
    number = int(random.choice(list(held)))
    store.remove(number)
    del held[number]


def test_where_one_kind_of_room_is_missing_the_others_are_not_taken(tmp_path: Path) -> None:
    """A large adapter has no room where many small ones have: refused as often as it likes, these still fit."""
    small = [Sketch(f"s{number}", "original", [0], 1, dtype=torch.bfloat16) for number in range(2)]
    bundle = Bundle(make_bundle(tmp_path / "small", sketches=small, modules=MODULES[3:]))
    large = Bundle(
        make_bundle(
            tmp_path / "large",
            sketches=[Sketch("large", "original", [0], 8, dtype=torch.float32), Sketch("wide", "original", [0], 20)],
            modules=MODULES[3:],
        )
    )
    [_, qv, _] = layers()
    own = [qv._replace(slices=qv.slices[1:])]
    store = AdapterStore(bundle, own, device=CPU, dtype=torch.float32, spare=4)
    resident = Resident.of(bundle, CPU)
    for _ in range(9):
        with pytest.raises(LocalError, match="no room for an adapter of 8 terms and 896 bytes"):
            store.add(large, entry(large, "large"))
        with pytest.raises(LocalError, match="has 20 terms, but room was made for 16"):
            store.add(large, entry(large, "wide"))
    held = {number: name for name, number in store.numbers.items()}
    for _ in range(4):
        held[store.add(bundle, entry(bundle, "s0"))] = "s0"
    check(store, resident, held)
    with pytest.raises(LocalError, match="no room"):
        store.add(bundle, entry(bundle, "s0"))


def test_no_more_adapters_than_numbers(bundle: Bundle, resident: Resident) -> None:
    """Where tables have room, since spare adapters may be of any kind."""
    store = store_of(bundle, spare=1)
    held = {number: name for name, number in store.numbers.items()}
    added = store.add(bundle, entry(bundle, "a"))
    for _ in range(2):
        with pytest.raises(LocalError, match="no room for adapter e"):
            store.add(bundle, entry(bundle, "e"))
    store.remove(added)
    check(store, resident, held | {store.add(bundle, entry(bundle, "e")): "e"})


def test_a_row_that_is_free_has_no_terms(bundle: Bundle) -> None:
    """For batches that are under way."""
    store = store_of(bundle)
    [index] = {call.tensors[0] for call in store.calls(1) if call.operator == "add_terms"}
    before = int(index.any(-1).sum())
    store.remove(store.numbers["za"])
    assert int(index.any(-1).sum()) == before - 2  # of q and v


def test_other_bases_are_refused(bundle: Bundle, resident: Resident, tmp_path: Path) -> None:
    store = store_of(bundle, spare=3)
    other = Bundle(make_bundle(tmp_path, seed=1))
    for name in ("a", "e"):
        with pytest.raises(LocalError, match="on bases that are not held"):
            store.add(other, entry(other, name))
    held = {number: name for name, number in store.numbers.items()}
    number = store.add(other, entry(other, "za"))  # shares nothing
    theirs, x = Resident.of(other, CPU), inputs(store.layers[1], 1, torch.float32)
    found = computed(store, 1, x[0], [number], x[1])
    torch.testing.assert_close(
        found.double(), expected(theirs, store.layers[1], x[0], [theirs.rows["za"]], x[1]), rtol=1e-5, atol=1e-5
    )
    check(store, resident, held)


def test_bases_that_are_a_rest_of_those_held_are_those(bundle: Bundle, resident: Resident, tmp_path: Path) -> None:
    """After `lorazip remove`: bases without the modules that no adapter has any more, with other digests."""
    remove(bundle.path, ["a"], tmp_path / "rest")
    rest = Bundle(tmp_path / "rest")
    [joint] = [cluster for cluster in rest.manifest.clusters if cluster.method == "joint"]
    assert rest.origin(joint.basis) != next(file.sha256 for file in rest.manifest.files if file.path == joint.basis)
    store = store_of(bundle, spare=2)
    held = {number: name for name, number in store.numbers.items()}
    for name in ("b/c", "d"):
        held[store.add(rest, entry(rest, name))] = name
    check(store, resident, held)


def test_fewer_modules_of_bases_do_not_do(bundle: Bundle, tmp_path: Path) -> None:
    """What an adapter is on a module that is not held would be lost without a word."""
    remove(bundle.path, ["a"], tmp_path / "rest")
    store = store_of(Bundle(tmp_path / "rest"), spare=1)
    store.add(bundle, entry(bundle, "b/c"))
    store = store_of(Bundle(tmp_path / "rest"), spare=1)
    with pytest.raises(LocalError, match=r"on bases that are not held|none of those that are served"):
        store.add(bundle, entry(bundle, "a"))


def test_where_all_share_bases_others_are_held_if_room_is_asked_for(
    bundle: Bundle, resident: Resident, tmp_path: Path
) -> None:
    shared = Bundle(make_bundle(tmp_path, sketches=[sketch for sketch in SKETCHES if sketch.scheme == "joint"]))
    for spare, name in ((0, "zb"), (1, "e")):  # e is diagonal
        with pytest.raises(LocalError, match=f"no room was made for adapters like {name}"):
            store_of(shared, spare=spare).add(bundle, entry(bundle, name))
    store = store_of(shared, spare=2)
    check(store, resident, {store.add(bundle, entry(bundle, "zb")): "zb", store.add(bundle, entry(bundle, "za")): "za"})


@pytest.mark.parametrize("broken", [*RESEALED, *PACKS], ids=lambda broken: broken.name)
def test_damage_is_named_like_that_of_tensors_read_one_by_one(broken: Broken, tmp_path: Path) -> None:
    path, said = make_bundle(tmp_path), list[str]()
    broken.damage(path)
    for held in (lambda: Resident.of(Bundle(path), CPU), lambda: store_of(Bundle(path))):
        try:
            held()
        except BundleDamaged as error:
            said.append(re.sub(r" is (not of )?\[.*", "", str(error)))
        else:
            said.append("")
    assert said[0] == said[1]
    assert said[0] or not broken.kinds & FATAL


@pytest.mark.parametrize("place", [0, 1])
def test_every_adapter_of_a_file_is_held_to_its_own_rank(tmp_path: Path, place: int) -> None:
    """Though modules that are alike are checked once."""
    sketches = [Sketch(name, "coded", [0, 1, 2, 3], 3, dropped=[0, 1]) for name in ("za", "zb")]
    bundle = Bundle(make_bundle(tmp_path, sketches=sketches))
    adapters = list(bundle.manifest.adapters)
    unpacked = bundle.unpacked_in(str(adapters[0].individual))
    check_unpacked(bundle, unpacked)
    adapters[place] = msgspec.structs.replace(adapters[place], rank=2)
    bundle.manifest = msgspec.structs.replace(bundle.manifest, adapters=adapters)
    with pytest.raises(BundleDamaged, match=r"q_proj.u is \[3, 24\], not \[0..2, 24\]"):
        check_unpacked(bundle, unpacked)
