"""Many adapters and modules decoded together: the same factors as one by one, but for zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from testing import random_adapters as ra

from lorazip_core.adapter.collection import open_collection
from lorazip_core.bundle.decoder import Decoder, decode
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of which modules keep 0 to 4 components, some of one module and some of several sizes."""
    root = tmp_path_factory.mktemp("packed")
    recipes = (
        *ra.plain(5),
        *(ra.Recipe(f"u{rank}", rank, energy=4.0**-rank, own=0.1 * rank) for rank in (1, 2, 3)),
        ra.Recipe("v", 4, (ra.Q,)),
        ra.Recipe("z", 3, zero=True),
    )
    ra.write_collection(root / "adapters", recipes)
    compress(root / "adapters", root / "bundle", CompressOptions(method="coded", max_error=0.2))
    return root


@pytest.mark.parametrize("most", [1, 2**30])
def test_adapters_of_a_packed_file_are_padded(packed: Path, most: int) -> None:
    bundle = Bundle(packed / "bundle")
    by_name = {adapter.name: adapter for adapter in open_collection(packed / "adapters").adapters}
    entries = [entry for entry in bundle.manifest.adapters if len(bundle.modules(entry)) == 3]
    parts = list(by_name[entries[0].name].parts.values())
    decoder = Decoder(bundle, CPU, most)
    assert decoder.most_adapters(entries[0], parts) >= (len(entries) if most > 1 else 1)
    counts: set[tuple[int, int]] = set()
    covered: list[int] = []
    for columns, (b, a) in decoder.batches(entries, parts):
        covered += columns
        assert b.shape[:2] == a.shape[:2] == (len(entries), len(columns))
        for row, entry in enumerate(entries):
            for place, column in enumerate(columns):
                module = parts[column].module
                own = decode(bundle, entry, module, torch.float64)
                k = own[0].shape[1]
                counts.add((k, b.shape[-1]))
                # 2^x of several numbers at once may be rounded otherwise than that of one.
                torch.testing.assert_close(b[row, place, :, :k], own[0], rtol=1e-14, atol=0)
                assert a[row, place, :k].equal(own[1])
                assert not b[row, place, :, k:].any()
                assert not a[row, place, k:].any()
    assert sorted(covered) == [0, 1, 2]
    assert len({k for k, _ in counts}) > 1
    assert any(k < padded for k, padded in counts)


def test_an_adapter_that_is_all_zero_decodes_to_nothing(packed: Path) -> None:
    bundle = Bundle(packed / "bundle")
    (entry,) = [entry for entry in bundle.manifest.adapters if entry.name == "z"]
    parts = list(next(a for a in open_collection(packed / "adapters").adapters if a.name == "z").parts.values())
    assert entry.scheme == "coded"
    for _, (b, a) in Decoder(bundle, CPU, 2**30).batches([entry], parts):
        assert not (b @ a).any()
