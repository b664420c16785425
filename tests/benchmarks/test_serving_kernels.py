"""What can be tried of the benchmark without a GPU: layers are put together, and a step does what a store does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.sample import sample_path
from lorazip_core.serving.resident import Resident
from lorazip_core.serving.store import AdapterStore

pytest.importorskip("triton", reason="kernels are written in Triton")
sys.path.insert(0, str(Path(__file__).parent))

import serving_kernels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("kernels") / "bundle"
    compress(sample_path(), path, CompressOptions())
    return Bundle(path)


def test_modules_with_one_input_are_a_layer(bundle: Bundle) -> None:
    layers = serving_kernels.layers_of(bundle)
    assert sorted(each.module for layer in layers for each in layer.slices) == sorted(
        module.name for module in bundle.manifest.modules
    )
    for layer in layers:
        ends = [0]
        for each in layer.slices:
            assert each.column == ends[-1]
            ends.append(each.column + len(each.out))


def test_a_step_adds_what_adapters_add(bundle: Bundle) -> None:
    store = AdapterStore(bundle, serving_kernels.layers_of(bundle)[:2], device=CPU, dtype=torch.bfloat16)
    step = serving_kernels.Step(store, 20, 3, 0, CPU)
    step.adapters()
    resident = Resident.of(bundle, CPU)
    rows = torch.tensor([resident.rows[adapter.name] for adapter in bundle.manifest.adapters])[step.numbers]
    for layer in store.layers:
        x = step.inputs[len(layer.slices[0].taken)]
        for each in layer.slices:
            added = step.outputs[layer.name][:, each.column : each.column + len(each.out)]
            torch.testing.assert_close(added, resident.apply(each.module, x, rows))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_it_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert serving_kernels.main(["bundle"]) == 2
    assert capsys.readouterr().err == "there is no GPU\n"
