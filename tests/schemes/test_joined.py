"""Tensors that follow each other: each is found again, as a tensor and as bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorazip_core.schemes.joined import Joined


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.bfloat16, torch.float64])
def test_each_is_found_again(dtype: torch.dtype) -> None:
    tensors = [torch.arange(2 * rows).view(rows, 2).to(dtype) + rows for rows in (3, 0, 1, 2)]
    joined = Joined.of(tensors)
    for place, tensor in enumerate(tensors):
        assert torch.equal(joined[place], tensor)
        begin, end = joined.begins[place : place + 2]
        assert joined.memory[begin:end] == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert joined.begins[-1] == len(joined.memory)


@pytest.mark.parametrize("length", [0, 1])
def test_bytes_of_hardly_anything(length: int) -> None:
    """With the stride that numpy gives to what it broadcasts."""
    flat = torch.from_numpy(np.lib.stride_tricks.as_strided(np.full(1, 258, np.int16), (length,), (0,)))
    assert Joined(flat, np.full((length, 1), 1)).memory == b"\x02\x01" * length
