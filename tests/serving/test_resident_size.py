"""Bytes that are counted file by file are those of all adapters together."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from testing.random_bundle import UNEVEN, Sketch, make_bundle

from lorazip_core.base.device import CPU
from lorazip_core.base.errors import BundleDamaged
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.sample import sample_path
from lorazip_core.schemes.coded import Coded
from lorazip_core.schemes.joined import Joined
from lorazip_core.schemes.scheme import PackedScheme, Size
from lorazip_core.serving import resident_size as module
from lorazip_core.serving.resident import Resident
from lorazip_core.serving.resident_size import resident_size

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from repeated_bundle import repeat

SETS = sorted(
    [*UNEVEN, Sketch("y", "coded", [0, 1, 2, 3], 2), Sketch("zb", "coded", [2], 1)], key=lambda sketch: sketch.name
)
"""Module sets that differ from adapter to adapter, also in one file."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sizes")
    compress(sample_path(), root / "sample", CompressOptions())
    made = {
        "all": make_bundle(root / "all"),
        "uneven": make_bundle(root / "uneven", dtype="f16", sketches=SETS),
        "sample": root / "sample",
    }
    for name in ("uneven", "sample"):
        repeat(Bundle(made[name]), root / f"{name}-files", 40)
        made[f"{name}, in several files"] = root / f"{name}-files"
    return made


@pytest.mark.parametrize("name", ["all", "uneven", "sample", "uneven, in several files", "sample, in several files"])
def test_bytes_are_those_of_all_adapters_together(bundles: dict[str, Path], name: str) -> None:
    bundle = Bundle(bundles[name])
    if "several" in name:
        assert len({adapter.individual for adapter in bundle.manifest.adapters if adapter.scheme == "coded"}) > 2
    size, held = resident_size(bundle), Resident.of(bundle, CPU)
    assert size.own_bytes == held.own_bytes
    assert size.nbytes == held.nbytes


def test_never_are_more_adapters_read_together_than_are_in_a_file(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(bundles["uneven, in several files"])
    most = []

    class Watched(Resident):
        @classmethod
        def of(cls, bundle: Bundle, device: torch.device, adapters: object = None) -> Resident:
            assert isinstance(adapters, list)
            most.append(len(adapters))
            return Resident.of(bundle, device, adapters)

    monkeypatch.setattr(module, "Resident", Watched)
    resident_size(bundle)
    assert max(most) <= 3  # coded ones of three module sets


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    compress(sample_path(), tmp_path / "bundle", CompressOptions())
    [file] = {str(adapter.individual) for adapter in Bundle(tmp_path / "bundle").manifest.adapters}
    data = bytearray((tmp_path / "bundle" / file).read_bytes())
    data[-9] ^= 1
    (tmp_path / "bundle" / file).write_bytes(data)
    with pytest.raises(BundleDamaged, match=file):
        resident_size(Bundle(tmp_path / "bundle"))


@pytest.mark.parametrize("seed", range(6))
def test_a_scheme_counts_joined_tensors_as_it_does_one_by_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = [Size(*random.integers(1, 40, 2).tolist()) for _ in range(5)]
    sizes += [sizes[0], Size(sizes[1].d_in, sizes[1].d_out)]
    most = int(2 ** random.integers(0, 8) - 1)
    own: dict[str, list[torch.Tensor]] = {"u": [], "v": [], "scale": []}
    for size in sizes:
        rank = int(random.integers(0, 4))
        for suffix, shape in (("u", (rank, size.d_out)), ("v", (rank, size.d_in))):
            own[suffix].append(torch.from_numpy(random.integers(-most, most + 1, shape).astype(np.int8)))
        own["scale"].append(torch.zeros(rank, dtype=torch.int16))
    joined = {suffix: Joined.of(tensors) for suffix, tensors in own.items()}
    scheme = Coded()
    assert scheme.joined_bytes(joined, sizes) == PackedScheme.joined_bytes(scheme, joined, sizes)
