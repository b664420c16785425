"""tensor_file: the bytes of safetensors' own writer, and what is read back."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorazip_core.base.digests import sha256_file
from lorazip_core.base.errors import LocalError
from lorazip_core.bundle.tensor_file import TensorFileReader, TensorFileWriter, TensorLayout, write_tensors

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64),
    *(torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]
texts = st.text(st.characters(codec="utf-8"), max_size=12)
names = texts.filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
layouts = st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=8)


def some(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    size = TensorLayout(dtype, shape).size_bytes
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(high, (size,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return data.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=layouts, metadata=st.none() | st.tuples(texts, texts))
def test_the_bytes_are_those_of_safetensors(
    tmp_path: Path, wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: tuple[str, str] | None
) -> None:
    tensors = {name: some(*layout, seed) for seed, (name, layout) in enumerate(wanted.items())}
    told = {metadata[0]: metadata[1]} if metadata else None
    save_file(tensors, tmp_path / "theirs", metadata=told)
    written = write_tensors(tmp_path / "ours", tensors, metadata=told)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert written.size_bytes == (tmp_path / "ours").stat().st_size
    assert written.sha256 == sha256_file(tmp_path / "ours")
    reader = TensorFileReader(tmp_path / "theirs")
    assert reader.layouts.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = reader.tensor(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert reader.data(name) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_dtype_has_the_place_that_safetensors_gives_it(tmp_path: Path) -> None:
    tensors = {f"{number}": torch.zeros(3, dtype=dtype) for number, dtype in enumerate(DTYPES)}
    save_file(tensors, tmp_path / "theirs")
    write_tensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_in_parts_and_rows_of_one(tmp_path: Path) -> None:
    x, y = torch.arange(12.0).reshape(6, 2), torch.zeros(0, 3)
    with TensorFileWriter(
        tmp_path / "f", {"x": TensorLayout(x.dtype, (6, 2)), "y": TensorLayout(y.dtype, (0, 3))}
    ) as writer:
        assert writer.order == ["x", "y"]
        writer.append_bytes("x", x[:1].numpy().tobytes())
        writer.append_bytes("x", x[1:].numpy().tobytes())
    torch.testing.assert_close(load_file(tmp_path / "f"), {"x": x, "y": y}, rtol=0, atol=0)
    rows = b"".join(TensorFileReader(tmp_path / "f").rows("x", [(0, 1), (3, 5)]))
    assert torch.frombuffer(bytearray(rows), dtype=torch.float32).tolist() == [0, 1, 6, 7, 8, 9]


def test_a_view_is_written_as_it_looks(tmp_path: Path) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "f", {"t": x.mT, "part": x[1:, ::2]})
    read = load_file(tmp_path / "f")
    assert torch.equal(read["t"], x.mT)
    assert torch.equal(read["part"], x[1:, ::2])


@pytest.mark.parametrize("appended", [[], ["a"], ["b", "a"], ["a", "b", "a"], ["a", "b", "b"], ["a", "other"]])
def test_what_the_header_does_not_say_is_refused(tmp_path: Path, appended: list[str]) -> None:
    """Nothing, not all, in another order, too much, another shape."""
    layout = TensorLayout(torch.float32, (2,))

    def fill() -> None:
        with TensorFileWriter(tmp_path / "f", {"a": layout, "b": layout}) as writer:
            for name in appended:
                writer.append("b" if name == "other" else name, torch.zeros(3 if name == "other" else 2))

    with pytest.raises(ValueError, match=r"header says|missing or not in order"):
        fill()


def test_a_dtype_that_safetensors_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"tensor x: safetensors has no torch\.complex128"):
        write_tensors(tmp_path / "f", {"x": torch.zeros(1, dtype=torch.complex128)})
    assert not (tmp_path / "f").exists()


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "f", {"x": torch.zeros(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_a_file_that_was_cut_is_told(tmp_path: Path) -> None:
    write_tensors(tmp_path / "f", {"x": torch.zeros(10)})
    reader = TensorFileReader(tmp_path / "f")
    os.truncate(tmp_path / "f", (tmp_path / "f").stat().st_size - 20)
    with pytest.raises(LocalError, match="shorter than it was"):
        reader.tensor("x")
