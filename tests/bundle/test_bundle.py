"""Format 2: what is written, read back by three readers, described and specified; and format 1, which is read too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import jsonschema
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from testing import schemas
from testing.broken import edit_manifest, flip
from testing.random_bundle import EXTRA, HUB, LOCAL, OF_FORMAT_1, SKETCHES, as_json, load_manifest, make_bundle
from testing.reference_reader import DamagedError, ReferenceReader

from lorazip_core.base.errors import BundleDamaged
from lorazip_core.bundle.decoder import decode
from lorazip_core.bundle.reader import Bundle
from lorazip_core.bundle.stored import finite
from lorazip_core.bundle.tensor_file import DTYPES
from lorazip_core.info import ResidentInfo, info
from lorazip_core.schemes.bases import orthonormality_tolerance
from lorazip_core.serving.resident import Resident
from lorazip_core.verify.run import verify

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["bf16", "f16", "f32"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp(request.param), dtype=request.param)


def test_the_reader_of_the_specification_agrees(path: Path) -> None:
    """Every update of every scheme, decoded by lorazip and by numpy from docs/format.md alone."""
    bundle, reference = Bundle(path), ReferenceReader(path)
    assert [adapter.name for adapter in bundle.manifest.adapters] == list(reference.adapters)
    for adapter in bundle.manifest.adapters:
        names = [module.name for module in bundle.modules(adapter)]
        assert names == reference.modules(adapter.name)
        for module in bundle.modules(adapter):
            name = module.name
            b, a = decode(bundle, adapter, module, torch.float64)
            np.testing.assert_allclose((b @ a).numpy(), reference.update(adapter.name, name), rtol=1e-12, atol=1e-12)
        assert bundle.config(adapter) == reference.config(adapter.name)
        extras, expected = bundle.extras(adapter), reference.extras(adapter.name)
        assert extras.keys() == expected.keys()
        for name in extras:
            np.testing.assert_array_equal(extras[name].double().numpy(), expected[name])


def test_what_is_the_default_is_left_out(path: Path) -> None:
    fields = load_manifest(path)
    assert [set(module) - {"name", "d_out", "d_in"} for module in fields["modules"]] == [
        {"kind"}, {"kind", "kernel"}, set(), set(),
    ]  # fmt: skip
    always = {"name", "scheme", "config", "files", "squared_norm", "squared_error", "mean_module_squared_error"}
    always |= {"worst_module"}
    named = {adapter["name"]: adapter.keys() - always for adapter in fields["adapters"]}
    assert named["z"] == {"cluster", "module_set"}
    assert named["za"] == {"rank", "individual"}
    assert named["a"] == {"cluster", "extras", "origin"}


def test_a_base_model_that_is_not_that_of_the_bundle(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    edit_manifest(
        bundle, lambda m: (m["adapters"][0].update(base_model="other"), m["adapters"][1].update(base_model=None))
    )
    opened, reference = Bundle(bundle), ReferenceReader(bundle)
    for adapter, expected in zip(opened.manifest.adapters, ["other", None, "org/base"], strict=False):
        assert opened.manifest.base_model_of(adapter) == reference.base_model(adapter.name) == expected


@pytest.mark.parametrize("version", [1, 2])
def test_files_that_an_adapter_was_read_from(tmp_path: Path, version: Literal[1, 2]) -> None:
    bundle = make_bundle(tmp_path, sketches=OF_FORMAT_1, version=version)
    opened, reference = Bundle(bundle), ReferenceReader(bundle)
    for adapter in opened.manifest.adapters:
        sources = opened.sources(adapter)
        assert [source.path for source in sources] == ["adapter_config.json", "adapter_model.safetensors"]
        assert reference.sources(adapter.name) == {source.path: source.sha256 for source in sources}
    assert verify(bundle, against=tmp_path / "originals").findings == []


def test_format_1_has_another_configuration_for_each(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, sketches=OF_FORMAT_1, version=1)
    assert len(list((bundle / "configs").iterdir())) == len(OF_FORMAT_1)

    def share(fields: dict) -> None:
        one, other = (adapter["config"] for adapter in fields["adapters"][:2])
        fields["adapters"][1]["config"] = one
        fields["files"] = [entry for entry in fields["files"] if entry["path"] != other]
        (bundle / other).unlink()

    edit_manifest(bundle, share)
    assert [found.message for found in verify(bundle).findings] == [
        f"{load_manifest(bundle)['adapters'][0]['config']} has two owners"
    ]


def test_rows_are_the_adapters_that_have_the_module(path: Path) -> None:
    bundle = Bundle(path)
    first, second = bundle.manifest.clusters[0].shards
    assert bundle.rows(first, "layers.0.q_proj") == {0: 0, 1: 1, 7: 2}
    assert bundle.rows(first, "embed") == {0: 0}
    assert bundle.rows(second, "embed") == {}
    assert bundle.tensor(first.path, "layers.0.v_proj.core").shape == (3, 8, 10)  # d_out = 8 caps R_U


def test_the_reference_reader_refuses_damage(tmp_path: Path) -> None:
    """Else its agreement would mean less."""
    bundle = make_bundle(tmp_path)
    flip(bundle / "bases" / "000.safetensors")
    with pytest.raises(DamagedError, match="digest"):
        ReferenceReader(bundle).update("a", "embed")
    flip(bundle / "manifest.json", 300)
    with pytest.raises((DamagedError, ValueError)):
        ReferenceReader(bundle)


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    one, two = make_bundle(tmp_path / "1"), make_bundle(tmp_path / "2")
    assert {p.relative_to(one): p.read_bytes() for p in one.rglob("*") if p.is_file()} == {
        p.relative_to(two): p.read_bytes() for p in two.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("shape", [(16, 16), (300, 64), (20000, 8)])
def test_rounded_bases_stay_within_the_tolerance(dtype: str, shape: tuple[int, int]) -> None:
    tolerance = orthonormality_tolerance(DTYPES[dtype])
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(shape, generator=generator)).Q
    rounded = basis.to(DTYPES[dtype]).double()
    off = (rounded.mT @ rounded - torch.eye(shape[1], dtype=torch.float64)).abs().max()
    assert off < tolerance
    assert tolerance < 0.01


def test_a_basis_that_rounds_one_way_needs_all_of_the_tolerance() -> None:
    """The worst case of the bound: nearly every entry lies in the middle between two numbers of bf16."""
    entry = 2**-6 * (1 + 2**-8)
    column = torch.full((4065, 1), entry, dtype=torch.float64)
    column[-1] = math.sqrt(1 - 4064 * entry**2)
    off = abs(column.to(torch.bfloat16).double().square().sum().item() - 1)
    tolerance = orthonormality_tolerance(torch.bfloat16)
    assert 0.98 * tolerance < off < tolerance


def test_info_describes_what_is_inside(path: Path) -> None:
    report = info(path)
    bundle = Bundle(path)
    assert report.modules == 4
    assert sum(shape.count for shape in report.shapes) == 4
    assert [cluster.adapters for cluster in report.clusters] == [4, 2]
    assert {adapter.name: adapter.rank for adapter in report.adapters} == {
        "a": 10, "b/c": 10, "d": 10, "e": 7, "f": 7, "g": 2, "h": None, "z": 10, "za": 4, "zb": 2,
    }  # fmt: skip
    shared = (path / "manifest.json").stat().st_size + sum(cluster.bytes_basis for cluster in report.clusters)
    own = sum(adapter.bytes_own for adapter in report.adapters)
    assert 0 <= report.bytes_bundle - shared - own < len(SKETCHES)  # shares of a shard are rounded down
    assert report.bytes_bundle == bundle.size_bytes == sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    assert [skipped.name for skipped in report.skipped] == ["bad"]
    assert [adapter.origin for adapter in report.adapters] == [HUB, LOCAL, *[None] * 8]


def test_info_of_what_a_device_holds(path: Path) -> None:
    report, without = info(path, resident=True), info(path)
    held = Resident.of(Bundle(path), torch.device("cpu"))
    own = [adapter.bytes_resident for adapter in report.adapters]
    assert own == held.own_bytes
    assert report.resident == ResidentInfo(held.nbytes, held.nbytes - sum(own), sum(own) / len(own), max(own))
    files = [load_file(path / cluster.basis) for cluster in Bundle(path).manifest.clusters]
    bases = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
    assert bases < report.resident.bytes_shared < bases + 500  # which adapter is where
    assert without.resident is None
    assert {adapter.bytes_resident for adapter in without.adapters} == {None}
    replaced = [msgspec.structs.replace(adapter, bytes_resident=None) for adapter in report.adapters]
    assert msgspec.structs.replace(report, resident=None, adapters=replaced) == without


def test_info_reads_no_tensors(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    before = info(bundle)
    for file in bundle.rglob("*.safetensors"):
        file.unlink()
    assert info(bundle) == before


def test_info_of_a_damaged_manifest(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    flip(bundle / "manifest.json", 300)
    with pytest.raises(BundleDamaged, match=r"digest|JSON"):
        info(bundle)


@pytest.mark.parametrize("name", schemas.TYPES)
def test_schemas_are_those_of_the_types(name: str) -> None:
    assert (schemas.FOLDER / f"{name}.json").read_text() == schemas.text(name), "run: python tests/testing/schemas.py"
    jsonschema.Draft202012Validator.check_schema(schemas.schema(name))


def test_what_is_written_is_valid(path: Path, tmp_path: Path) -> None:
    (tmp_path / "lost" / "bases").mkdir(parents=True)
    (tmp_path / "lost" / "bases" / "0.safetensors").touch()
    damaged = verify(tmp_path / "lost")  # a bundle without its manifest
    format_1 = make_bundle(tmp_path, sketches=OF_FORMAT_1, version=1)
    written = {
        "bundle-1": [json.loads((format_1 / "manifest.json").read_bytes())],
        "bundle-2": [json.loads((path / "manifest.json").read_bytes())],
        "info-1": [as_json(info(path)), as_json(info(path, resident=True))],
        "verify-1": [
            as_json(verify(path)),
            as_json(verify(path, against=path.parent / "originals", max_error=0.5)),
            as_json(damaged),
        ],
    }
    for name, documents in written.items():
        for document in documents:
            jsonschema.validate(document, schemas.schema(name))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bundle-1", lambda d: None),
        ("bundle-2", lambda d: d.pop("manifest_sha256")),
        ("bundle-2", lambda d: d.update(format_version=1)),
        ("bundle-2", lambda d: d["files"][0].update(path="/etc/passwd")),
        ("bundle-2", lambda d: d["adapters"][0].update(scheme="zip")),
        ("bundle-2", lambda d: d["adapters"][0]["origin"].update(commit="main")),
        ("bundle-2", lambda d: d["adapters"][0].pop("config")),
        ("info-1", lambda d: d.pop("schema")),
        ("info-1", lambda d: d["adapters"][0].pop("origin")),
        ("verify-1", lambda d: d.update(schema="lorazip.verify/2")),
        ("verify-1", lambda d: d["adapters"][0].pop("squared_error")),
    ],
)
def test_schemas_refuse_what_is_not(path: Path, name: str, change: object) -> None:
    document = {
        "bundle-1": lambda: json.loads((path / "manifest.json").read_bytes()),
        "bundle-2": lambda: json.loads((path / "manifest.json").read_bytes()),
        "info-1": lambda: as_json(info(path)),
        "verify-1": lambda: as_json(verify(path)),
    }[name]()
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schemas.schema(name))


def test_the_specification_names_every_field() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    fields = set()
    for name in ("bundle-1", "bundle-2"):
        definitions = schemas.schema(name)
        for definition in (definitions, *definitions["$defs"].values()):
            fields |= set(definition.get("properties", {}))
    assert [field for field in sorted(fields) if field not in text] == []


def test_extras_keep_their_dtype(path: Path) -> None:
    bundle = Bundle(path)
    extra = bundle.extras(bundle.manifest.adapters[6])[EXTRA]
    assert extra.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_large_numbers_are_finite_and_what_cancels_is_not(dtype: torch.dtype) -> None:
    largest = torch.full((3, 2), torch.finfo(dtype).max, dtype=dtype)  # of float64, the sum overflows
    assert finite(largest)
    for bad in (torch.nan, torch.inf, -torch.inf):
        largest[1, 1] = bad
        assert not finite(largest)
    assert not finite(torch.tensor([torch.inf, -torch.inf], dtype=dtype))
