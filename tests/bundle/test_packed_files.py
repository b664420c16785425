"""Files in which several adapters are packed: what damage does to those who read them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.broken import PACKS, Broken, reseal
from testing.random_bundle import PACKED, SKETCHES, make_bundle
from testing.reference_reader import DamagedError, ReferenceReader

from lorazip_cli.main import main
from lorazip_core.base.errors import BundleDamaged, LocalError
from lorazip_core.bundle import reader
from lorazip_core.bundle.reader import Bundle
from lorazip_core.verify.run import verify

HARMLESS = {"wrong-rank", "unexpected-tensor"}
"""What is wrong without being in the way of those who decode."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sketches = [sketch for sketch in SKETCHES if sketch.scheme == "coded" or sketch.name in "abcdefghz"]
    return make_bundle(tmp_path_factory.mktemp("sound"), sketches=sketches)


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("broken", PACKS, ids=lambda broken: broken.name)
def test_nobody_crashes(bundle: Path, broken: Broken, capsys: pytest.CaptureFixture[str]) -> None:
    broken.damage(bundle)
    out = bundle.with_name("out")
    code = main(["export", str(bundle), "-o", str(out), "--adapter", "za", "-q"])
    told = capsys.readouterr().err
    if broken.kinds <= HARMLESS:
        assert (code, out.exists()) == (0, True)
    elif "beyond all sizes" in broken.name:
        assert (code, out.exists()) == (LocalError.exit_code, False)  # no disk is that large
    else:
        assert (code, out.exists()) == (BundleDamaged.exit_code, False)
        assert PACKED in told
    assert main(["info", str(bundle), "-q"]) == 0
    capsys.readouterr()
    assert main(["verify", str(bundle), "--json", "-q"]) == BundleDamaged.exit_code
    report = json.loads(capsys.readouterr().out)
    assert {finding["path"] for finding in report["findings"]} >= {PACKED}
    if not broken.kinds <= HARMLESS and "size" not in broken.name:
        assert (
            main(["export", str(bundle), "-o", str(out), "--adapter", "a", "--adapter", "g", "-q"]) == 0
        )  # the others


@pytest.mark.parametrize("broken", PACKS, ids=lambda broken: broken.name)
def test_the_reader_of_the_specification_refuses_the_same(bundle: Path, broken: Broken) -> None:
    if broken.kinds != {"unreadable"} or "none" in broken.name:
        pytest.skip("of what a tensor is like, or who else has it, it takes no notice")
    broken.damage(bundle)
    with pytest.raises(DamagedError):
        ReferenceReader(bundle).update("za", "embed")


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_named_or_decodes(bundle: Path, seed: int) -> None:
    """With sizes and digests made right again, as no accident would."""
    rng = random.Random(seed)
    tensors = load_file(bundle / PACKED)
    name = rng.choice(["index", "codes", "kinds"])
    data = bytearray(tensors[name].numpy().tobytes())
    for _ in range(rng.choice([1, 1, 3])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    tensors[name] = torch.frombuffer(data, dtype=torch.uint8).clone()
    save_file(tensors, bundle / PACKED)
    reseal(bundle)
    report = verify(bundle)
    assert {finding.path for finding in report.findings} <= {PACKED}
    opened = Bundle(bundle)
    for adapter in opened.packed_in(PACKED):
        if any(finding.kind == "unreadable" for finding in report.findings):
            with pytest.raises(BundleDamaged, match=PACKED):
                opened.unpacked(adapter)
        else:
            for module in opened.modules(adapter):
                own = opened.own(adapter, module.name)
                assert own["u"].shape == (len(own["scale"]), module.d_out)
                assert own["v"].shape == (len(own["scale"]), module.d_in)


def test_no_file_has_more_modules_than_it_may(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle(sound)
    modules = sum(len(opened.modules(adapter)) for adapter in opened.packed_in(PACKED))
    monkeypatch.setattr(reader, "PACKED_MODULES", modules)
    assert verify(sound).ok
    monkeypatch.setattr(reader, "PACKED_MODULES", modules - 1)
    [finding] = verify(sound).findings
    assert (finding.kind, finding.path) == ("unreadable", PACKED)


def test_a_file_of_several_is_unpacked_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[str] = []
    real = Bundle._unpack
    monkeypatch.setattr(Bundle, "_unpack", lambda self, path: (unpacked.append(path), real(self, path))[1])
    opened = Bundle(bundle)
    za, zb = opened.packed_in(PACKED)
    first = opened.own(za, "embed")
    assert opened.rank(za, "embed") == 4
    assert opened.rank(zb, "layers.0.v_proj") == 1  # it keeps nothing, and factors have a column at least
    assert unpacked == [PACKED]
    monkeypatch.setattr(reader, "_UNPACKED_BYTES", 0)  # the last one is kept all the same
    other = Bundle(bundle)
    for _ in range(2):
        assert all(torch.equal(first[suffix], tensor) for suffix, tensor in other.own(za, "embed").items())
    assert unpacked == [PACKED] * 2
