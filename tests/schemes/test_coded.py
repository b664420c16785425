"""The file of scheme `coded`, packed and unpacked; and the encodings of `coded` and `svd`, which follow spectra."""

from __future__ import annotations

import random
from collections.abc import Sequence
from decimal import Decimal, getcontext
from itertools import chain, product
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lorazip_core.schemes import coded, coded_file, streams
from lorazip_core.schemes.coded import Coded
from lorazip_core.schemes.coded_file import Arrays, CodedModules
from lorazip_core.schemes.joined import Joined
from lorazip_core.schemes.scheme import Encoding, ModuleGroup, Objective, PackedScheme, Size, Target
from lorazip_core.schemes.streams import Buffer, Bytes, Contradiction, deflate, inflate
from lorazip_core.schemes.svd import Svd

CPU = torch.device("cpu")


class CodedModule(NamedTuple):
    """The k components of a module."""

    u: np.ndarray
    """[k, d_out]"""
    v: np.ndarray
    """[k, d_in]"""
    scale: np.ndarray
    """[k]"""


def pack(adapters: Sequence[Sequence[CodedModule]]) -> Arrays:
    joined = []
    for adapter in adapters:
        sizes = np.array([(module.u.shape[1], module.v.shape[1]) for module in adapter], np.int64)
        counts = np.array([len(module.scale) for module in adapter], np.int64)
        u, v = (np.concatenate([module[side].reshape(-1) for module in adapter]) for side in (0, 1))
        joined.append(CodedModules(sizes, counts, u, v, np.concatenate([module.scale for module in adapter])))
    return coded_file.pack(joined)


def unpack(arrays: Arrays, sizes: Sequence[Sequence[Size]]) -> list[list[CodedModule]]:
    found = []
    for own in coded_file.unpack(arrays, sizes):
        (u, v), scale = ([*side] for side in (own.u, own.v)), [*own.scale]
        adapter = []
        for (d_out, d_in), count in zip(own.sizes.tolist(), own.counts.tolist(), strict=True):
            cut = (u[: count * d_out], v[: count * d_in], scale[:count])
            u, v, scale = u[count * d_out :], v[count * d_in :], scale[count:]
            arrays_of = np.array(cut[0], np.int8), np.array(cut[1], np.int8), np.array(cut[2], np.int16)
            adapter.append(
                CodedModule(arrays_of[0].reshape(count, d_out), arrays_of[1].reshape(count, d_in), arrays_of[2])
            )
        assert max(map(len, (u, v, scale))) == 0
        found.append(adapter)
    return found


@st.composite
def modules(draw: st.DrawFn) -> CodedModule:
    d_out, d_in = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    k = draw(st.integers(0, min(d_out, d_in)))
    largest = draw(st.sampled_from([1, 2, 7, 127]))
    codes = st.integers(-largest, largest)
    u = draw(hnp.arrays(np.int8, (k, d_out), elements=codes))
    v = draw(hnp.arrays(np.int8, (k, d_in), elements=codes))
    return CodedModule(u, v, draw(hnp.arrays(np.int16, k, elements=st.integers(-16000, 16000))))


ADAPTERS = st.lists(st.lists(modules(), min_size=1, max_size=4), min_size=1, max_size=4)


def sizes_of(adapters: Sequence[Sequence[CodedModule]]) -> list[list[Size]]:
    return [[Size(module.u.shape[1], module.v.shape[1]) for module in adapter] for adapter in adapters]


def assert_equal(one: Sequence[Sequence[CodedModule]], other: Sequence[Sequence[CodedModule]]) -> None:
    assert [len(adapter) for adapter in one] == [len(adapter) for adapter in other]
    for before, after in zip(chain.from_iterable(one), chain.from_iterable(other), strict=True):
        for array, unpacked in zip(before, after, strict=True):
            assert (array.dtype, array.shape) == (unpacked.dtype, unpacked.shape)
            np.testing.assert_array_equal(array, unpacked)


@settings(max_examples=60)
@given(ADAPTERS)
def test_round_trip(adapters: list[list[CodedModule]]) -> None:
    arrays = pack(adapters)
    specs = Coded().file_tensors(len(adapters))
    assert arrays.keys() == specs.keys()
    assert all(specs[name].fits(array.shape) for name, array in arrays.items())
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "bases": "int16", "kinds": "uint8", "index": "uint8", "codes": "uint8",
    }  # fmt: skip
    assert_equal(adapters, unpack(arrays, sizes_of(adapters)))


def test_the_scheme_packs_adapters_of_one_module_of_none_and_of_mixed_sizes() -> None:
    """Joined by suffix, as they come back."""
    adapters = [*sample(), [sample()[0][0]], [sample()[1][0]]]
    arrays = [[[torch.from_numpy(array) for array in module] for module in adapter] for adapter in adapters]
    joined = [dict(zip(Coded.own, map(Joined.of, zip(*own, strict=True)), strict=True)) for own in arrays]
    unpacked = Coded().unpack(Coded().pack(joined), sizes_of(adapters))
    assert [Coded().stored_rank(own) for own in unpacked] == [3, 4, 3, 0]
    for own, found in zip(arrays, unpacked, strict=True):
        for place, tensors in enumerate(own):
            for suffix, tensor in zip(Coded.own, tensors, strict=True):
                assert found[suffix][place].equal(tensor)
                assert found[suffix][place].dtype == tensor.dtype


@pytest.mark.parametrize("of", [Coded, PackedScheme])
def test_terms_of_all_modules_are_their_updates(of: type[PackedScheme]) -> None:
    """Also as a scheme has them that knows no better way than one module after another."""
    for own in sample():
        modules = [[torch.from_numpy(array) for array in module] for module in own]
        joined = dict(zip(Coded.own, map(Joined.of, zip(*modules, strict=True)), strict=True))
        found = of.joined_terms(Coded(), joined)
        scales = found.scale.double().split(found.u.shapes[:, 0].tolist())
        for u, v, scale, module in zip(found.u, found.v, scales, modules, strict=True):
            b, a = Coded().decode(dict(zip(Coded.own, module, strict=True)), torch.float64)
            torch.testing.assert_close((u.double().mT * scale) @ v.double(), b @ a, rtol=1e-6, atol=1e-6)


def test_nothing_at_all() -> None:
    empty = CodedModule(np.zeros((0, 3), np.int8), np.zeros((0, 2), np.int8), np.zeros(0, np.int16))
    arrays = pack([[empty], [empty, empty]])
    assert (arrays["bases"].tolist(), arrays["kinds"].size, arrays["codes"].size) == ([0, 0], 0, 0)
    assert_equal([[empty], [empty, empty]], unpack(arrays, [[Size(3, 2)], [Size(3, 2)] * 2]))


def sample(seed: int = 0) -> list[list[CodedModule]]:
    rng = np.random.default_rng(seed)

    def module(d_out: int, d_in: int, k: int, largest: int) -> CodedModule:
        sides = [rng.integers(-largest, largest + 1, (k, size)).astype(np.int8) for size in (d_out, d_in)]
        return CodedModule(sides[0], sides[1], rng.integers(-300, -200, k).astype(np.int16))

    return [[module(9, 7, 3, 60), module(5, 8, 2, 1)], [module(9, 7, 0, 1), module(5, 8, 4, 5), module(2, 2, 1, 2)]]


@pytest.mark.parametrize("seed", range(150))
def test_any_damage_is_a_contradiction_or_other_codes(seed: int) -> None:
    """Never another error, and never arrays of other shapes: who reads them relies on that."""
    rng, adapters = random.Random(seed), sample()
    sizes = sizes_of(adapters)
    arrays: Arrays = dict(pack(adapters))
    for _ in range(rng.choice([1, 1, 2, 5])):
        name = rng.choice(["index", "codes", "kinds"])
        data = bytearray(arrays[name].tobytes())
        match rng.choice(["flip", "flip", "cut", "insert", "begin"]):
            case "flip" if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case "cut":
                del data[rng.randrange(len(data) + 1) :]
            case "insert":
                place = rng.randrange(len(data) + 1)
                data[place:place] = rng.randbytes(3)
            case "begin":
                del data[: rng.randrange(3)]
        arrays[name] = np.frombuffer(data, np.uint8)
    try:
        found = unpack(arrays, sizes)
    except Contradiction:
        return
    assert sizes_of(found) == sizes
    assert all(len(m.u) == len(m.v) == len(m.scale) <= min(m.u.shape[1], m.v.shape[1]) for each in found for m in each)


@pytest.mark.parametrize("sizes", [Size(2**70, 7), Size(7, 2**62), Size(2**40, 2**40)])
def test_sizes_beyond_all_are_refused(sizes: Size) -> None:
    with pytest.raises(Contradiction):
        unpack(pack([[sample()[0][0]]]), [[sizes]])


@pytest.mark.parametrize("largest", [Size(2**28, 7), Size(7, 2**28)])
def test_a_module_that_keeps_nothing_may_be_large_but_not_beyond_a_limit(largest: Size) -> None:
    """What is written of it is zeros, and those take room."""
    nothing = pack([[CodedModule(np.zeros((0, 3), np.int8), np.zeros((0, 2), np.int8), np.zeros(0, np.int16))]])
    [[module]] = unpack(nothing, [[largest]])
    assert (module.u.shape, module.v.shape) == ((0, largest.d_out), (0, largest.d_in))
    with pytest.raises(Contradiction):
        unpack(nothing, [[Size(largest.d_out + 1, largest.d_in + 1)]])


def test_a_small_file_cannot_be_made_to_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in it fits together, but it is compressed as no codes would be."""
    length = 10**6
    zeros = CodedModule(np.zeros((1, length), np.int8), np.zeros((1, length), np.int8), np.zeros(1, np.int16))
    arrays = pack([[zeros]])
    assert_equal([[zeros]], unpack(arrays, [[Size(length, length)]]))  # what `pack` makes of the least is no such file
    bomb = deflate(np.full(-(-2 * length // 5), 121, np.uint8), alone=False)
    assert len(bomb) < 2 * length // 500
    inflated: list[int] = []

    def counted(data: Buffer, size: int) -> tuple[Bytes, Buffer]:
        inflated.append(size)
        return inflate(data, size)

    for module in (streams, coded_file):
        monkeypatch.setattr(module, "inflate", counted)
    with pytest.raises(Contradiction, match="more codes than its bytes can hold"):
        unpack({**arrays, "codes": np.frombuffer(bomb, np.uint8)}, [[Size(length, length)]])
    assert max(inflated) == 1


def test_expected_scales_are_far_from_the_middle() -> None:
    """16 log₂ n is nowhere so near to a half that float64 could round it to the wrong side, for whole n below 2³¹."""
    getcontext().prec = 40
    nearest = Decimal(1)
    for half in range(16 * 31):
        exact = Decimal(2) ** ((Decimal(half) + Decimal("0.5")) / 16)
        for n in (int(exact), int(exact) + 1):
            if n:
                nearest = min(nearest, abs(16 * Decimal(n).ln() / Decimal(2).ln() - half - Decimal("0.5")))
    assert nearest > 1e-12  # of numbers up to 500, of which float64 keeps 6·10⁻¹⁴


def group(updates: list[torch.Tensor], names: Sequence[str] = "abcdefgh", rank: int | None = None) -> ModuleGroup:
    """Modules with these dense updates, of full rank or of ``rank``."""
    b, a = [], []
    for update in updates:
        u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
        b.append((u * s)[:, :rank])
        a.append(vh[:rank])
    return ModuleGroup(
        list(names[: len(updates)]), torch.stack(b), torch.stack(a), torch.ones(len(updates)).double(), CPU
    )


def gaussian(d_out: int, d_in: int, spectrum: Sequence[float], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(d_out, len(spectrum), generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(d_in, len(spectrum), generator=generator, dtype=torch.float64)).Q
    return u * torch.tensor(spectrum, dtype=torch.float64) @ v.mT


SPECTRA = [[10.0, 5.0, 2.0, 1.0], [1.0, 0.5, 0.2, 0.1], [3.0, 3.0, 3.0, 3.0]]
UPDATES = [gaussian(60, 50, spectrum, seed) for seed, spectrum in enumerate(SPECTRA)]
NORMS = [float(update.square().sum()) for update in UPDATES]


def dense(scheme: Coded | Svd, encoding: Encoding, name: str) -> torch.Tensor:
    b, a = scheme.decode(own_tensors(scheme, encoding, name), torch.float64)
    return b @ a


def own_tensors(scheme: Coded | Svd, encoding: Encoding, name: str) -> dict[str, torch.Tensor]:
    """Of one module."""
    if encoding.joined is None:
        return {suffix: encoding.tensors[f"{name}.{suffix}"] for suffix in scheme.own}
    place = sorted(encoding.squared_errors).index(name)
    return {suffix: encoding.joined[suffix][place] for suffix in scheme.own}


@pytest.mark.parametrize("scheme", [Coded(), Svd()])
@pytest.mark.parametrize(
    "target",
    [
        Target(limit=0.1 * sum(NORMS)),
        Target(step=0.05),
        Target(limit=1e-3 * sum(NORMS)),
        Target(step=0.05, objective="resident"),
    ],
)
def test_errors_are_those_of_what_is_decoded(scheme: Coded | Svd, target: Target) -> None:
    encoding = next(iter(scheme.encodings([group(UPDATES, rank=4)], target, torch.float32)))
    for name, update in zip("abc", UPDATES, strict=True):
        lost = float((update - dense(scheme, encoding, name)).square().sum())
        assert encoding.squared_errors[name] == pytest.approx(lost, rel=1e-9, abs=1e-12)
        specs = scheme.own_tensors(Size(60, 50), max(encoding.ranks.values()))
        own = own_tensors(scheme, encoding, name)
        assert all(spec.fits(own[suffix].shape) for suffix, spec in specs.items())


@pytest.mark.parametrize("objective", get_args(Objective))
def test_modules_of_unequal_sizes_and_ranks_are_in_the_order_of_their_names(objective: Objective) -> None:
    updates = {
        "b": gaussian(60, 50, [5.0, 2.0], 0),
        "d": gaussian(60, 50, [0.01], 1),  # of which nothing is kept
        "a": gaussian(30, 70, [4.0, 3.0], 2),
        "c": gaussian(20, 10, [6.0, 1.0, 0.5], 3),
    }
    groups = [
        group([updates["b"], updates["d"]], "bd", rank=2),
        group([updates["a"]], "a", rank=2),
        group([updates["c"]], "c", rank=3),
    ]
    (encoding,) = Coded().encodings(groups, Target(step=0.3, objective=objective), torch.bfloat16)
    for name, update in updates.items():
        left = float((update - dense(Coded(), encoding, name)).square().sum())
        assert encoding.squared_errors[name] == pytest.approx(left, rel=1e-9, abs=1e-12)
        assert encoding.ranks[name] == len(own_tensors(Coded(), encoding, name)["scale"])
    assert encoding.ranks["d"] == 0
    assert all(encoding.ranks[name] for name in "abc")


@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("share", [0.5, 0.1, 0.03, 1e-3, 3e-4])
def test_coded_nearly_meets_its_limit(share: float, objective: Objective) -> None:
    limit = share * sum(NORMS)
    target = Target(limit=limit, objective=objective)
    (encoding,) = Coded().encodings([group(UPDATES, rank=4)], target, torch.bfloat16)
    lost = sum(encoding.squared_errors.values())
    assert lost <= limit
    if share > 1e-3:  # at most 12 components: what is lost goes in steps
        assert lost >= 0.6 * limit


@pytest.mark.parametrize("objective", get_args(Objective))
def test_coded_of_many_components_is_near_to_its_limit(objective: Objective) -> None:
    updates = [gaussian(80, 70, [0.8**i * (1 + 0.1 * seed) for i in range(16)], seed) for seed in range(8)]
    limit = 0.05 * sum(float(update.square().sum()) for update in updates)
    target = Target(limit=limit, objective=objective)
    (encoding,) = Coded().encodings([group(updates, rank=16)], target, torch.bfloat16)
    assert coded._NEAR * limit <= sum(encoding.squared_errors.values()) <= limit


@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_coded_meets_a_limit_also_where_a_little_changes_nothing(share: float) -> None:
    """Of few components of few entries, many steps give the same codes."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        d_out, d_in, rank = (int(torch.randint(1, most, (1,), generator=generator)) for most in (20, 20, 5))
        b, a = torch.randn(1, d_out, rank, generator=generator), torch.randn(1, rank, d_in, generator=generator)
        limit = share * float((b.double() @ a.double()).square().sum())
        module = ModuleGroup(["x"], b, a, torch.ones(1).double(), CPU)
        (encoding,) = Coded().encodings([module], Target(limit=limit), torch.bfloat16)
        assert encoding.squared_errors["x"] <= limit


def test_without_any_target_coded_loses_its_default() -> None:
    (encoding,) = Coded().encodings([group(UPDATES, rank=4)], Target(), torch.bfloat16)
    assert 0.5 * Coded.default_error < sum(encoding.squared_errors.values()) / sum(NORMS) <= Coded.default_error


def test_coded_of_nothing_is_nothing() -> None:
    (encoding,) = Coded().encodings([group([torch.zeros(6, 5)] * 2)], Target(limit=0.0), torch.bfloat16)
    assert encoding.ranks == {"a": 0, "b": 0}
    assert encoding.squared_errors == {"a": 0.0, "b": 0.0}
    assert not dense(Coded(), encoding, "a").any()


@pytest.mark.parametrize("share", [1e-5, 0.0])
def test_coded_gives_up_what_it_cannot_do(share: float) -> None:
    """No code is above 127, so rounding costs some 10⁻⁴."""
    assert list(Coded().encodings([group(UPDATES, rank=4)], Target(limit=share * sum(NORMS)), torch.bfloat16)) == []


@pytest.mark.parametrize(("rank", "expected"), [(1, (1, 1, 1)), (2, (2, 1, 3)), (3, (4, 1, 4)), (4, (4, 4, 4))])
def test_svd_ranks_follow_the_spectrum(rank: int, expected: tuple[int, ...]) -> None:
    encoding = next(iter(Svd().encodings([group(UPDATES, rank=4)], Target(rank=rank), torch.float64)))
    assert encoding.ranks == dict(zip("abc", expected, strict=True))
    uniform = sum(float(torch.linalg.svdvals(update)[rank:].square().sum()) for update in UPDATES)
    assert sum(encoding.squared_errors.values()) <= uniform + 1e-9


def test_svd_gives_a_module_with_all_the_energy_more() -> None:
    strong, weak = gaussian(30, 20, [9.0] * 8, 0), gaussian(30, 20, [1e-3] * 8, 1)
    encoding = next(iter(Svd().encodings([group([strong, weak, weak], rank=8)], Target(rank=3), torch.bfloat16)))
    assert encoding.ranks == {"a": 7, "b": 1, "c": 1}


def test_svd_of_two_shapes_counts_elements() -> None:
    """At mean rank R it takes no more elements than each at R, whatever the shapes."""
    large = group([gaussian(90, 70, [1.0, 0.9, 0.1, 0.1], 0)], "x", rank=4)
    small = group([gaussian(9, 7, [0.5, 0.4, 0.3, 0.2], 1)], "y", rank=4)
    for rank in range(1, 5):
        ranks = next(iter(Svd().encodings([large, small], Target(rank=rank), torch.float32))).ranks or {}
        assert 160 * ranks["x"] + 16 * ranks["y"] <= rank * 176
        assert min(ranks.values()) >= 1
    assert ranks == {"x": 4, "y": 4}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.05, 3), min_size=3, max_size=3), min_size=2, max_size=3),
    st.floats(0.001, 0.9),
)
def test_svd_meets_a_limit_with_the_fewest_components(spectra: list[list[float]], share: float) -> None:
    """Of all ranks that keep one of each module at least, found by trying them all."""
    spectra = [sorted(each, reverse=True) for each in spectra]
    updates = [gaussian(12, 10, spectrum, seed) for seed, spectrum in enumerate(spectra)]
    total = sum(value**2 for each in spectra for value in each)
    limit = share * total
    encodings = Svd().encodings([group(updates, rank=3)], Target(limit=limit), torch.float64)
    found = next(each for each in encodings if sum(each.squared_errors.values()) <= limit)
    fewest = min(
        sum(ranks)
        for ranks in product(range(1, 4), repeat=len(spectra))
        if sum(value**2 for each, rank in zip(spectra, ranks, strict=True) for value in each[rank:])
        <= limit * (1 - 1e-9)
    )
    assert sum((found.ranks or {}).values()) == fewest
