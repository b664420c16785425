"""What is replaced, where outputs may go, what a wrong path is told, and what is trouble of this machine."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import tempfile
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testing.random_adapters import plain, write_collection

from lorazip_cli import failures
from lorazip_cli.main import main
from lorazip_core.base import atomic, filesystem
from lorazip_core.base.atomic import atomic_directory, resumable_directory
from lorazip_core.base.filesystem import naming, tree
from lorazip_core.bundle.check import BESIDE
from lorazip_core.bundle.reader import Bundle
from lorazip_core.bundle.writer import not_of_bundle
from lorazip_core.export.exporter import not_of_export
from lorazip_core.export.size import export_bytes
from lorazip_core.verify.run import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that lorazip writes, and some things that it does not."""
    root = tmp_path_factory.mktemp("made")
    write_collection(root / "adapters", plain(3))
    for argv in (
        ["compress", root / "adapters", "-o", root / "bundle", "--rank", "4"],
        ["export", root / "bundle", "-o", root / "exported"],
        ["fetch", root / "adapters", "-o", root / "fetched"],
        ["cluster", root / "adapters", "-o", root / "clusters.json", "--clusters", "1", "--rank", "4"],
        ["verify", root / "bundle", "-o", root / "report.json"],
    ):
        assert main([*map(str, argv), "-q"]) == 0
    (root / "empty").mkdir()
    (root / "around").mkdir()
    shutil.copytree(root / "bundle", root / "around/bundle")
    (root / ".x.partial").mkdir()
    (root / ".x.partial/.lorazip").touch()
    (root / "web").mkdir()
    (root / "web/manifest.json").write_text('{"name": "app"}')
    (root / "notes").mkdir()
    (root / "notes/todo.txt").write_text("buy milk")
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def contents(root: Path) -> dict[str, bytes]:
    return {path: (root / path).read_bytes() for path in tree(root) if (root / path).is_file()}


def refused(argv: list[object], code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with ``code``, and its last line has ``told``."""
    assert main([*map(str, argv), "-q"]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert told in output.err.splitlines()[-1]


class TestForce:
    """--force replaces what lorazip wrote and nothing else."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda b: (b / "configs/prod.yaml").write_text("secret: 1"),
            lambda b: (b / "notes.txt").write_text("mine"),
            lambda b: (b / "README.md").write_text("# model card"),
            lambda b: (b / ".git").mkdir() or (b / ".git/HEAD").write_text("ref: refs/heads/main"),
            lambda b: (b / "bases").rename(b / "elsewhere"),
            lambda b: (b / "manifest.json").write_text('{"name": "app"}'),
            lambda b: (b / "manifest.json").write_bytes((b / "manifest.json").read_bytes()[:-9]),
            lambda b: (b / "manifest.json").unlink(),
            lambda b: (b / "bases").rename(b.parent / "x") and (b / "bases").symlink_to(b.parent / "x"),
        ],
        ids=["config", "note", "readme", "git", "folder", "web", "cut", "none", "link"],
    )
    def test_a_bundle_with_anything_else_stays(
        self, change: Callable[[Path], object], copy: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        change(copy / "bundle")
        before = contents(copy)
        argv = ["compress", copy / "adapters", "-o", copy / "bundle", "--force"]
        refused(argv, 6, "was not written by lorazip: ", capsys)
        assert contents(copy) == before

    def test_the_line_names_what_is_not_of_the_bundle(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (copy / "bundle/configs/prod.yaml").write_text("secret: 1")
        argv = ["compress", copy / "adapters", "-o", copy / "bundle", "--force"]
        refused(argv, 6, "manifest.json does not list configs/prod.yaml (remove it yourself", capsys)

    def test_a_folder_of_the_same_names_is_no_bundle(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (copy / "web/configs").mkdir()
        (copy / "web/configs/prod.yaml").write_text("secret: 1")
        refused(["compress", copy / "adapters", "-o", copy / "web", "--force"], 6, "not written by lorazip", capsys)
        assert (copy / "web/configs/prod.yaml").read_text() == "secret: 1"

    def test_a_damaged_bundle_is_replaced(self, copy: Path) -> None:
        shutil.rmtree(copy / "bundle/bases")
        (copy / "bundle/bases").mkdir()
        assert main(["compress", str(copy / "adapters"), "-o", str(copy / "bundle"), "--force", "-q"]) == 0
        assert verify(copy / "bundle").ok

    def test_an_export_with_anything_else_stays(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["export", copy / "bundle", "-o", copy / "exported", "--force"]
        (copy / "exported/t00/optimizer.pt").write_text("days of training")
        refused(argv, 6, "export.json does not name t00/optimizer.pt", capsys)
        (copy / "exported/t00/optimizer.pt").unlink()
        assert not_of_export(copy / "exported") is None
        (copy / "exported/export.json").write_text("{}")
        refused(argv, 6, "export.json is not that of an export", capsys)

    @pytest.mark.parametrize("name", ["bundle", "adapters", "verify.json", "thesis.tex"])
    def test_a_demo_with_anything_else_stays(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        demo = tmp_path / "demo"
        demo.mkdir()
        (demo / name).write_text("years of work")
        assert main(["demo", "-o", str(demo), "--force"]) == 6
        assert f"was not written by lorazip: {'a demo has no ' if name == 'thesis.tex' else ''}{name}" in (
            capsys.readouterr().err
        )
        assert [path.name for path in demo.iterdir()] == [name]

    @pytest.mark.parametrize("name", [".bundle.partial", ".bundle.old"])
    def test_hidden_folders_with_anything_else_stay(
        self, name: str, copy: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(copy / "bundle", copy / name)
        (copy / name / "configs/prod.yaml").write_text("secret: 1")
        argv = ["compress", copy / "adapters", "-o", copy / "bundle", "--force"]
        refused(argv, 6, f"{name} exists and was not written by lorazip", capsys)
        assert (copy / name / "configs/prod.yaml").is_file()

    def test_a_file_of_a_hidden_name_is_refused(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (copy / ".new.old").write_text("mine")
        refused(["compress", copy / "adapters", "-o", copy / "new"], 6, ".new.old exists and was not written", capsys)


class TestBeside:
    """What hosting and version control put beside a manifest is no damage, and not lorazip's to remove."""

    def test_is_no_damage(self, copy: Path) -> None:
        for name in BESIDE - {".git", ".cache"}:
            (copy / "bundle" / name).write_text("text")
        for name in (".git/refs", ".cache/huggingface"):
            (copy / "bundle" / name).mkdir(parents=True)
            (copy / "bundle" / name / "some").write_text("more")
        assert verify(copy / "bundle").ok

    @pytest.mark.parametrize("name", ["readme.txt", "configs/README.md", "bases/.git", ".github"])
    def test_nothing_else_is_ignored(self, name: str, copy: Path) -> None:
        (copy / "bundle" / name).write_text("text")
        assert [(found.kind, found.path) for found in verify(copy / "bundle").findings] == [("unlisted-file", name)]

    def test_a_sound_bundle_with_it_is_not_replaced(self, copy: Path) -> None:
        assert not_of_bundle(copy / "bundle") is None
        (copy / "bundle/.gitattributes").write_text("*.safetensors filter=lfs")
        assert not_of_bundle(copy / "bundle") == "manifest.json does not list .gitattributes"


VERBS = {
    "compress": lambda d, out: ["compress", d / "adapters", "-o", out, "--force"],
    "cluster": lambda d, out: ["cluster", d / "adapters", "-o", out, "--force"],
    "cluster --report": lambda d, out: ["cluster", d / "adapters", "-o", d / "new.json", "--report", out, "--force"],
    "compress --report": lambda d, out: ["compress", d / "adapters", "--dry-run", "--report", out, "--force"],
    "export": lambda d, out: ["export", d / "bundle", "-o", out, "--force"],
    "verify": lambda d, out: ["verify", d / "bundle", "--against", d / "adapters", "-o", out, "--force"],
    "verify --junit": lambda d, out: ["verify", d / "bundle", "--junit", out, "--force"],
    "verify --summary": lambda d, out: ["verify", d / "bundle", "--summary", out, "--force"],
    "demo": lambda d, out: ["demo", "-o", out],
}


class TestPlaces:
    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize(
        ("place", "told"),
        [
            ("bundle/out", "is inside the bundle"),
            ("bundle/bases/deep/out", "is inside the bundle"),
            ("around/bundle/out", "is inside the bundle"),
            ("adapters/t00/out", "is in the folder of an adapter"),
            ("adapters/t00/deep/out", "is in the folder of an adapter"),
            ("exported/t01/out", "is in the folder of an adapter"),
            ("link/out", "is inside the bundle"),
        ],
    )
    def test_bundles_and_adapters_are_no_places(
        self, verb: str, place: str, told: str, made: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if not (made / "link").is_symlink():
            (made / "link").symlink_to("bundle/bases")
        before = contents(made)
        refused(VERBS[verb](made, made / place), 2, told, capsys) if verb != "demo" else self.demo(made / place, told)
        assert contents(made) == before

    def demo(self, place: Path, told: str) -> None:
        assert main(["demo", "-o", str(place)]) == 2

    @pytest.mark.parametrize(
        ("verb", "place", "told"),
        [
            ("compress", "adapters", "is the input itself"),
            ("compress", "adapters/bundle", "is inside the input"),
            ("compress", "", "has the input"),
            ("cluster", "adapters/clusters.json", "is inside the input"),
            ("cluster --report", "adapters/page.html", "is inside the input"),
            ("compress --report", "adapters/page.html", "is inside the input"),
            ("verify", "adapters/report.json", "is inside the input"),
            ("export", "bundle", "is the input itself"),
            ("export", "", "has the input"),
        ],
    )
    def test_inputs_are_no_places(
        self, verb: str, place: str, told: str, made: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = contents(made)
        refused(VERBS[verb](made, made / place), 2, told, capsys)
        assert contents(made) == before

    def test_beside_the_inputs_is_a_place(self, copy: Path) -> None:
        assert main([*map(str, VERBS["compress"](copy, copy / "new")), "-q"]) == 0
        assert main([*map(str, VERBS["cluster"](copy, copy / "new.json")), "-q"]) == 0
        assert main([*map(str, VERBS["verify"](copy, copy / "report.json")), "-q"]) == 0  # a file is replaced


class TestKinds:
    """The wrong path: what it is, and which command takes it."""

    @pytest.mark.parametrize("verb", ["info", "verify", "export"])
    @pytest.mark.parametrize(
        ("path", "told"),
        [
            ("adapters", "is a directory of adapters, not a bundle ('lorazip compress"),
            ("adapters/t00", "is an adapter, not a bundle ('lorazip compress"),
            ("fetched", "is a directory of fetched adapters, not a bundle ('lorazip compress"),
            ("exported", "is a directory of exported adapters, not a bundle (name the bundle"),
            ("around", "is a directory with a bundle in it, not a bundle (name the bundle, "),
            ("bundle/bases", "is a folder of a bundle, not a bundle (name the bundle, "),
            ("bundle/manifest.json", "is a file of a bundle, not a bundle (name the bundle, "),
            ("adapters/t00/adapter_config.json", "is a file of an adapter, not a bundle"),
            ("clusters.json", "is a file of 'lorazip cluster', not a bundle"),
            ("report.json", "is a file of 'lorazip verify', not a bundle"),
            ("notes/todo.txt", "is a file, not a bundle"),
            (".x.partial", "is what an unfinished run has left, not a bundle (the same command goes on"),
            ("web", "is not a bundle: its manifest.json is not that of a bundle"),
            ("notes", "is not a bundle: it has no manifest.json (name a directory"),
            ("empty", "is not a bundle: it has no manifest.json (name a directory"),
            ("nowhere", "is not a directory"),
        ],
    )
    def test_instead_of_a_bundle(
        self, verb: str, path: str, told: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = [verb, str(made / path), *(["-o", str(tmp_path / "out")] if verb == "export" else [])]
        assert main(argv) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.parametrize("verb", ["compress", "compress --dry-run", "cluster", "verify --against"])
    @pytest.mark.parametrize(
        ("path", "told"),
        [
            ("bundle", "is a bundle, not a directory of adapters ('lorazip export"),
            ("bundle/manifest.json", "is a file of a bundle, not a directory of adapters"),
            ("adapters/t00/adapter_model.safetensors", "is a file of an adapter, not a directory of adapters"),
            ("clusters.json", "is a file of 'lorazip cluster', not a directory of adapters"),
            (".x.partial", "is what an unfinished run has left, not a directory of adapters"),
            ("empty", "is an empty directory: no adapters here ('lorazip fetch'"),
            ("nowhere", "is not a directory"),
        ],
    )
    def test_instead_of_adapters(
        self, verb: str, path: str, told: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if verb == "verify --against":
            argv = ["verify", str(made / "bundle"), "--against", str(made / path)]
        else:
            argv = [*verb.split(), str(made / path), "-o", str(tmp_path / "out.json")]
        if (verb, path) == ("verify --against", "empty"):  # a finding, as any other directory without the originals
            assert main(argv) == 1
            return
        assert main(argv) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.parametrize(
        ("path", "told"),
        [
            ("bundle", "it is a bundle (name the file that 'lorazip cluster' wrote)"),
            ("report.json", "a file of 'lorazip verify' (name the one that 'lorazip cluster' wrote)"),
            ("exported/export.json", "a file of 'lorazip export' (name"),
        ],
    )
    def test_instead_of_clusters(
        self, path: str, told: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = ["compress", made / "adapters", "-o", tmp_path / "out", "--clusters", made / path]
        refused(argv, 2, told, capsys)

    def test_a_bundle_without_its_manifest_is_damaged(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (copy / "bundle/manifest.json").unlink()
        assert main(["info", str(copy / "bundle")]) == 4
        assert main(["verify", str(copy / "bundle")]) == 4
        capsys.readouterr()


def as_nobody(work: Callable[[], int]) -> int:
    """What ``work`` returns in a process of a user who may not do everything."""
    if os.getuid():
        return work()
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; none of them is needed
        child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            code = work()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def owned(made: Path) -> Iterator[Path]:
    """A copy that belongs to nobody, where nobody can get at it."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "owned"
        shutil.copytree(made, root)
        if not os.getuid():
            for path in (root.parent, root, *root.rglob("*")):
                os.chown(path, 65534, 65534, follow_symlinks=False)
        yield root
        for folder, names, _ in os.walk(root.parent):
            for each in names:
                if not Path(folder, each).is_symlink():
                    Path(folder, each).chmod(0o700)


def lock_up(root: Path, mode: int = 0o222) -> None:
    """chmod -R a-w, or another mode taken away."""
    for path in (*root.rglob("*"), root):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~mode)


class TestPermissions:
    @pytest.mark.parametrize("verb", ["compress", "export"])
    def test_a_read_only_output_is_refused_before_the_work(
        self, verb: str, owned: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        output = owned / {"compress": "bundle", "export": "exported"}[verb]
        lock_up(output)
        argv = [*map(str, VERBS[verb](owned, output)), "-q"]
        assert as_nobody(lambda: main(argv)) == 8
        assert "is read-only and cannot be replaced (chmod -R u+w" in capfd.readouterr().err
        assert not [path.name for path in owned.iterdir() if path.name.startswith(f".{output.name}")]
        assert verify(owned / "bundle").ok

    def test_what_such_a_run_left_is_cleared_by_the_next(self, owned: Path) -> None:
        partial = owned / ".new.partial"
        shutil.copytree(owned / "bundle", partial)
        if not os.getuid():
            for path in (partial, *partial.rglob("*")):
                os.chown(path, 65534, 65534)
        lock_up(partial)

        def build() -> int:
            with atomic_directory(owned / "new", force=False, not_ours=not_of_bundle) as folder:
                (folder / "file").write_text("new")
            return 0

        assert as_nobody(build) == 0
        assert (owned / "new/file").is_file()
        assert not partial.exists()

    def test_an_old_output_that_cannot_be_removed_is_no_failure(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def locked(folder: Path) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

        (tmp_path / "out").mkdir()
        monkeypatch.setattr(atomic, "_remove", locked)
        with atomic_directory(tmp_path / "out", force=True, not_ours=lambda folder: None) as folder:
            (folder / "file").write_text("new")
        assert (tmp_path / "out/file").read_text() == "new"

    @pytest.mark.parametrize("path", ["manifest.json", "bases", "bases/*"])
    @pytest.mark.parametrize("verb", ["verify", "info"])
    def test_what_may_not_be_read_is_not_damaged(
        self, verb: str, path: str, owned: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (locked,) = (owned / "bundle").glob(path)
        locked.chmod(0)
        code = as_nobody(lambda: main([verb, str(owned / "bundle")]))
        if verb == "info" and path != "manifest.json":
            assert code == 0
            return
        assert code == 8
        assert f"{locked}: Permission denied (check the permissions)" in capfd.readouterr().err

    def test_a_failing_disk_is_not_damage(
        self, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr("lorazip_core.bundle.reader.sha256_stream", fail)
        assert main(["verify", str(made / "bundle")]) == 8
        assert ".safetensors: Input/output error" in capsys.readouterr().err

    @pytest.mark.parametrize("verb", ["compress", "export", "cluster"])
    def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
        self, verb: str, owned: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (owned / "empty").chmod(0o500)
        argv = [*map(str, VERBS[verb](owned, owned / "empty/out")), "-q"]
        assert as_nobody(lambda: main(argv)) == 8
        assert f"{owned}/empty: Permission denied" in capfd.readouterr().err


Usage = namedtuple("Usage", "total used free")


class TestSpace:
    @pytest.mark.parametrize("verb", ["compress", "export"])
    def test_is_compared_with_the_plan_before_the_work(
        self,
        verb: str,
        made: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(filesystem.shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 500))
        argv = VERBS[verb](made, tmp_path / "out")
        assert main([str(each) for each in argv]) == 8
        error = capsys.readouterr().err
        assert f"{tmp_path}: about " in error
        assert "bytes are needed, 500 bytes are free (free some space, or choose another -o)" in error
        assert "reading" not in error
        assert not list(tmp_path.iterdir())

    def test_what_an_interrupted_run_left_counts_as_free(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(filesystem.shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 5_000))
        (tmp_path / ".out.partial").mkdir()
        (tmp_path / ".out.partial/piece").write_bytes(bytes(6_000))
        filesystem.check_space(tmp_path / "out", 10_000)

    def test_a_file_system_that_does_not_tell_is_trusted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(filesystem.shutil, "disk_usage", lambda path: Usage(0, 0, 0))
        filesystem.check_space(tmp_path / "out", 10**9)

    def test_the_plan_of_an_export_is_about_what_it_takes(self, made: Path) -> None:
        bundle = Bundle(made / "bundle")
        planned = export_bytes(bundle, bundle.manifest.adapters, None, None)
        taken = sum(path.stat().st_size for path in (made / "exported").rglob("*.safetensors"))
        assert taken == pytest.approx(planned, rel=0.2)
        halved = export_bytes(bundle, bundle.manifest.adapters, 2, "f32")
        assert halved == pytest.approx(planned, rel=0.01)  # half the rank, twice the bytes of a number

    def test_a_disk_that_fills_up_is_named(self, tmp_path: Path) -> None:
        def full() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with (
            pytest.raises(OSError, match="No space") as caught,
            resumable_directory(tmp_path / "out", force=False, not_ours=not_of_bundle),
        ):
            full()
        assert caught.value.filename == str(tmp_path / "out")

    def test_what_safetensors_says_of_the_system_is_named(self, tmp_path: Path) -> None:
        from safetensors import SafetensorError

        with pytest.raises(OSError, match="No space") as caught, naming(tmp_path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
        with pytest.raises(SafetensorError), naming(tmp_path):
            raise SafetensorError("invalid header")


class TestStreams:
    @pytest.mark.parametrize(
        ("argv", "code"), [(["info", "nowhere"], 2), (["verify", "bundle", "--max-error", "0"], 1), (["info"], 2)]
    )
    def test_stderr_on_a_full_device_keeps_the_code(
        self, argv: list[str], code: int, made: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(made)
        with open("/dev/full", "w", encoding="utf-8", buffering=1) as full:
            monkeypatch.setattr(sys, "stderr", full)
            assert main(argv) == code

    @pytest.mark.parametrize("argv", [["info", "bundle"], ["info", "bundle", "--json"], ["--version"], ["--help"]])
    def test_stdout_on_a_full_device_is_local_trouble(
        self, argv: list[str], made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(made)
        with open("/dev/full", "w", encoding="utf-8") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert main(argv) == 8
        error = capsys.readouterr().err
        assert error == "lorazip: error: stdout: No space left on device (free some space)\n"


class TestMemory:
    def test_every_allocator_has_one_line(self) -> None:
        import numpy
        import torch

        def torch_cpu() -> object:
            return torch.empty(2**59, dtype=torch.uint8)

        def array() -> object:
            return numpy.empty(2**59, dtype=numpy.uint8)

        for allocate in (torch_cpu, array):
            with pytest.raises((RuntimeError, MemoryError)) as caught:
                allocate()
            failure = failures.explain(caught.value, ["compress"])
            assert failure is not None
            assert failure.exit_code == 8
            (line,) = failure.lines
            assert line.startswith("not enough memory: ")
            assert line.endswith(" more were asked for (close other programs, or bound what is taken with --memory)")

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError("std::bad_alloc"),
            RuntimeError("std::bad_alloc"),
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            RuntimeError("unable to mmap 80 bytes from file <x>: Cannot allocate memory (12)"),
        ],
        ids=repr,
    )
    def test_memory_of_the_machine(self, error: Exception) -> None:
        assert failures.explain(error, ["verify"]) == (["not enough memory (close other programs)"], 8)

    def test_memory_of_a_gpu(self) -> None:
        error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        assert failures.explain(error, ["compress"]) == (
            ["not enough memory on the GPU (bound what is taken with --device-memory, or choose --device cpu)"],
            8,
        )
