"""Where adapters come from, from lorazip.lock through the manifest to `info` and the READMEs of exported adapters."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from markdown_it import MarkdownIt
from testing import peft_fixtures as fixtures
from testing import random_adapters as ra
from testing import schemas
from testing.broken import edit_manifest
from testing.made_up import HOSTILE
from testing.reference_reader import ReferenceReader

from lorazip_cli.main import main
from lorazip_core.adapter.lock import LOCK_NAME, Lock, LockedAdapter, LockedFile, Origin, encode_lock
from lorazip_core.base.digests import sha256_file
from lorazip_core.base.errors import AdapterErrors
from lorazip_core.base.filesystem import tree
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.export.exporter import export
from lorazip_core.planning.options import CompressOptions
from lorazip_core.verify.run import verify

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ORIGINS = {
    "alice/sql": Origin(
        repository="alice/loras", revision="main", commit=COMMIT, subfolder="sql tools/(v1)", license="apache-2.0"
    ),
    "alice/tiny": Origin(repository="alice/tiny", commit=COMMIT[::-1], license="apache-2.0"),
    "bob": Origin(directory="/home/bob/adapters", subfolder="best", license="mit"),
    "carol": Origin(repository="carol/x", commit=COMMIT),
}
STRANGER = "dave"  # which the lock does not name
NAMES = [*ORIGINS, STRANGER]
WEIGHTS = fixtures.WEIGHTS
SVD = CompressOptions(method="svd", rank=2)


def write_lock(root: Path, origins: dict[str, Origin]) -> None:
    """A lock of the adapters as they are below ``root``."""
    adapters = [
        LockedAdapter(
            name=name,
            origin=origin,
            base_model=ra.BASE,
            files=[
                LockedFile(path.name, path.stat().st_size, sha256_file(path))
                for path in sorted((root / name).iterdir())
            ],
        )
        for name, origin in origins.items()
    ]
    (root / LOCK_NAME).write_bytes(encode_lock(Lock(sources=[], adapters=adapters)))


def edit_lock(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads((root / LOCK_NAME).read_bytes())
    change(fields)
    (root / LOCK_NAME).write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = ra.write_collection(tmp_path_factory.mktemp("made") / "in", tuple(ra.Recipe(name, 3) for name in NAMES))
    write_lock(root, ORIGINS)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(made, tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture(scope="module")
def bundle(made: Path) -> Path:
    compress(made, made.with_name("bundle"), CompressOptions(rank=4, max_error=0.09))
    return made.with_name("bundle")


def run(command: str, root: Path, *more: str) -> int:
    """`compress` or `cluster` of ``root`` into its sister ``out``."""
    few = {"compress": ["--method", "svd", "--rank", "1"], "cluster": ["--clusters", "1", "--rank", "2"]}[command]
    return main([command, str(root), "-o", str(root.with_name("out")), "-q", *few, *more])


both = pytest.mark.parametrize("command", ["compress", "cluster"])


def change_config(folder: Path) -> None:
    """One byte more, and the same meaning."""
    file = folder / fixtures.CONFIG
    file.write_bytes(file.read_bytes() + b"\n")


def change_weights(folder: Path) -> None:
    """Other numbers, of the same size."""
    fixtures.edit_weights(folder, lambda tensors: next(iter(tensors.values())).add_(1))


class TestManifest:
    def test_has_the_origin_of_every_adapter_that_the_lock_names(self, made: Path, bundle: Path) -> None:
        manifest = Bundle(bundle).manifest
        assert {adapter.name: adapter.origin for adapter in manifest.adapters} == ORIGINS | {STRANGER: None}
        assert len({adapter.scheme for adapter in manifest.adapters}) == 2
        assert verify(bundle, against=made, max_error=0.09).findings == []

    def test_is_as_specified(self, bundle: Path) -> None:
        fields = json.loads((bundle / "manifest.json").read_bytes())
        jsonschema.validate(fields, schemas.schema("bundle-2"))
        assert fields["adapters"][0]["origin"] == {
            "repository": "alice/loras",
            "revision": "main",
            "commit": COMMIT,
            "subfolder": "sql tools/(v1)",
            "directory": None,
            "license": "apache-2.0",
        }
        assert "origin" not in fields["adapters"][-1]
        reader = ReferenceReader(bundle)
        assert all(reader.update(name, ra.Q.name).any() for name in NAMES)

    def test_an_origin_that_is_null_is_none(self, bundle: Path, tmp_path: Path) -> None:
        """Nobody writes it, but the specification allows it."""
        shutil.copytree(bundle, tmp_path / "bundle")
        edit_manifest(tmp_path / "bundle", lambda manifest: manifest["adapters"][0].update(origin=None))
        assert Bundle(tmp_path / "bundle").manifest.adapters[0].origin is None
        assert verify(tmp_path / "bundle").findings == []

    def test_without_a_lock_the_bytes_are_those_of_a_bundle_that_knows_no_origins(self, root: Path) -> None:
        with_lock, without = root.with_name("with"), root.with_name("without")
        compress(root, with_lock, SVD)
        (root / LOCK_NAME).unlink()
        compress(root, without, SVD)
        assert b"origin" not in (without / "manifest.json").read_bytes().replace(b"original", b"")
        for adapter in range(len(ORIGINS)):
            edit_manifest(with_lock, lambda manifest, n=adapter: manifest["adapters"][n].pop("origin"))
        files = list(tree(without))
        assert files == list(tree(with_lock))
        for file in files:
            assert (with_lock / file).read_bytes() == (without / file).read_bytes()

    def test_the_same_lock_gives_the_same_bytes(self, root: Path) -> None:
        for name in ("one", "two"):
            compress(root, root.with_name(name), SVD)
        manifests = [(root.with_name(name) / "manifest.json").read_bytes() for name in ("one", "two")]
        assert manifests[0] == manifests[1]

    def test_what_the_lock_may_have_besides(self, root: Path) -> None:
        """Fields from the future, adapters that are not there any more, and files that nobody reads."""

        def add(fields: dict[str, Any]) -> None:
            gone = fields["adapters"][0] | {"name": "zoe/gone"}
            fields["adapters"].append(gone)
            for place in (fields, *fields["adapters"], fields["adapters"][0]["origin"]):
                place["a_field_from_the_future"] = [1]

        edit_lock(root, add)
        (root / "alice/sql/README.md").write_text("edited")
        (root / "alice/tiny/README.md").unlink()
        (root / "bob/notes.txt").write_text("of my own")
        compress(root, root.with_name("out"), SVD)
        manifest = Bundle(root.with_name("out")).manifest
        assert {adapter.name: adapter.origin for adapter in manifest.adapters} == ORIGINS | {STRANGER: None}

    def test_a_lock_above_or_below_is_not_of_this_collection(self, root: Path) -> None:
        (root / "alice" / LOCK_NAME).write_text("nonsense")
        compress(root, root.with_name("out"), SVD)
        (root / LOCK_NAME).rename(root.with_name(LOCK_NAME))
        compress(root, root.with_name("out"), SVD, force=True)
        assert {adapter.origin for adapter in Bundle(root.with_name("out")).manifest.adapters} == {None}

    def test_shards_and_their_index_are_files_like_others(self, root: Path) -> None:
        fixtures.to_shards(root / "bob", 2)
        write_lock(root, ORIGINS)
        compress(root, root.with_name("out"), SVD)
        assert Bundle(root.with_name("out")).manifest.adapters[2].origin == ORIGINS["bob"]
        edit_lock(root, lambda lock: lock["adapters"][2].update(files=lock["adapters"][2]["files"][:-1]))
        with pytest.raises(AdapterErrors, match=rf"adapter 'bob': {WEIGHTS}\.index\.json is not in lorazip\.lock \("):
            compress(root, root.with_name("more"), SVD)


class TestOtherFiles:
    @both
    @pytest.mark.parametrize(
        ("change", "file"), [(change_config, "adapter_config.json"), (change_weights, "adapter_model.safetensors")]
    )
    def test_are_refused_by_name(
        self,
        root: Path,
        command: str,
        change: Callable[[Path], None],
        file: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        change(root / "alice/sql")
        change(root / STRANGER)  # of which nothing is known
        assert run(command, root) == 3
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.splitlines() == [
            f"lorazip: error: adapter 'alice/sql': {file} is not what lorazip.lock has"
            " (fetch again with --force, or remove lorazip.lock)",
            "lorazip: error: 1 adapter cannot be used (--skip-bad goes on without)",
        ]
        assert [path.name for path in root.parent.iterdir()] == ["in"]
        (root / LOCK_NAME).unlink()
        assert run(command, root) == 0

    @both
    def test_are_left_out_and_listed_if_asked(
        self, root: Path, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        change_weights(root / "alice/sql")
        edit_lock(root, lambda lock: lock["adapters"][2].update(files=[]))
        assert run(command, root, "--skip-bad", "--json") == 0
        hint = "(fetch again with --force, or remove lorazip.lock)"
        assert json.loads(capsys.readouterr().out)["skipped"] == [
            {"name": "alice/sql", "reason": f"adapter_model.safetensors is not what lorazip.lock has {hint}"},
            {"name": "bob", "reason": f"adapter_config.json is not in lorazip.lock {hint}"},
        ]
        out = root.with_name("out")
        if command == "cluster":
            assert sorted(json.loads(out.read_text())["assignment"]) == ["alice/tiny", "carol", STRANGER]
        else:
            origins = {adapter.name: adapter.origin for adapter in Bundle(out).manifest.adapters}
            assert origins == {"alice/tiny": ORIGINS["alice/tiny"], "carol": ORIGINS["carol"], STRANGER: None}

    def test_are_named_for_that_and_not_for_what_is_in_them(self, root: Path) -> None:
        fixtures.edit_weights(root / "bob", lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
        with pytest.raises(AdapterErrors, match=r"'bob': adapter_model\.safetensors is not what"):
            compress(root, root.with_name("out"), SVD)
        write_lock(root, ORIGINS)
        with pytest.raises(AdapterErrors, match=r"'bob': tensor .* has NaN"):
            compress(root, root.with_name("out"), SVD)

    def test_several_have_a_line_each(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in ("alice/tiny", "carol"):
            change_config(root / name)
        assert run("compress", root) == 3
        assert re.findall(r"adapter '([^']+)'", capsys.readouterr().err) == ["alice/tiny", "carol"]


@both
@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda lock: lock.clear(), 2, "not a lock of lorazip"),
        (lambda lock: lock.pop("adapters"), 2, "not a lock of lorazip"),
        (lambda lock: lock.update(schema="lorazip.lock/2"), 5, "lorazip.lock/2; this lorazip reads lorazip.lock/1"),
        (lambda lock: lock["adapters"][0].update(name="../x"), 2, "the name '../x' is no folder below it"),
        (lambda lock: lock["adapters"][0]["origin"].update(commit="x\ny"), 2, "not a lock of lorazip"),
        (None, 2, "not a lock of lorazip"),
    ],
)
def test_a_lock_that_is_none_costs_one_line(
    root: Path,
    command: str,
    change: Callable[[dict[str, Any]], Any] | None,
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if change is None:
        (root / LOCK_NAME).write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        edit_lock(root, change)
    assert run(command, root, "--skip-bad") == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"lorazip: error: {root / LOCK_NAME}: {words}"[:200])
    assert output.err.count("\n") == 1
    assert [path.name for path in root.parent.iterdir()] == ["in"]


class TestInfo:
    def test_json(self, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", str(bundle), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        jsonschema.validate(report, schemas.schema("info-1"))
        origins = {adapter["name"]: adapter["origin"] for adapter in report["adapters"]}
        assert origins["alice/sql"] == {
            "repository": "alice/loras",
            "revision": "main",
            "commit": COMMIT,
            "subfolder": "sql tools/(v1)",
            "directory": None,
            "license": "apache-2.0",
        }
        assert (origins["bob"]["repository"], origins["bob"]["directory"]) == (None, "/home/bob/adapters")
        assert origins[STRANGER] is None

    def test_listing(self, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", str(bundle)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "licences     apache-2.0 (2), mit (1), unknown (2)" in lines
        (head,) = [line for line in lines if line.startswith("adapter ")]
        assert re.search(r"  its own  source +licence$", head)
        column = head.index("source")
        cells = {name: line[column:] for line in lines for name in NAMES if line.startswith(f"{name} ")}
        assert {name: re.split("  +", cell) for name, cell in cells.items()} == {
            "alice/sql": ["alice/loras/sql tools/(v1)@0123456", "apache-2.0"],
            "alice/tiny": ["alice/tiny@7654321", "apache-2.0"],
            "bob": ["/home/bob/adapters/best", "mit"],
            "carol": ["carol/x@0123456", "-"],
            STRANGER: ["-", "-"],
        }

    def test_listing_without_origins_is_what_it_was(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (root / LOCK_NAME).unlink()
        compress(root, root.with_name("out"), SVD)
        assert main(["info", str(root.with_name("out"))]) == 0
        out = capsys.readouterr().out
        assert "licence" not in out
        assert re.search(r"^adapter +kept as +modules  squared error +its own$", out, re.MULTILINE)

    def test_hostile_values_forge_no_lines(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_lock(root, {name: hostile("\n".join(HOSTILE)) for name in ORIGINS})
        compress(root, root.with_name("out"), SVD)
        assert main(["info", str(root.with_name("out"))]) == 0
        hostile_lines = capsys.readouterr().out.split("\n")
        write_lock(root, ORIGINS)
        compress(root, root.with_name("out"), SVD, force=True)
        assert main(["info", str(root.with_name("out"))]) == 0
        assert len(hostile_lines) == len(capsys.readouterr().out.split("\n"))
        assert all(line.isprintable() for line in hostile_lines)


def hostile(value: str, commit: str = COMMIT) -> Origin:
    return Origin(repository=value, revision=value, commit=commit, subfolder=value, directory=value, license=value)


def exported(root: Path) -> dict[str, str]:
    """The READMEs of what comes out of ``root`` and a bundle, by adapter."""
    bundle, out = root.with_name("bundle"), root.with_name("out")
    compress(root, bundle, SVD, force=True)
    export(bundle, out, force=True)
    return {name: (out / name / "README.md").read_text() for name in NAMES}


def front_matter(readme: str) -> dict[str, Any]:
    start, front, _ = readme.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front)


def origin_of(readme: str) -> str:
    """The paragraph below the heading "Origin"."""
    return readme.split("## Origin\n\n")[1].split("\n")[0]


class TestReadme:
    def test_names_and_links_the_origin(self, root: Path) -> None:
        readmes = exported(root)
        link = f"https://huggingface.co/alice/loras/tree/{COMMIT}/sql%20tools/%28v1%29"
        assert {name: origin_of(readme) for name, readme in readmes.items()} == {
            "alice/sql": f"The adapter `alice/sql` of [`alice/loras`]({link}) at commit `{COMMIT}`, folder"
            " `sql tools/(v1)`, read from these files. Its licence is that of the original adapter: `apache-2.0`.",
            "alice/tiny": "The adapter `alice/tiny` of"
            f" [`alice/tiny`](https://huggingface.co/alice/tiny/tree/{COMMIT[::-1]}) at commit `{COMMIT[::-1]}`, read"
            " from these files. Its licence is that of the original adapter: `apache-2.0`.",
            "bob": "The adapter `bob`, read from these files. Its licence is that of the original adapter: `mit`.",
            "carol": f"The adapter `carol` of [`carol/x`](https://huggingface.co/carol/x/tree/{COMMIT}) at commit"
            f" `{COMMIT}`, read from these files. Its licence is that of the original adapter.",
            STRANGER: "The adapter `dave`, read from these files. Its licence is that of the original adapter.",
        }
        usual = {"base_model": ra.BASE, "library_name": "peft", "tags": ["lora", "lorazip"]}
        assert {name: front_matter(readme) for name, readme in readmes.items()} == {
            "alice/sql": usual | {"license": "apache-2.0"},
            "alice/tiny": usual | {"license": "apache-2.0"},
            "bob": usual | {"license": "mit"},
            "carol": usual,
            STRANGER: usual,
        }

    def test_tells_nothing_of_local_directories(self, root: Path) -> None:
        """A model card is published; the path is nobody's business."""
        assert "home" not in exported(root)["bob"]

    def test_of_an_unknown_origin_is_what_it_was(self, root: Path) -> None:
        known = exported(root)
        (root / LOCK_NAME).unlink()
        for name, readme in exported(root).items():
            text = f"The adapter `{name}`, read from these files. Its licence is that of the original adapter."
            assert origin_of(readme) == text
            assert "license" not in front_matter(readme)
            without = re.sub(r"^license: .*\n", "", known[name], flags=re.MULTILINE)
            assert readme == without.replace(origin_of(known[name]), text)

    @pytest.mark.parametrize(
        "value", ["mit", "apache-2.0", "llama3.1", "openrail++", "0bsd", "no", "null", "1.0", "1e3", "2024-01-01"]
    )
    def test_a_licence_is_a_string_in_the_front_matter(self, root: Path, value: str) -> None:
        write_lock(root, {"bob": Origin(license=value)})
        readme = exported(root)["bob"]
        assert front_matter(readme)["license"] == value
        assert origin_of(readme).endswith(f": `{value}`.")

    def test_hostile_values_stay_in_their_place(self, root: Path) -> None:
        """Each value in every field at once: the front matter, the lines and what Markdown makes of them stay."""
        values = [
            *HOSTILE,
            "",
            " ",
            "`",
            "..",
            "a/../../datasets/x",
            'mit"\n---\n# Pwned',
            "mit\nbase_model: evil/model",
            "mit # x",
            "MIT",
            "[mit]",
            "&a",
            "!!python/object:os.system",
            "x" * 100,
            "a/b](https://evil.example) [c",
            "owner/repo?x=https://evil.example",
        ]
        usual = exported(root)
        expected = shape(usual[STRANGER])
        assert shape(usual["carol"]) - expected == {
            ("link_open", f"https://huggingface.co/carol/x/tree/{COMMIT}"),
            ("link_close", "a"),
        }
        for start in range(0, len(values), len(ORIGINS)):
            few = dict(zip(ORIGINS, values[start : start + len(ORIGINS)], strict=False))
            write_lock(root, {name: hostile(value) for name, value in few.items()})
            readmes = exported(root)
            for name, value in few.items():
                readme = readmes[name]
                licence = {"license": value} if value == "constructor" else {}  # it could be one
                assert front_matter(readme) == front_matter(usual[STRANGER]) | licence, value
                assert shape(readme) == expected, value
                body = readme.split("---\n", 2)[2]
                assert body.count("\n") == usual[STRANGER].split("---\n", 2)[2].count("\n"), value
                assert len(origin_of(readme).splitlines()) == 1, value

    @pytest.mark.parametrize("subfolder", ["../../../evil", "/evil", "a//b", "a\\b", "."])
    def test_a_folder_that_leads_elsewhere_is_not_in_the_link(self, root: Path, subfolder: str) -> None:
        write_lock(root, {"bob": Origin(repository="bob/x", commit=COMMIT, subfolder=subfolder)})
        text = origin_of(exported(root)["bob"])
        assert f"[`bob/x`](https://huggingface.co/bob/x/tree/{COMMIT}) at commit `{COMMIT}`, folder `" in text

    def test_blank_names_are_not_linked(self, root: Path) -> None:
        """Two ticks without anything between them would begin another code span, up to the next two."""
        write_lock(root, {"carol": Origin(repository=" ")})
        readmes = exported(root)
        assert "`carol` of ` `, read from these files." in origin_of(readmes["carol"])

    def test_without_a_commit_there_is_no_link(self, root: Path) -> None:
        write_lock(root, {"bob": Origin(repository="bob/x")})
        assert origin_of(exported(root)["bob"]).startswith("The adapter `bob` of `bob/x`, read from these files.")


def shape(readme: str) -> set[tuple[str, str]]:
    """What Markdown sees in a README besides its words: headings, tables, links, images, HTML and the like."""
    _, _, body = readme.split("---\n", 2)
    found = set()
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(body):
        found.add((token.type, token.tag))
        for child in token.children or []:
            found.add((child.type, str(child.attrGet("href") or child.tag)))
    return found
