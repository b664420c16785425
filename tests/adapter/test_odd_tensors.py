"""Tensors of every shape and dtype beside the factors: carried bit by bit, or refused with the adapter's name."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from testing import peft_fixtures as fixtures
from torch import Tensor

from lorazip_cli.main import main
from lorazip_core.adapter.reader import open_adapter
from lorazip_core.base.errors import AdapterError
from lorazip_core.base.safetensors_header import TORCH_DTYPES
from lorazip_core.reading.groups import by_layout
from lorazip_core.reading.norms import finite_extras

BASE = {"target_modules": ["q"], "r": 2}
KEY = "base_model.model.head.own"
SHAPES = [(), (1,), (0, 3), (3, 0), (1, 1, 1, 1), (2, 1, 3), (5,)]


def some(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Small numbers, so that no dtype has NaN or Inf."""
    count = math.prod(shape)
    if dtype == torch.bool:
        return (torch.arange(count) % 2 == 1).reshape(shape)
    data = (torch.arange(count * dtype.itemsize) % 48).to(torch.uint8)
    return data.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def raw(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("pickled", [False, True])
def test_every_shape_and_dtype_comes_back(tmp_path: Path, pickled: bool) -> None:
    folder = tmp_path / "in" / "a"
    fixtures.save_adapter(folder, fixtures.tokens(), **BASE)
    extras = {
        f"{KEY}.{code}.{'x'.join(map(str, shape)) or 'scalar'}": some(dtype, shape)
        for code, dtype in TORCH_DTYPES.items()
        for shape in SHAPES
    }
    fixtures.edit_weights(folder, lambda tensors: tensors.update(extras))
    if pickled:
        fixtures.to_pickle(folder)
    allow = ["--allow-pickle"] if pickled else []
    options = ["--method", "svd", "--rank", "8", "--dtype", "f32", "-q"]
    assert main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "b"), *options, *allow]) == 0
    assert main(["verify", str(tmp_path / "b"), "--against", str(tmp_path / "in"), "-q", *allow]) == 0
    assert main(["export", str(tmp_path / "b"), "-o", str(tmp_path / "out"), "-q"]) == 0
    exported = load_file(tmp_path / "out" / "a" / fixtures.WEIGHTS)
    for key, tensor in extras.items():
        assert raw(exported[key]) == raw(tensor), key


def test_verify_finds_a_scalar_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in" / "a"
    fixtures.save_adapter(folder, fixtures.tokens(), **BASE)
    fixtures.edit_weights(folder, lambda tensors: tensors.update({KEY: torch.tensor(3)}))
    assert main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "b"), "-q"]) == 0
    fixtures.edit_weights(folder, lambda tensors: tensors.update({KEY: torch.tensor(4)}))
    assert main(["verify", str(tmp_path / "b"), "--against", str(tmp_path / "in")]) == 1
    assert f"tensor {KEY} is not the original's" in capsys.readouterr().err


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_what_is_not_finite_is_found_in_any_shape(tmp_path: Path, shape: tuple[int, ...], value: float) -> None:
    """In the bytes of several adapters at once, as a GPU has them."""
    fixtures.save_adapter(tmp_path, fixtures.tokens(), **BASE)
    fixtures.edit_weights(tmp_path, lambda tensors: tensors.update({KEY: torch.full(shape, value)}))
    adapter = open_adapter("a", tmp_path)
    (group,) = by_layout([adapter], [part.module for part in adapter.parts.values()])
    header = adapter.weights[0].header
    assert header is not None
    own = np.fromfile(tmp_path / fixtures.WEIGHTS, dtype=np.uint8)[header.size :]
    data = torch.zeros(2, adapter.layout.size, dtype=torch.uint8)
    data[:, : len(own)] = torch.from_numpy(own)
    expected = value == 1.0 or math.prod(shape) == 0
    assert finite_extras(data, group, [KEY]).tolist() == [expected, expected]


def with_header(folder: Path, dtype: str, shape: list[int], size: int) -> None:
    """Add a tensor that torch cannot write."""
    path = folder / fixtures.WEIGHTS
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    header[KEY] = {"dtype": dtype, "shape": shape, "data_offsets": [len(tensors), len(tensors) + size]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors + bytes(size))


@pytest.mark.parametrize(("dtype", "size"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_numbers_of_less_than_a_byte_are_refused(
    tmp_path: Path, dtype: str, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bad", "good"):
        fixtures.save_adapter(tmp_path / "in" / name, fixtures.tokens(), **BASE)
    with_header(tmp_path / "in" / "bad", dtype, [8], size)
    arguments = ["compress", str(tmp_path / "in"), "-o", str(tmp_path / "b"), "--rank", "2"]
    assert main(arguments) == 3
    assert f"adapter 'bad': tensor {KEY} is {dtype}" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad", "-q"]) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, dtype=torch.complex128),
        lambda: torch.ones(2, 2).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    ],
    ids=["complex128", "sparse", "quantized"],
)
def test_what_only_a_pickle_can_hold_is_refused(tmp_path: Path, make: Callable[[], Tensor]) -> None:
    fixtures.save_adapter(tmp_path, fixtures.tokens(), **BASE)
    tensors = load_file(tmp_path / fixtures.WEIGHTS)
    (tmp_path / fixtures.WEIGHTS).unlink()
    torch.save(tensors | {KEY: make()}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="'some/name'"):
        open_adapter("some/name", tmp_path, allow_pickle=True)
