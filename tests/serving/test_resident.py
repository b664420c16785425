"""All adapters of a bundle on a device: what is computed is what is decoded, and what is held is what is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing.random_bundle import MODULES, SKETCHES, make_bundle
from torch import Tensor

from lorazip_core.base.errors import LocalError
from lorazip_core.bundle.decoder import decode
from lorazip_core.bundle.reader import Bundle
from lorazip_core.bundle.stored import stored
from lorazip_core.schemes import coded_resident
from lorazip_core.schemes.coded_resident import CodedModule, components, lay_out
from lorazip_core.schemes.factors import rows_of
from lorazip_core.schemes.registry import SCHEMES
from lorazip_core.schemes.scheme import Size
from lorazip_core.serving.resident import NONE, Resident

CPU = torch.device("cpu")
NAMES = [module.name for module in MODULES]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle(make_bundle(tmp_path_factory.mktemp("resident")))


@pytest.fixture(scope="module")
def resident(bundle: Bundle) -> Resident:
    return Resident.of(bundle, CPU)


def decoded(bundle: Bundle, module: str, x: Tensor, rows: Tensor) -> Tensor:
    """What `Resident.apply` should be, row by row, by the decoder and in float64."""
    adapters, [entry] = bundle.manifest.adapters, [each for each in bundle.manifest.modules if each.name == module]
    y = torch.zeros(len(x), entry.d_out, dtype=torch.float64)
    for token, row in enumerate(rows.tolist()):
        if row != NONE and entry in bundle.modules(adapters[row]):
            b, a = decode(bundle, adapters[row], entry, torch.float64)
            y[token] = b @ (a @ x[token].double())
    return y


ROWS = st.lists(st.integers(NONE, len(SKETCHES) - 1), max_size=30)


@settings(deadline=None)
@given(ROWS, st.sampled_from(NAMES), st.integers(0, 99))
def test_any_batch_is_decoded_and_multiplied(
    bundle: Bundle, resident: Resident, rows: list[int], module: str, seed: int
) -> None:
    numbers = torch.tensor(rows, dtype=torch.int64)
    d_in = resident.modules[module].size.d_in
    x = torch.randn(len(rows), d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y, expected = resident.apply(module, x, numbers), decoded(bundle, module, x, numbers)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert not y[numbers == NONE].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("module", NAMES)
def test_the_result_has_the_dtype_of_x_and_is_rounded_once(
    bundle: Bundle, resident: Resident, module: str, dtype: torch.dtype
) -> None:
    rows = torch.arange(NONE, len(SKETCHES), dtype=torch.int32)
    x = torch.randn(len(rows), resident.modules[module].size.d_in, generator=torch.Generator().manual_seed(1))
    y = resident.apply(module, x.to(dtype), rows)
    assert y.dtype == dtype
    exact = decoded(bundle, module, x.to(dtype), rows)
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5 * exact.abs().amax(1, keepdim=True)
    assert ((y.double() - exact).abs() <= rounding).all()


def test_every_scheme_is_there(bundle: Bundle, resident: Resident) -> None:
    """So that the tests above are about all of them, and uneven ranks and dtypes among them."""
    parts = [part for module in resident.modules.values() for part in module.parts]
    assert {part.scheme.name for part in parts} == SCHEMES.keys()
    assert {part.own["B"].dtype for part in parts if "B" in part.own} == {torch.bfloat16}
    assert resident.rows == {adapter.name: row for row, adapter in enumerate(bundle.manifest.adapters)}


@pytest.mark.parametrize(("dtypes", "parts"), [((torch.float16, torch.float32), 2), ((torch.float32,) * 2, 1)])
def test_factors_keep_their_dtypes(dtypes: tuple[torch.dtype, ...], parts: int, tmp_path: Path) -> None:
    first, last = SKETCHES[0], SKETCHES[6]
    sketches = [
        replace(last, name=name, modules=[0, 1, 2, 3], rank=rank, dtype=dtype)
        for name, rank, dtype in zip("hi", (2, 5), dtypes, strict=True)
    ]
    bundle = Bundle(make_bundle(tmp_path, sketches=[replace(first, name="a"), *sketches]))
    resident = Resident.of(bundle, CPU)
    own = [part for part in resident.modules[NAMES[0]].parts if part.scheme.name == "original"]
    assert sorted(str(part.own["A"].dtype) for part in own) == sorted(map(str, set(dtypes)))
    assert len(own) == parts
    x, rows = torch.randn(3, MODULES[1].d_in, dtype=torch.float64), torch.tensor([2, 1, 0])
    torch.testing.assert_close(resident.apply(NAMES[1], x, rows), decoded(bundle, NAMES[1], x, rows))


def test_bytes_are_those_of_the_tensors_and_of_each_adapter(bundle: Bundle, resident: Resident) -> None:
    held: dict[int, int] = {}
    for module in resident.modules.values():
        for part in module.parts:
            for tensor in (part.places, *part.own.values(), *part.shared.values()):
                held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
    assert resident.nbytes == sum(tensor for tensor in held.values())
    for row, adapter in enumerate(bundle.manifest.adapters):
        scheme, added = bundle.scheme(adapter), 0
        for module in bundle.modules(adapter):
            own = bundle.own(adapter, module.name)
            once, twice = (sum(tensor.nbytes for tensor in scheme.resident([own] * count).values()) for count in (1, 2))
            added += twice - once
        assert resident.own_bytes[row] == added


def test_codes_are_those_of_the_file(bundle: Bundle, resident: Resident) -> None:
    seen = 0
    for row, adapter in enumerate(bundle.manifest.adapters):
        for module in bundle.modules(adapter):
            for part in resident.modules[module.name].parts:
                if part.scheme.name == "coded" and adapter.scheme == "coded":
                    size, tensors = Size(module.d_out, module.d_in), stored(bundle, adapter, module)
                    rows, _ = rows_of(part.own["starts"], part.places[[row]])
                    found = components(part.own, size, rows)
                    assert found.keys() == tensors.keys()
                    for suffix, tensor in tensors.items():
                        assert torch.equal(found[suffix], tensor)
                        assert found[suffix].dtype == tensor.dtype
                    seen += 1
    assert seen == 7


def test_what_is_no_row_or_no_input_is_refused(resident: Resident) -> None:
    module, count = NAMES[2], len(SKETCHES)
    x = torch.zeros(1, MODULES[2].d_in)
    for row in (count, -2):
        with pytest.raises(ValueError, match=f"-1 to {count - 1}"):
            resident.apply(module, x, torch.tensor([row]))
    with pytest.raises(ValueError, match=r"takes \[k \* 1, 20\] here, not \[1, 19\]"):
        resident.apply(module, x[:, 1:], torch.tensor([0]))
    with pytest.raises(KeyError):
        resident.apply("layers.9.q_proj", x, torch.tensor([0]))
    assert resident.apply(module, x[:0], torch.tensor([], dtype=torch.int64)).shape == (0, MODULES[2].d_out)


def test_more_codes_than_offsets_reach_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = CodedModule(np.full((2, 9), 1, np.int8), np.full((2, 8), 2, np.int8), np.zeros(2, np.int16))
    assert lay_out([module])["at"].tolist() == [0, 5]
    monkeypatch.setattr(coded_resident, "_MOST_BYTES", 10)
    with pytest.raises(LocalError, match="10 bytes"):
        lay_out([module])


def test_a_row_is_for_inputs_that_follow_each_other(resident: Resident) -> None:
    """All tokens of two beams, or of sequences that are flattened."""
    rows = torch.tensor([3, NONE, 8, 3])
    x = torch.randn(8, 5, MODULES[2].d_in, generator=torch.Generator().manual_seed(2))
    expected = resident.apply(NAMES[2], x.flatten(0, 1), rows.repeat_interleave(10))
    batch = resident.batch(rows)
    assert torch.equal(resident.apply(NAMES[2], x, batch), expected.view(8, 5, -1))
    assert torch.equal(resident.apply(NAMES[2], x.flatten(0, 1), batch), expected)
    with pytest.raises(ValueError, match=r"k \* 4"):
        resident.apply(NAMES[2], x[:3, :3], batch)


def test_a_batch_is_looked_up_once(resident: Resident) -> None:
    batch = resident.batch(torch.tensor([0, NONE, 1]))
    parts = [part for module in resident.modules.values() for part in module.parts]
    first = {part.places.data_ptr(): batch.held(part, 4) for part in parts}
    assert len(first) < len(parts)
    assert all(batch.held(part, 4) is first[part.places.data_ptr()] for part in parts)
    assert len(batch.held(parts[0], 2).places) < len(batch.held(parts[0], 4).places)


def test_some_adapters_alone(bundle: Bundle, resident: Resident) -> None:
    some = [adapter for adapter in bundle.manifest.adapters if adapter.name in ("zb", "e", "f")]
    held = Resident.of(bundle, CPU, some)
    assert held.rows == {"e": 0, "f": 1, "zb": 2}
    assert held.own_bytes == [resident.own_bytes[resident.rows[name]] for name in held.rows]
    own = {module.name for adapter in some for module in bundle.modules(adapter)}
    assert held.modules.keys() == own
    for name in own:
        x = torch.randn(3, held.modules[name].size.d_in, generator=torch.Generator().manual_seed(3))
        rows = torch.tensor([resident.rows[each] for each in held.rows])
        found = held.apply(name, x, torch.arange(3))
        torch.testing.assert_close(found, resident.apply(name, x, rows))
