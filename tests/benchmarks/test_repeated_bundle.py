"""Each adapter of a bundle of repeated ones is the one that it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from testing.random_bundle import make_bundle

from lorazip_core.bundle.reader import Bundle
from lorazip_core.serving.resident import Resident

sys.path.insert(0, str(Path(__file__).parent))

from repeated_bundle import repeat

CPU = torch.device("cpu")


def test_all_are_what_they_were(tmp_path: Path) -> None:
    before = Bundle(make_bundle(tmp_path / "made"))
    count = len(before.manifest.adapters)
    assert len(repeat(before, tmp_path / "many", 2 * count + 1).adapters) == 3 * count
    resident, found = Resident.of(before, CPU), Resident.of(Bundle(tmp_path / "many"), CPU)
    for name, module in resident.modules.items():
        x = torch.randn(1, module.size.d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for adapter, row in found.rows.items():
            own = resident.rows[adapter.removeprefix("again-0001-").removeprefix("again-0002-")]
            expected = resident.apply(name, x, torch.tensor([own]))
            assert torch.equal(found.apply(name, x, torch.tensor([row])), expected), (adapter, name)


def test_a_repeated_one_is_not_repeated(tmp_path: Path) -> None:
    repeat(Bundle(make_bundle(tmp_path / "made")), tmp_path / "many", 40)
    with pytest.raises(ValueError, match="repeated ones already"):
        repeat(Bundle(tmp_path / "many"), tmp_path / "more", 200)
    assert not (tmp_path / "more").exists()
