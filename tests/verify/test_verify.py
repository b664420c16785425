"""verify: damage, false claims, missing originals, gates."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import astuple
from safetensors.torch import load_file, save_file
from testing.broken import ALL, Broken, edit_manifest, find, flip, reseal, swap
from testing.random_bundle import EXTRA, MODULES, SKETCHES, as_json, make_bundle

from lorazip_core.base.errors import LocalError, Unsupported, UsageError
from lorazip_core.bundle import stored
from lorazip_core.verify import compare as originals
from lorazip_core.verify.run import VerifyReport, verify, verify_by_module


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("sound")).parent


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    """A copy to break: `bundle` and `originals`."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return tmp_path


def kinds(report: VerifyReport) -> set[str]:
    return {finding.kind for finding in report.findings}


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_a_sound_bundle_has_no_findings(tmp_path: Path, dtype: str) -> None:
    bundle = make_bundle(tmp_path, dtype=dtype)
    claimed, measured = verify(bundle), verify(bundle, against=tmp_path / "originals")
    assert (claimed.findings, measured.findings) == ([], [])
    assert (claimed.exit_code, measured.exit_code, measured.ok) == (0, 0, True)
    assert (claimed.errors_are, measured.errors_are) == ("claimed", "measured")
    for before, after in zip(claimed.adapters, measured.adapters, strict=True):
        assert before.squared_error is None
        assert after.squared_error == pytest.approx(before.claimed_squared_error, rel=1e-9, abs=1e-20)
        assert after.mean_module_squared_error == pytest.approx(before.mean_module_squared_error, rel=1e-9, abs=1e-20)
    assert astuple(claimed.summary) == pytest.approx(astuple(measured.summary))


@pytest.mark.parametrize("against", [False, True])
def test_each_step_takes_one_thread(root: Path, monkeypatch: pytest.MonkeyPatch, against: bool) -> None:
    """More of them wait for each other, longest on a machine that has other work."""
    seen = set()
    real = stored.finite
    monkeypatch.setattr(stored, "finite", lambda tensor: (seen.add(torch.get_num_threads()), real(tensor))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        verify(root / "bundle", against=root / "originals" if against else None)
        assert (seen, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def test_module_errors_are_those_of_the_report(root: Path) -> None:
    bundle = root / "bundle"
    assert verify_by_module(bundle).module_errors is None
    flip(bundle / "cores" / "000-001.safetensors")  # holds d alone
    report, errors = verify_by_module(bundle, against=root / "originals")
    assert report == verify(bundle, against=root / "originals")
    assert errors is not None
    assert errors.modules == [module.name for module in MODULES]
    measured = {adapter.name: adapter for adapter in report.adapters if adapter.squared_error is not None}
    assert errors.adapters == list(measured) == [sketch.name for sketch in SKETCHES if sketch.name != "d"]
    for name, row in zip(errors.adapters, errors.squared_errors, strict=True):
        sketch = next(sketch for sketch in SKETCHES if sketch.name == name)
        assert np.flatnonzero(~np.isnan(row)).tolist() == sketch.modules
        assert np.nanmean(row) == pytest.approx(measured[name].mean_module_squared_error, rel=1e-12)
        worst = measured[name].worst_module
        assert (worst is None) == sketch.zero
        if worst is None:
            assert np.nanmax(row) == 0
            continue
        assert row[errors.modules.index(worst.name)] == np.nanmax(row) == worst.squared_error


@pytest.mark.parametrize("broken", ALL, ids=lambda broken: broken.name)
def test_each_damage_gives_its_finding(root: Path, broken: Broken) -> None:
    broken.damage(root / "bundle")
    report = verify(root / "bundle")
    assert kinds(report) == broken.kinds
    assert all(finding.damage for finding in report.findings)
    assert report.exit_code == 4
    assert not report.ok
    assert as_json(verify(root / "bundle", against=root / "originals"))["ok"] is False


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("configs/a-*", b"{", "not the JSON of a configuration: Expecting"),
        ("extras/a-*", b"nonsense", "Error while deserializing header"),
        ("individual/g-*", b"nonsense", "Error while deserializing header"),
        ("manifest.json", b"{", "not the JSON of a manifest (restore the bundle"),
        ("manifest.json", None, "no such file: not a lorazip bundle"),
    ],
)
def test_a_finding_names_its_file_and_cause_once(root: Path, file: str, content: bytes | None, message: str) -> None:
    path = root / "bundle" / find(root / "bundle", file)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
        if file != "manifest.json":
            reseal(root / "bundle")
    (found,) = verify(root / "bundle").findings
    assert found.path == path.relative_to(root / "bundle").as_posix()
    assert found.message.startswith(message)
    assert path.name not in found.message
    assert "lorazip verify" not in found.message


def _corrupt(bundle: Path, rng: random.Random) -> str:
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    path = rng.choice(files)
    what = rng.choice(["flip", "flip", "flip", "truncate", "grow", "missing", "extra", "swap", "manifest"])
    match what:
        case "flip":
            flip(path, rng.randrange(path.stat().st_size), rng.randrange(8))
        case "truncate":
            os.truncate(path, rng.randrange(path.stat().st_size))
        case "grow":
            path.write_bytes(path.read_bytes() + bytes(rng.randrange(1, 9)))
        case "missing":
            path.unlink()
        case "extra":
            path.with_name(f"{rng.randrange(99)}-{path.name}").write_bytes(path.read_bytes())
        case "swap":
            other = rng.choice([other for other in files if other.read_bytes() != path.read_bytes()])
            swap(path, other)
        case "manifest":
            path = bundle / "manifest.json"
            text = path.read_text()
            digits = [i for i, character in enumerate(text) if character.isdigit()]
            position = rng.choice(digits)
            digit = rng.choice([d for d in "0123456789" if d != text[position]])
            path.write_text(text[:position] + digit + text[position + 1 :])
    return f"{what} {path.relative_to(bundle)}"


@pytest.mark.parametrize("seeds", [range(50), pytest.param(range(50, 250), marks=pytest.mark.slow)], ids=str)
def test_every_random_corruption_is_damage(sound: Path, tmp_path: Path, seeds: range) -> None:
    missed = []
    for seed in seeds:
        bundle = tmp_path / str(seed)
        shutil.copytree(sound / "bundle", bundle)
        done = _corrupt(bundle, random.Random(seed))
        if verify(bundle).exit_code != 4:
            missed.append((seed, done))
        shutil.rmtree(bundle)
    assert missed == []


@pytest.mark.parametrize("claim", ["squared_norm", "squared_error", "mean_module_squared_error", "worst_module"])
def test_every_false_claim_is_found(root: Path, claim: str) -> None:
    """Each claim of each adapter, made false with all digests right: without originals nobody can know."""
    bundle, factor = root / "bundle", 1.001
    for index, sketch in enumerate(SKETCHES):
        original = (bundle / "manifest.json").read_bytes()

        def lie(manifest: dict, index: int = index) -> None:
            adapter = manifest["adapters"][index]
            if claim == "worst_module":
                adapter[claim] = {"name": "layers.0.q_proj", "squared_error": 0.9999}
                if index in (4, 6):  # h does not have q_proj, and f has no other
                    adapter[claim]["name"] = ["layers.0.q_proj", "layers.0.conv"][index == 6]
            else:
                adapter[claim] = adapter[claim] * factor + 1e-6

        edit_manifest(bundle, lie)
        assert verify(bundle).ok
        report = verify(bundle, against=root / "originals")
        assert [(found.kind, found.adapter) for found in report.findings] == [("claim-differs", sketch.name)]
        assert claim in report.findings[0].message
        assert report.exit_code == 1
        (bundle / "manifest.json").write_bytes(original)


def test_claims_of_no_error_need_none(root: Path) -> None:
    edit_manifest(root / "bundle", lambda m: m["adapters"][0].update(worst_module=None))
    report = verify(root / "bundle", against=root / "originals")
    assert [(found.kind, found.adapter) for found in report.findings] == [("claim-differs", "a")]


def test_a_zero_adapter_has_no_worst_module(root: Path) -> None:
    """Bundles that name one all the same, with an error of 0, are no less sound."""
    zero = next(index for index, sketch in enumerate(SKETCHES) if sketch.zero)
    report = verify(root / "bundle", against=root / "originals")
    assert report.ok
    assert report.adapters[zero].worst_module is None
    module = MODULES[SKETCHES[zero].modules[0]].name
    edit_manifest(
        root / "bundle", lambda m: m["adapters"][zero].update(worst_module={"name": module, "squared_error": 0.0})
    )
    assert verify(root / "bundle", against=root / "originals").ok


def test_errors_at_the_rounding_of_float32_may_differ(root: Path) -> None:
    """The error of 'h', kept as it was, is 0; a claim of 1e-13 is no lie."""
    edit_manifest(root / "bundle", lambda m: m["adapters"][6].update(squared_error=1e-13))
    assert verify(root / "bundle", against=root / "originals").ok


def test_damage_leaves_the_errors_that_can_be_recomputed(root: Path) -> None:
    flip(root / "bundle" / "cores" / "000-001.safetensors")  # holds d alone
    report = verify(root / "bundle", against=root / "originals")
    assert report.exit_code == 4
    assert kinds(report) == {"wrong-digest"}
    assert {adapter.name for adapter in report.adapters if adapter.squared_error is None} == {"d"}
    assert report.adapters[2].worst_module is None
    assert report.summary is not None
    assert report.summary.mean_squared_error is not None


def _shift(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def _resave(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path)


def _nan(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)


def _retarget(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("org/base", "org/bass"))


def _fewer(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "conv" not in name}, path)


def _extra(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {EXTRA: torch.ones(2, 3)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (shutil.rmtree, {"source-missing"}),
        (lambda folder: os.truncate(folder / "adapter_model.safetensors", 50), {"source-unusable"}),
        (_shift, {"source-differs", "claim-differs", "extras-differ"}),
        (_resave, {"source-differs"}),
        (_nan, {"source-differs", "source-unusable", "extras-differ"}),
        (_retarget, {"source-differs", "base-model-differs", "config-differs"}),
        (_fewer, {"source-differs", "modules-differ"}),
        (_extra, {"source-differs", "extras-differ"}),
        (lambda folder: shutil.copytree(folder, folder.with_name("new")), {"source-unlisted"}),
        (lambda folder: shutil.copytree(folder, folder.with_name("bad")), set()),  # the manifest lists it as skipped
    ],
    ids=lambda value: "" if isinstance(value, set) else getattr(value, "__name__", ""),
)
def test_originals_that_are_not_what_they_were(root: Path, change: object, expected: set[str]) -> None:
    change(root / "originals" / "a")
    report = verify(root / "bundle", against=root / "originals")
    assert kinds(report) == expected
    assert {finding.adapter for finding in report.findings} <= {"a", "new"}
    assert report.exit_code == (1 if expected else 0)


@pytest.mark.parametrize("name", ["a", "g"])  # one has tensors that are no LoRA factors, which are read first
def test_an_original_cut_short_on_the_way_leaves_the_others(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = originals.open_collection

    def opened(folder: Path, **options: Any) -> object:
        collection = usual(folder, **options)
        os.truncate(folder / name / "adapter_model.safetensors", 1000)
        return collection

    monkeypatch.setattr(originals, "open_collection", opened)
    report = verify(root / "bundle", against=root / "originals")
    assert [(each.kind, each.adapter) for each in report.findings] == [("source-unusable", name)]
    assert "truncated" in report.findings[0].message
    assert {each.name for each in report.adapters if each.squared_error is None} == {name}


def test_some_adapters_are_compared_and_no_others(root: Path) -> None:
    """For whoever has the originals of a few; what is damaged is found all the same."""
    for name in ("a", "e", "f", "g", "h", "z", "zb"):
        shutil.rmtree(root / "originals" / name)
    report = verify(root / "bundle", against=root / "originals", adapters=["b*", "d", "za"], max_error=0.99)
    assert report.findings == []
    assert [adapter.name for adapter in report.adapters] == ["b/c", "d", "za"]
    assert all(adapter.squared_error is not None for adapter in report.adapters)
    assert report.summary is not None
    assert report.summary.max_squared_error == max(adapter.squared_error or 0 for adapter in report.adapters)
    report = verify(root / "bundle", against=root / "originals", adapters=["d", "e"])
    assert [(finding.kind, finding.adapter) for finding in report.findings] == [("source-missing", "e")]
    with pytest.raises(UsageError, match="no adapter 'y'"):
        verify(root / "bundle", against=root / "originals", adapters=["y"])
    with pytest.raises(UsageError, match="«adapters»"):
        verify(root / "bundle", adapters=["d"])
    flip(root / "bundle" / find(root / "bundle", "individual/g-*"))
    assert kinds(verify(root / "bundle", against=root / "originals", adapters=["d"])) == {"wrong-digest"}


def test_an_adapter_alone_has_the_name_that_the_bundle_has(root: Path) -> None:
    """That of its folder, where it was added; a dot, where the bundle was made from there."""
    folder = root / "originals" / "a"
    assert verify(root / "bundle", against=folder, adapters=["a"]).findings == []
    edit_manifest(root / "bundle", lambda fields: fields["adapters"][0].update(name="."))
    report = verify(root / "bundle", against=folder, adapters=["."])
    assert kinds(report) == set()


def test_a_folder_without_any_of_the_originals_is_one_finding(root: Path) -> None:
    (root / "empty").mkdir()
    report = verify(root / "bundle", against=root / "empty")
    assert [finding.kind for finding in report.findings] == ["source-missing"]
    assert report.summary is not None
    assert report.summary.max_squared_error is None


def test_names_that_are_no_text_can_be_reported(root: Path) -> None:
    shutil.copytree(root / "originals" / "d", os.fsdecode(bytes(root / "originals") + b"/\xff"))
    report = verify(root / "bundle", against=root / "originals")
    assert [(found.kind, found.adapter) for found in report.findings] == [("source-unlisted", r"\udcff")]
    assert as_json(report)["ok"] is False


def test_a_zero_adapter_that_is_not_stored_as_zero(root: Path) -> None:
    """Its error counts 0 by definition, so it has a finding of its own."""
    folder = root / "originals" / "d"
    path = folder / "adapter_model.safetensors"
    save_file({n: t * 0 if "lora_B" in n or "embedding_B" in n else t for n, t in load_file(path).items()}, path)
    report = verify(root / "bundle", against=root / "originals")
    assert "not-zero" in kinds(report)
    assert report.adapters[2].squared_error == 0


@pytest.mark.parametrize("against", [False, True])
def test_gates(root: Path, against: bool) -> None:
    originals = root / "originals" if against else None
    assert verify(root / "bundle", against=originals, max_error=0.99, max_mean_error=0.5).exit_code == 0
    report = verify(root / "bundle", against=originals, max_error=0.7)
    assert [(found.kind, found.adapter) for found in report.findings] == [("max-error", "e"), ("max-error", "f")]
    assert ("(measured)" if against else "(claimed)") in report.findings[0].message
    assert report.exit_code == 1
    report = verify(root / "bundle", against=originals, max_mean_error=0.4)
    assert [(found.kind, found.adapter) for found in report.findings] == [("max-mean-error", None)]


def test_a_gate_judges_what_was_measured_and_not_the_claim(root: Path) -> None:
    edit_manifest(root / "bundle", lambda m: m["adapters"][0].update(squared_error=0.0))
    assert kinds(verify(root / "bundle", max_error=0.99)) == set()
    edit_manifest(root / "bundle", lambda m: [adapter.update(squared_error=0.0) for adapter in m["adapters"]])
    assert verify(root / "bundle", max_error=0.1).ok
    assert {"max-error", "claim-differs"} == kinds(verify(root / "bundle", max_error=0.1, against=root / "originals"))


def test_what_is_refused(root: Path) -> None:
    for limit in (-0.1, float("nan")):
        with pytest.raises(UsageError, match="limit"):
            verify(root / "bundle", max_error=limit)
    with pytest.raises(UsageError, match="not a directory"):
        verify(root / "bundle", against=root / "nowhere")
    with pytest.raises(UsageError, match="not a directory"):
        verify(root / "nowhere")
    with pytest.raises(UsageError, match="«device» tpu"):
        verify(root / "bundle", device="tpu")
    with pytest.raises(LocalError, match="«device» cuda:99: not there"):
        verify(root / "bundle", device="cuda:99")
    edit_manifest(root / "bundle", lambda m: m["requires"]["read"].append("quaternions"))
    with pytest.raises(Unsupported, match="quaternions"):
        verify(root / "bundle")
    edit_manifest(root / "bundle", lambda m: m.update(format_version=3))
    with pytest.raises(Unsupported, match="format 3; this lorazip reads formats 1 and 2"):
        verify(root / "bundle")


def test_unknown_optional_fields_are_ignored(root: Path) -> None:
    edit_manifest(root / "bundle", lambda m: (m.update(later=1), m["adapters"][0].update(later="x")))
    assert verify(root / "bundle", against=root / "originals").ok
