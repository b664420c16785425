"""Bundles written once and never again, of format 1 by lorazip 0.1.0 and of format 2: every later version reads them.

golden/adapters are the originals (testing/random_adapters.py, MIXED), its sisters the bundles, those of format 2 in a
folder. What they decode to is compared with the reference reader, which knows the specification only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from testing import random_adapters
from testing.reference_reader import ReferenceReader

from lorazip_core.bundle.decoder import decode
from lorazip_core.bundle.reader import Bundle
from lorazip_core.export.exporter import export
from lorazip_core.verify.run import verify

GOLDEN = Path(__file__).parent / "golden"
# The largest squared error of each, as it was when they were written.
WORST = {
    "joint": 0.1660827856731705,
    "diag": 0.1691810896495578,
    "svd": 0.16607896609815812,
    "original": 0.0,
    "format-2/joint": 0.10926853737086818,
    "format-2/diag": 0.2854949779389341,
    "format-2/svd": 0.20276361615466282,
    "format-2/coded": 0.09943546469158633,
    "format-2/original": 0.0,
}


@pytest.mark.parametrize("name", WORST)
def test_golden_bundles_are_sound_and_true(name: str) -> None:
    assert Bundle(GOLDEN / name).manifest.format_version == (2 if name.startswith("format-2/") else 1)
    report = verify(GOLDEN / name, against=GOLDEN / "adapters")
    assert report.findings == []
    assert report.summary is not None
    assert report.summary.max_squared_error == pytest.approx(WORST[name], rel=1e-6)


@pytest.mark.parametrize("name", WORST)
def test_golden_bundles_decode_as_specified(name: str) -> None:
    bundle, reference = Bundle(GOLDEN / name), ReferenceReader(GOLDEN / name)
    for adapter in bundle.manifest.adapters:
        assert adapter.origin is None  # they are older than the field
        for module in bundle.modules(adapter):
            b, a = decode(bundle, adapter, module, torch.float64)
            np.testing.assert_allclose((b @ a).numpy(), reference.update(adapter.name, module.name), atol=1e-12)


@pytest.mark.parametrize("name", WORST)
def test_golden_bundles_are_exported(name: str, tmp_path: Path) -> None:
    report = export(GOLDEN / name, tmp_path / "out")
    assert [adapter.name for adapter in report.adapters] == [recipe.name for recipe in random_adapters.MIXED]
