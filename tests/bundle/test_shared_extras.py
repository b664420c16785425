"""Equal extras of several adapters are stored once. A bundle of format 1 requires a feature that says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from testing import peft_fixtures as fixtures
from testing.broken import edit_manifest, reseal
from testing.random_bundle import ALIKE, EXTRA, OF_FORMAT_1, SKETCHES, make_bundle
from testing.reference_reader import ReferenceReader

from lorazip_core.base.errors import Unsupported
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.export.exporter import export
from lorazip_core.info import info
from lorazip_core.planning.options import CompressOptions
from lorazip_core.verify.run import verify

OLD = [sketch for sketch in ALIKE if sketch.scheme != "coded"]


@pytest.fixture(params=[1, 2])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_bundle(tmp_path, sketches=OLD if request.param == 1 else ALIKE, version=request.param)


@pytest.fixture
def of_format_1(tmp_path: Path) -> Path:
    return make_bundle(tmp_path, sketches=OLD, version=1)


def test_shared_extras_are_sound_and_true(bundle: Path) -> None:
    manifest = Bundle(bundle).manifest
    expected = {
        1: ["diag", "joint", "original", "shared-extras", "svd"],
        2: ["coded", "diag", "joint", "original", "svd"],
    }
    assert manifest.requires["read"] == expected[manifest.format_version]
    assert len({entry.extras for entry in manifest.adapters if entry.name in "adg"}) == 1
    assert len(list((bundle / "extras").iterdir())) == 2
    assert verify(bundle, against=bundle.with_name("originals")).findings == []


def test_a_shared_file_that_is_damaged_is_named_once(bundle: Path) -> None:
    (path,) = {str(entry.extras) for entry in Bundle(bundle).manifest.adapters if entry.name in "adg"}
    (bundle / path).write_bytes(b"nonsense")
    reseal(bundle)
    assert [(found.kind, found.path) for found in verify(bundle).findings] == [("unreadable", path)]


def test_each_owner_gets_them(bundle: Path, tmp_path: Path) -> None:
    export(bundle, tmp_path / "out")
    reference = ReferenceReader(bundle)
    for name in "adg":
        wanted = SKETCHES[0].extras[EXTRA]
        assert torch.equal(load_file(tmp_path / "out" / name / fixtures.WEIGHTS)[EXTRA], wanted)
        np.testing.assert_array_equal(reference.extras(name)[EXTRA], wanted)


def test_info_divides_them(bundle: Path) -> None:
    report = info(bundle)
    shared = (bundle / "manifest.json").stat().st_size + sum(cluster.bytes_basis for cluster in report.clusters)
    own = sum(adapter.bytes_own for adapter in report.adapters)
    assert 0 <= report.bytes_bundle - shared - own < 2 * len(ALIKE)


def test_without_the_feature_a_shared_file_of_format_1_has_two_owners(of_format_1: Path) -> None:
    edit_manifest(of_format_1, lambda fields: fields["requires"]["read"].remove("shared-extras"))
    assert {finding.kind for finding in verify(of_format_1).findings} == {"contradiction"}


def test_a_reader_that_does_not_know_the_feature_refuses_by_name(
    of_format_1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"read": {"joint", "diag", "svd", "original"}, "export": set[str]()}
    monkeypatch.setattr("lorazip_core.bundle.manifest.KNOWN_FEATURES", known)
    with pytest.raises(Unsupported, match="shared-extras"):
        Bundle(of_format_1)


def test_nothing_shared_requires_nothing(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, sketches=OF_FORMAT_1, version=1)
    assert "shared-extras" not in Bundle(bundle).manifest.requires["read"]


def test_compress_stores_equal_extras_once(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj"], "r": 2, "task_type": "SEQ_CLS"}
    for number in range(3):
        fixtures.save_adapter(tmp_path / "in" / f"a{number}", fixtures.llama_classifier(), seed=number, **fields)
    head = load_file(tmp_path / "in" / "a0" / fixtures.WEIGHTS)["base_model.model.score.weight"]
    fixtures.edit_weights(
        tmp_path / "in" / "a2", lambda tensors: tensors.update({"base_model.model.score.weight": head})
    )
    compress(tmp_path / "in", tmp_path / "bundle", CompressOptions(method="svd", rank=2))
    first, second, third = (entry.extras for entry in Bundle(tmp_path / "bundle").manifest.adapters)
    assert first == third != second
    assert len(list((tmp_path / "bundle" / "extras").iterdir())) == 2
    assert verify(tmp_path / "bundle", against=tmp_path / "in").findings == []
