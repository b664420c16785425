"""Singular values of a collection, and the steps that follow from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from testing import random_adapters as ra

from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.reader import open_adapter
from lorazip_core.base.device import CPU
from lorazip_core.base.progress import Silent
from lorazip_core.planning.spectra import Spectra
from lorazip_core.reading.scan import scan
from lorazip_core.schemes.coded import Coded
from lorazip_core.schemes.scheme import Counting
from lorazip_core.schemes.svd import Svd

COUNTING = Counting(2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("mixed"), ra.MIXED)


@pytest.fixture(scope="module", params=[True, False], ids=["while they are read", "read again"])
def spectra(root: Path, request: pytest.FixtureRequest) -> Spectra:
    collection = open_collection(root, allow_pickle=False, allow_mixed_base=False, skip_bad=False)
    scanned = scan(collection, skip_bad=False, advance=lambda done: None, singular=request.param)
    return Spectra.of(scanned, CPU, Silent())


def test_they_are_those_of_the_updates(root: Path, spectra: Spectra) -> None:
    names = sorted(
        (path.parent.relative_to(root).as_posix() for path in root.rglob("adapter_config.json")), key=str.encode
    )
    for number, name in enumerate(names):
        adapter = open_adapter(name, root / name)
        dense = [b.double() @ a.double() for b, a in (adapter.factors(module) for module in adapter.parts)]
        expected = torch.cat([torch.linalg.svdvals(each) for each in dense]).sort(descending=True).values
        found = torch.cat([block.s[block.adapters == number].reshape(-1) for block in spectra.blocks])
        found = found.sort(descending=True).values
        most = min(len(found), len(expected))  # there are min(d_out, d_in) of a matrix, and r of its factors
        torch.testing.assert_close(found[:most], expected[:most], rtol=1e-6, atol=1e-6 * float(expected[:1].sum()))
        assert float(spectra.energies[number]) == pytest.approx(float(expected.square().sum()), rel=1e-6)


@pytest.mark.parametrize("counting", [Counting(2), Counting(2, "resident")], ids=lambda counting: counting.objective)
@pytest.mark.parametrize("scheme", [Coded(), Svd()], ids=lambda scheme: scheme.name)
def test_steps_are_the_turning_points(spectra: Spectra, scheme: Coded | Svd, counting: Counting) -> None:
    def outlook(step: float) -> tuple[float, float]:
        found = spectra.outlook(scheme, step, counting)
        return float(found.bytes.sum()), float(found.squared_errors.mean())

    for step in (0.003, 0.02, 0.1):
        taken, lost = outlook(step)
        assert outlook(spectra.step_for_bytes(scheme, taken * 1.0001, counting))[0] <= taken * 1.0001
        assert outlook(spectra.step_for_bytes(scheme, taken * 1.0001, counting) / 1.01)[0] >= taken * 0.99
        if lost > 0:
            assert outlook(spectra.step_for_mean(scheme, lost, counting))[1] == pytest.approx(lost, rel=0.02)


def test_each_adapter_has_its_own_step(spectra: Spectra) -> None:
    steps = spectra.steps_for_each(Coded(), 0.1, COUNTING)
    errors = spectra.outlook(Coded(), steps, COUNTING).squared_errors[spectra.energies > 0]
    assert (errors <= 0.1).all()
    coarser = spectra.outlook(Coded(), steps * 1.01, COUNTING).squared_errors[spectra.energies > 0]
    assert (coarser > 0.1).all()
