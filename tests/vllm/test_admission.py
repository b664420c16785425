"""Which requests an engine is given, and what a bundle and its settings have to be. vLLM need not be there."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from testing.broken import edit_manifest

from lorazip_core.base.errors import BundleDamaged, LocalError, Unsupported
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.sample import sample_path
from lorazip_core.vllm.admission import Admission
from lorazip_core.vllm.servable import check_adapters
from lorazip_core.vllm.source import Settings, Source, settings, source_of

ONE, OTHER = "fv_capitalize", "fv_ag_news"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of one adapter, by another name."""
    root = tmp_path_factory.mktemp("other")
    shutil.copytree(sample_path() / ONE, root / "adapters" / "customer-7")
    compress(root / "adapters", root / "bundle", CompressOptions())
    return root / "bundle"


@pytest.fixture
def known(bundle: Path) -> Admission:
    found = settings({"lorazip": {"bundle": str(bundle)}})
    assert found is not None
    return Admission(found.source)


class Moved(NamedTuple):
    """What is known of a bundle that was moved since."""

    known: Admission
    before: Path
    now: Path


@pytest.fixture
def moved(bundle: Path, tmp_path: Path) -> Moved:
    place = shutil.copytree(bundle, tmp_path / "bundle")
    found = settings({"lorazip": {"bundle": str(place)}})
    assert found is not None
    known = Admission(found.source)
    return Moved(known, place, place.rename(tmp_path / "elsewhere"))


def request(name: str, adapter_id: int, path: str = "lorazip:") -> Any:
    return SimpleNamespace(lora_name=name, lora_int_id=adapter_id, lora_path=path, load_inplace=False)


class TestIdsOfWhatLeaves:
    def test_an_id_stands_for_nothing_else_until_its_adapter_is_gone(self, known: Admission) -> None:
        known.admit(request(OTHER, 7))
        known.removing(7)
        for name in (ONE, OTHER):
            with pytest.raises(ValueError, match="lora_int_id 7 is that of an adapter that is being removed"):
                known.admit(request(name, 7))
            with pytest.raises(ValueError, match="is being removed"):
                known.adding(request(name, 7))
        known.gone(7)
        known.admit(request(ONE, 7))

    def test_an_adapter_that_leaves_is_served_no_more_and_may_be_added_again(self, known: Admission) -> None:
        known.admit(request(OTHER, 7))
        known.removing(7)
        assert not known.serves(OTHER)
        with pytest.raises(ValueError, match="was removed"):
            known.admit(request(OTHER, 8))
        again = request(OTHER, 9)
        known.adding(again)
        known.added(again)
        known.gone(7)
        known.admit(request(OTHER, 9))
        assert known.serves(OTHER)

    def test_an_id_that_nobody_knows_is_removed_without_a_trace(self, known: Admission) -> None:
        known.removing(3)
        known.gone(3)
        known.admit(request(ONE, 3))


class TestNamesThatAreNearlyThere:
    def test_of_a_request_the_bundle_has_the_likest(self, known: Admission, bundle: Path) -> None:
        line = f"^there is no adapter fv_capitalise in {bundle} \\(did you mean 'fv_capitalize'\\?\\)$"
        with pytest.raises(ValueError, match=line):
            known.admit(request("fv_capitalise", 7))
        with pytest.raises(ValueError, match=f"^there is no adapter other in {bundle}$"):
            known.admit(request("other", 7))

    def test_it_is_told_without_the_bundle(self, moved: Moved) -> None:
        """What is no ValueError would be taken for a fault of the engine."""
        with pytest.raises(ValueError, match="did you mean 'fv_capitalize'"):
            moved.known.admit(request("fv_capitalise", 7))

    def test_of_one_to_be_added_its_bundle_has_it(self, known: Admission, other: Path) -> None:
        with pytest.raises(ValueError, match=rf"no adapter customr-7 in {other} \(did you mean 'customer-7'\?\)$"):
            known.adding(request("customr-7", 7, str(other)))

    def test_of_a_server_what_is_held_just_now(self, known: Admission, other: Path) -> None:
        hint = " (did you mean 'customer-7'?)"
        assert known.hint("fv_capitalise") == " (did you mean 'fv_capitalize'?)"
        assert known.hint("customr-7") == known.hint("other") == ""
        added = request("customer-7", 7, str(other))
        known.adding(added)
        assert known.hint("customr-7") == ""
        known.added(added)
        assert known.hint("customr-7") == hint
        assert known.hint("customer-7") == ""  # nobody meant what was asked for
        known.removing(7)
        assert known.hint("customr-7") == ""
        known.gone(7)
        known.admit(request(ONE, 8))
        known.removing(8)
        assert ONE not in known.hint("fv_capitalise")


class TestSources:
    def test_a_path_is_that_of_a_bundle_or_of_one_that_is_known(self, bundle: Path) -> None:
        default = Source(Path("/elsewhere"), "0" * 16)
        digest = Bundle(bundle).digest[:16]
        assert source_of(str(bundle), default) == Source(bundle, digest)
        assert source_of(f"lorazip:{digest}:{bundle}", default) == Source(bundle, digest)
        assert source_of("lorazip:", default) == source_of("lorazip:anything", default) == default

    @pytest.mark.parametrize("digest", ["", "0", "0" * 15, "g" * 16, "0" * 17])
    def test_a_digest_has_all_its_digits(self, bundle: Path, digest: str) -> None:
        """Else any bundle that comes to lie there would be taken for the one that was asked for."""
        with pytest.raises(LocalError, match="is no digest of a bundle"):
            source_of(f"lorazip:{digest}:{bundle}", Source(bundle, "0" * 16))

    def test_a_bundle_is_the_same_one_wherever_it_lies(self, bundle: Path, tmp_path: Path) -> None:
        moved = shutil.copytree(bundle, tmp_path / "moved")
        found = source_of(str(moved), Source(bundle, Bundle(bundle).digest[:16]))
        assert found == Source(bundle, Bundle(bundle).digest[:16])
        assert found.bundle == moved  # where the other may be gone
        assert found != Source(moved, "0" * 16)

    def test_no_path_is_not_that_of_where_the_server_was_started(self, known: Admission) -> None:
        with pytest.raises(ValueError, match="adapter a: there is no path"):
            known.find("a", "")
        with pytest.raises(ValueError, match="there is no path"):
            known.admit(request("a", 7, ""))

    def test_what_is_held_needs_no_disk(self, moved: Moved) -> None:
        known, before, now = moved
        for number, name in enumerate((ONE, OTHER)):
            own = request(name, number, str(known.source))
            known.adding(own)
            known.added(own)
            known.admit(own)
        known.removing(0)
        known.gone(0)
        with pytest.raises(ValueError, match=f"adapter {ONE}: {before} is not a directory"):
            known.adding(request(ONE, 2, str(known.source)))
        again = request(ONE, 2, str(now))
        known.adding(again)
        known.added(again)
        assert known.serves(ONE)
        assert again.lora_path.endswith(str(now))

    def test_another_bundle_at_its_place_is_noticed(self, bundle: Path) -> None:
        with pytest.raises(LocalError, match="is another bundle now"):
            Source(bundle, "0" * 16).open()

    def test_a_manifest_that_contradicts_itself_is_damage(self, bundle: Path, tmp_path: Path) -> None:
        changed = shutil.copytree(bundle, tmp_path / "changed")
        edit_manifest(changed, lambda fields: fields["module_sets"].append(fields["module_sets"][0]))
        Bundle(changed)  # whose digest is right
        with pytest.raises(BundleDamaged, match="contradicts itself"):
            settings({"lorazip": {"bundle": str(changed)}})


class TestSettings:
    def test_of_an_engine(self, bundle: Path) -> None:
        found = settings({"lorazip": {"bundle": str(bundle), "spare": 3}, "other": 1})
        assert found == Settings(Source(bundle, Bundle(bundle).digest[:16]), 3)
        assert settings({"other": 1}) is settings({}) is settings(None) is None

    @pytest.mark.parametrize("spare", ["3", -1, 1.5, True, None])
    def test_spare_is_a_number(self, bundle: Path, spare: object) -> None:
        with pytest.raises(LocalError, match="not a number of adapters"):
            settings({"lorazip": {"bundle": str(bundle), "spare": spare}})


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("lm_head", "lm_head is the head of the model"),
        ("model.layers.0.mlp.experts.3.up_proj", "experts.3.up_proj is of an expert"),
    ],
)
def test_layers_that_vllm_computes_elsewhere_are_refused(bundle: Path, tmp_path: Path, module: str, why: str) -> None:
    changed = shutil.copytree(bundle, tmp_path / "changed")
    edit_manifest(changed, lambda fields: fields["modules"][0].update(name=module))
    check_adapters(Bundle(bundle))
    with pytest.raises(Unsupported, match=why):
        check_adapters(Bundle(changed))
