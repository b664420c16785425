"""When a bundle had better be compressed anew: said in time, and not of every odd adapter."""

from __future__ import annotations

import msgspec
import pytest
from testing.random_bundle import make_bundle

from lorazip_core.bundle.manifest import AdapterEntry, Manifest
from lorazip_core.bundle.reader import Bundle
from lorazip_core.bundle.refit import reasons_to_refit


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Bundle(make_bundle(tmp_path_factory.mktemp("refit"))).manifest


def of(manifest: Manifest, fitted: float, added: list[float | None]) -> Manifest:
    """With one adapter of an error ``fitted`` in cluster 0, and those with these errors added there; None: alone."""
    joint = next(each for each in manifest.adapters if each.cluster == 0)
    alone = next(each for each in manifest.adapters if each.cluster is None)
    made: list[AdapterEntry] = [msgspec.structs.replace(joint, squared_error=fitted)]
    for error in added:
        like = alone if error is None else joint
        made.append(msgspec.structs.replace(like, added=True, squared_error=0.1 if error is None else error))
    return msgspec.structs.replace(manifest, adapters=made)


def test_nothing_is_said_of_a_bundle_that_nobody_joined(manifest: Manifest) -> None:
    assert reasons_to_refit(manifest) == []


def test_many_that_no_basis_serves_are_a_reason(manifest: Manifest) -> None:
    [reason] = reasons_to_refit(of(manifest, 0.2, [None] * 8 + [0.2] * 24))
    assert reason.startswith("8 of 32 adapters that were added fit none of the shared bases")
    assert reasons_to_refit(of(manifest, 0.2, [None] * 7)) == []  # too few for a basis
    assert reasons_to_refit(of(manifest, 0.2, [None] * 8 + [0.2] * 25)) == []  # most are served


def test_errors_that_grow_are_a_reason(manifest: Manifest) -> None:
    [reason] = reasons_to_refit(of(manifest, 0.2, [0.3] * 8))
    assert "the 8 adapters that were added to cluster 0 lose 0.3000 on average" in reason
    assert "fitted to 0.2000" in reason
    assert reasons_to_refit(of(manifest, 0.2, [0.24] * 8)) == []
    assert reasons_to_refit(of(manifest, 0.2, [0.9] * 7)) == []


def test_of_adapters_on_their_own_nobody_can_say(manifest: Manifest) -> None:
    assert reasons_to_refit(msgspec.structs.replace(of(manifest, 0.2, [None] * 40), clusters=[])) == []
