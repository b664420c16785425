"""A bundle that lives: adapters come, are replaced and go, in any order, and it is sound and true all the time."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from testing import random_adapters as ra

from lorazip_core.bundle.changes import changes
from lorazip_core.bundle.decoder import decode
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.maintain.add import AddOptions, add
from lorazip_core.maintain.remove import remove
from lorazip_core.planning.options import CompressOptions
from lorazip_core.verify.run import verify

KINDS = (
    ra.Recipe("", 2),
    ra.Recipe("", 3, group=1),
    ra.Recipe("", 4, ra.EVERY_KIND),
    ra.Recipe("", 3, (ra.Q, ra.CONV)),
)
POOL = [
    replace(kind, name=f"{letter}{number}", own=0.2, extras={ra.HEAD: torch.ones(2, 3)} if letter == "c" else {})
    for letter in "abcd"
    for number, kind in enumerate(KINDS)
]
METHODS = {
    "joint": CompressOptions(method="joint", rank=8, clusters=2),
    "diag": CompressOptions(method="diag", rank=8, max_error=0.6),
    "coded": CompressOptions(),
    "svd": CompressOptions(method="svd", rank=1),
}


def write(originals: Path, recipe: ra.Recipe) -> Path:
    shutil.rmtree(originals / recipe.name, ignore_errors=True)
    return ra.write_collection(originals, (recipe,))


def decoded(bundle: Bundle) -> dict[str, list[torch.Tensor]]:
    return {
        adapter.name: [side for module in bundle.modules(adapter) for side in decode(bundle, adapter, module)]
        for adapter in bundle.manifest.adapters
    }


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_sound_and_true_after_every_step(method: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    originals, here = tmp_path / "originals", tmp_path / "0"
    there = rng.sample(POOL, 8)
    for recipe in there:
        write(originals, recipe)
    compress(originals, here, METHODS[method])
    for step in range(1, 7):
        before, following = Bundle(here), tmp_path / str(step)
        names = {recipe.name for recipe in there}
        if step % 2:
            coming = [replace(recipe, scale=3.0 + step) for recipe in rng.sample(POOL, 4)]
            for recipe in coming:
                write(originals, recipe)
                write(tmp_path / f"coming {step}", recipe)
            touched = {recipe.name for recipe in coming}
            add(here, tmp_path / f"coming {step}", following, AddOptions(replace=True))
            there = [recipe for recipe in there if recipe.name not in touched] + coming
            expected = (sorted(touched - names), [], sorted(touched & names))
        else:
            going = rng.sample(there, 3)
            touched = {recipe.name for recipe in going}
            for name in touched:
                shutil.rmtree(originals / name)
            remove(here, sorted(touched), following)
            there = [recipe for recipe in there if recipe.name not in touched]
            expected = ([], sorted(touched), [])
        after = Bundle(following)
        assert verify(following, against=originals).findings == []
        assert [adapter.name for adapter in after.manifest.adapters] == sorted(recipe.name for recipe in there)
        assert changes(before.manifest, after.manifest) == expected
        old, new = decoded(before), decoded(after)
        for name in names - touched:
            assert all(map(torch.equal, old[name], new[name])), name
        here = following
