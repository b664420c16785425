"""Whatever is wrong with a manifest whose digest is right: every command says so, and none stumbles over it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testing.broken import MANIFESTS, RESEALED, Broken, edit_manifest
from testing.random_bundle import make_bundle

from lorazip_cli.main import main
from lorazip_core.bundle.contradictions import contradictions
from lorazip_core.bundle.manifest import read_manifest

# What only shows in files that `info` does not open, and what `export` has no use for.
UNSEEN_BY_EXPORT = {
    "a tensor too many",
    "a core for a module that no adapter has",
    "a basis that is not orthogonal",
    "a basis a little too long",
    "diagonal columns too long",
}
CODES = {0, 1, 4, 5}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "bundle")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a failure on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("broken", [*MANIFESTS, *RESEALED], ids=lambda broken: broken.name)
def test_export_refuses_what_it_would_stumble_over(
    bundle: Path, tmp_path: Path, broken: Broken, capsys: pytest.CaptureFixture[str]
) -> None:
    broken.damage(bundle)
    for options in ([], ["--rank", "1"]):
        code = main(["export", str(bundle), "-o", str(tmp_path / "out"), *options])
        if broken.name in UNSEEN_BY_EXPORT:
            assert code == 0
            shutil.rmtree(tmp_path / "out")
            continue
        assert code == 4
        assert said(capsys).startswith(f"lorazip: error: {bundle}")
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("broken", MANIFESTS, ids=lambda broken: broken.name)
def test_info_names_what_contradicts(bundle: Path, broken: Broken, capsys: pytest.CaptureFixture[str]) -> None:
    broken.damage(bundle)
    code = main(["info", str(bundle)])
    if not broken.kinds & {"manifest", "contradiction"}:  # what only the files tell
        assert code == 0
        return
    assert code == 4
    line = said(capsys)
    if "contradiction" in broken.kinds:
        first = next(contradictions(read_manifest(bundle, ())))
        assert line.startswith(f"lorazip: error: {bundle / 'manifest.json'} contradicts itself: {first}")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["modules"].append(m["modules"][0]), "two modules are named embed"),
        (lambda m: m["module_sets"].__setitem__(0, []), "module set 0 is empty, and "),
        (lambda m: m["modules"][2].update(kernel=[2]), "module layers.0.q_proj: kind, kernel and d_in do not fit"),
        (lambda m: m["adapters"][0].update(name="../a"), "adapter '../a': the name is no path below a folder"),
    ],
)
def test_the_line_names_it(bundle: Path, edit: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(bundle, edit)
    for command in (["info", str(bundle)], ["export", str(bundle), "-o", str(bundle.with_name("out"))]):
        assert main(command) == 4
        assert f"contradicts itself: {message}" in said(capsys)
    assert main(["verify", str(bundle)]) == 4


def test_the_first_of_many_and_their_number(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(bundle, lambda m: m.update(requires={}))
    assert main(["info", str(bundle)]) == 4
    assert "the kind embedding is in use, but not required to export, and 8 more (restore" in said(capsys)


def test_an_error_that_no_number_holds_is_left_out(bundle: Path, tmp_path: Path) -> None:
    """Claims are taken as they are, however small or large."""
    edit_manifest(bundle, lambda m: [a.update(squared_norm=5e-324, squared_error=1e308) for a in m["adapters"]])
    assert main(["export", str(bundle), "-o", str(tmp_path / "out"), "--rank", "1", "--json"]) == 0
    adapters = json.loads((tmp_path / "out" / "export.json").read_text())["adapters"]
    assert {adapter["squared_error_bound"] for adapter in adapters if adapter["name"] != "z"} == {None}


class TestUnknownMethod:
    """Of parameters only the dtype matters to a reader."""

    @pytest.fixture
    def newer(self, bundle: Path) -> Path:
        edit_manifest(bundle, lambda m: m["parameters"].update(method="tensor_ring"))
        return bundle

    def test_is_read_where_every_scheme_is_known(
        self, newer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["info", str(newer)]) == 0
        assert "method       tensor_ring, rank 10" in capsys.readouterr().out
        assert main(["info", str(newer), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["parameters"]["method"] == "tensor_ring"
        page = tmp_path / "page.html"
        assert main(["verify", str(newer), "--report", str(page)]) == 0
        assert "tensor_ring" in page.read_text()
        assert "--max-error" in capsys.readouterr().err  # the sample of errors is warned of, whatever the method
        assert main(["export", str(newer), "-o", str(tmp_path / "out")]) == 0

    @pytest.mark.parametrize("value", [None, 1, ["joint"], {}, True])
    def test_but_not_what_is_no_name(self, bundle: Path, value: object) -> None:
        edit_manifest(bundle, lambda m: m["parameters"].update(method=value))
        assert main(["info", str(bundle)]) == 4
        assert main(["verify", str(bundle)]) == 4
        assert main(["export", str(bundle), "-o", str(bundle.with_name("out"))]) == 4

    def test_nor_an_unknown_scheme(self, newer: Path) -> None:
        edit_manifest(newer, lambda m: m["adapters"][0].update(scheme="tensor_ring"))
        assert main(["info", str(newer)]) == 4
        edit_manifest(newer, lambda m: m["requires"]["read"].append("tensor_ring"))
        assert main(["info", str(newer)]) == 5


Place = tuple[str | int, ...]


def places(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Everything in a manifest, and where."""
    if place:
        yield place, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*place, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from places(item, (*place, number))


def damages(value: Any) -> Iterator[tuple[str, Any]]:
    """Other values in place of one."""
    yield from {
        "null": None,
        "-1": -1,
        "0": 0,
        "1": 1,
        "99": 99,
        "1e30": 10**30,
        "1.5": 1.5,
        "1e308": 1e308,
        "text": "zip",
        "no text": "",
        "[]": [],
        "{}": {},
        "[0, 0]": [0, 0],
    }.items()
    if isinstance(value, list) and value:
        yield from {"twice": [*value, value[0]], "backwards": value[::-1], "less": value[1:]}.items()
    if isinstance(value, int):
        yield from {"more": value + 1, "less": value - 1}.items()


def edited(fields: dict[str, Any], place: Place, *value: Any) -> dict[str, Any]:
    """A copy with another value at a place, or with none."""
    changed = copy.deepcopy(fields)
    at: Any = changed
    for key in place[:-1]:
        at = at[key]
    if value:
        at[place[-1]] = value[0]
    else:
        del at[place[-1]]
    return changed


def every_damage(fields: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of the items of a list, the first of each type stands for the others."""
    seen = set()
    for place, value in places(fields):
        kind = tuple("*" if isinstance(key, int) else key for key in place)
        name = ".".join(map(str, place))
        if (kind, type(value)) not in seen:
            seen.add((kind, type(value)))
            yield f"{name} is missing", edited(fields, place)
            for what, other in damages(value):
                yield f"{name}: {what}", edited(fields, place, other)


@pytest.mark.slow
def test_no_damage_to_any_field_is_a_bug(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each field of each kind of entry, missing or of another value, with the digest made right again."""
    manifest = bundle / "manifest.json"
    original = manifest.read_bytes()
    fields = json.loads(original)
    del fields["manifest_sha256"]
    out, wrong, tried = tmp_path / "out", [], 0
    for name, changed in every_damage(fields):
        manifest.write_bytes(original)
        edit_manifest(bundle, lambda m, changed=changed: (m.clear(), m.update(changed)))  # type: ignore[misc]
        info, verify = main(["info", str(bundle), "--json"]), main(["verify", str(bundle), "--json"])
        export = main(["export", str(bundle), "-o", str(out)])
        tried += 1
        written = capsys.readouterr().err
        codes = {info, verify, export}
        if not codes <= CODES or "Traceback" in written or (verify == 0 and codes != {0}):
            wrong.append((name, info, verify, export))
        if export and [path.name for path in tmp_path.iterdir()] != ["bundle"]:
            wrong.append((name, "left something"))
        shutil.rmtree(out, ignore_errors=True)
    assert wrong == []
    assert tried > 700
