"""The command line through `main(argv)`, and through a real process where streams, signals and start-up matter."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

import lorazip_core.info
from lorazip_cli import console, table
from lorazip_cli import main as main_module
from lorazip_cli.exit_codes import exit_codes, markdown_table
from lorazip_cli.help import TEXTS, usage
from lorazip_cli.main import app, main
from lorazip_cli.progress import Lines, progress
from lorazip_core.base.errors import AdapterError, AdapterErrors, BundleDamaged, LorazipError, Unsupported
from lorazip_core.base.stopping import check_stop
from lorazip_core.planning.options import CompressOptions
from lorazip_core.sample import sample_path
from lorazip_core.schemes.registry import SCHEMES, methods

COMMANDS = (
    "fetch",
    "cluster",
    "compress",
    "add",
    "remove",
    "verify",
    "export",
    "info",
    "serve",
    "calibrate",
    "demo",
)
DOCUMENT = Path(__file__).parents[2] / "docs" / "commands.md"
ANSI = "\x1b"


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters of the sample."""
    root = tmp_path_factory.mktemp("cli") / "adapters"
    for folder in sorted(sample_path().iterdir())[:3]:
        shutil.copytree(folder, root / folder.name)
    return root


@pytest.fixture(scope="session")
def bundle(adapters: Path) -> Path:
    path = adapters.with_name("bundle")
    assert main(["compress", str(adapters), "-o", str(path), "--rank", "4", "-q"]) == 0
    return path


def process(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorazip_cli", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )


class TestStart:
    def test_version_and_help_load_neither_torch_nor_rich(self) -> None:
        """In one process, since a module that is loaded stays so."""
        calls = [[], ["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
        code = (
            "import json, sys; from lorazip_cli.main import main\n"
            "for argv in json.loads(sys.argv[1]):\n"
            "    code, loaded = main(argv), {name.partition('.')[0] for name in sys.modules}\n"
            "    unwanted = {'torch', 'numpy', 'safetensors', 'huggingface_hub', 'rich'} & loaded\n"
            "    print('exit', code, sorted(unwanted), argv, file=sys.stderr)"
        )
        argv = [sys.executable, "-c", code, json.dumps(calls)]
        result = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert result.stderr.splitlines() == [f"exit 0 [] {call}" for call in calls]
        assert ANSI not in result.stdout

    def test_what_needs_no_tensor_is_answered_without_torch(self, bundle: Path, adapters: Path, tmp_path: Path) -> None:
        """By name and not by seconds; in one process, since a module that is loaded stays so."""
        damaged = tmp_path / "damaged"
        shutil.copytree(bundle, damaged)
        edit = (damaged / "manifest.json").read_bytes()
        (damaged / "manifest.json").write_bytes(edit.replace(b'"seed":0', b'"seed":1'))
        nowhere, new = str(tmp_path / "nowhere"), str(tmp_path / "new")
        a, b, d = str(adapters), str(bundle), str(damaged)
        calls = [
            (0, ["info", b]),
            (0, ["info", b, "--json", "-q"]),
            (2, ["info", nowhere]),
            (4, ["info", d]),
            (2, ["verify", nowhere]),
            (2, ["verify", b, "--against", nowhere]),
            (4, ["verify", d]),
            (4, ["verify", d, "--json", "--junit", str(tmp_path / "verify.xml")]),
            (2, ["export", nowhere, "-o", new]),
            (4, ["export", d, "-o", new]),
            (6, ["export", b, "-o", a]),
            (2, ["compress", nowhere, "-o", new]),
            (2, ["compress", nowhere, "--dry-run"]),
            (6, ["compress", a, "-o", b]),
            (2, ["compress", a, "-o", new, "--method", "svd", "--clusters", "2"]),
            (2, ["compress", a, "-o", new, "--max-error", "2"]),
            (2, ["add", nowhere, a, "-o", new]),
            (2, ["add", b, nowhere, "-o", new]),
            (2, ["add", b, a]),
            (4, ["add", d, a, "-o", new]),
            (6, ["add", b, a, "-o", d]),
            (2, ["remove", b, "nobody", "-o", new]),
            (2, ["remove", b, "nobody"]),
            (4, ["remove", d, "fv_ag_news", "-o", new]),
            (6, ["remove", b, "fv_ag_news", "-o", a]),
            (2, ["cluster", nowhere, "-o", new]),
            (2, ["cluster", a, "-o", str(tmp_path / "damaged" / "manifest.json")]),
            (6, ["demo", "-o", b]),
            (2, ["fetch", "-o", new]),
            (2, ["fetch", "owner/repo", "-o", new, "--locked", "--update"]),
            (2, ["verify", b, "--nothing"]),
            (2, ["verify", b, "--model", nowhere]),
            (2, ["verify", b, "--against", a, "--model", nowhere, "--rows", nowhere]),
            (2, ["calibrate", nowhere, nowhere, "-o", new]),
            (2, ["serve", nowhere, "--model", "owner/base"]),
            (2, ["info", b, "--gpu-memory", "80GiB"]),
        ]
        code = (
            "import json, sys; from lorazip_cli.main import main\n"
            "for argv in json.loads(sys.argv[1]):\n"
            "    print('exit', main(argv), sorted({'torch', 'safetensors.torch', 'huggingface_hub', 'rich'}"
            " & sys.modules.keys()), file=sys.stderr)"
        )
        argv = [sys.executable, "-c", code, json.dumps([argv for _, argv in calls])]
        result = subprocess.run(argv, capture_output=True, text=True, check=True)
        answers = [line for line in result.stderr.splitlines() if line.startswith("exit ")]
        assert answers == [f"exit {exit_code} []" for exit_code, _ in calls], result.stderr

    def test_alone_it_shows_its_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 0
        alone = capsys.readouterr()
        assert main(["-h"]) == 0
        assert alone == capsys.readouterr()
        assert alone.out.startswith("Usage: lorazip COMMAND [options]\n")
        assert alone.err == ""

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_has_examples_that_can_be_called_and_no_words_of_the_parser(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([name, "-h"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"Usage: {usage(name)}\n")
        assert not re.search(r"[{}<>]|RANGE|TEXT\.\.\.|9223372036854775807", out)
        assert 2 <= len(TEXTS[name].examples) <= 3
        for example in TEXTS[name].examples:
            assert f"\n  {example}\n" in out
            program, verb, *arguments = shlex.split(example)
            assert (program, verb) == ("lorazip", name)
            command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
            command.make_context(name, arguments)

    def test_completion_can_be_installed(self) -> None:
        assert main(["--show-completion", "bash"]) in (0, 1)  # 1 where Typer cannot tell the shell

    @pytest.mark.parametrize(
        ("words", "completed"),
        [
            ("lorazip compress --max-e", "--max-error\n"),
            ("lorazip compress --method ", "auto\nsvd\ncoded\njoint\ndiag\n"),
        ],
        ids=["option", "method"],
    )
    def test_completion_needs_no_torch(self, words: str, completed: str) -> None:
        code = "import sys; sys.modules['torch'] = None; from lorazip_cli.main import run; run()"
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "_LORAZIP_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(words.count(" ")),
            },
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, completed, "")

    def test_every_command_has_a_help_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        listing = capsys.readouterr().out
        assert all(re.search(rf"^  {name} +\w", listing, re.MULTILINE) for name in COMMANDS)
        assert "..." not in listing.partition("Commands:")[2]

    def test_a_locale_without_our_letters_is_no_failure(self) -> None:
        result = process("--help", PYTHONIOENCODING="ascii")
        assert (result.returncode, result.stderr) == (0, "")


class TestExitCodes:
    @pytest.mark.parametrize(
        "argv",
        [
            ["nothing"],
            ["compress"],
            ["compress", "DIR"],
            ["compress", "DIR", "-o", "B", "--rank", "0"],
            ["compress", "DIR", "-o", "B", "--rank", "few"],
            ["compress", "DIR", "-o", "B", "--seed", "-1"],
            ["compress", "DIR", "-o", "B", "--method", "magic"],
            ["compress", "DIR", "-o", "B", "--dtype", "int8"],
            ["compress", "DIR", "-o", "B", "--clusters", "0"],
            ["compress", "DIR", "-o", "B", "--clusters", "nowhere.json"],
            ["compress", "DIR", "-o", "B", "--max-error", "-0.1"],
            ["compress", "DIR", "-o", "B", "--max-error", "nan"],
            ["compress", "DIR", "-o", "B", "--device", "tpu"],
            ["compress", "DIR", "-o", "B"],
            ["verify", "NOWHERE"],
            ["verify", "B", "--max-error", "-1"],
            ["verify", "B", "--max-mean-error", "inf"],
            ["export", "B"],
            ["export", "B", "-o", "X", "--rank", "0"],
            ["export", "B", "-o", "X", "--format", "zip"],
            ["export", "B", "-o", "X", "--target", "toaster"],
            ["info", "NOWHERE", "--loud"],
        ],
        ids=" ".join,
    )
    def test_usage(
        self, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(argv) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("lorazip: error: ")
        assert output.err.count("\n") == 1
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (BundleDamaged("B: torn", "mend it"), 4, "B: torn (mend it)"),
            (Unsupported("format 2"), 5, "format 2"),
            (LorazipError, 70, "a bug in lorazip: "),
            (OSError(errno.ENOSPC, "No space left on device", "x"), 8, "x: No space left on device (free some space"),
            (PermissionError(errno.EACCES, "Permission denied", "x"), 8, "x: Permission denied (check the permiss"),
            (OSError(errno.EROFS, "Read-only file system", b"x"), 8, "x: Read-only file system (choose an -o"),
            (OSError(errno.EMFILE, "Too many open files"), 8, "Too many open files (raise the limit"),
            (OSError("strange"), 8, "strange"),
            (MemoryError(), 8, "not enough memory"),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), 8, "not enough memory"),
            (ZeroDivisionError("division\nby zero"), 70, "a bug in lorazip: ZeroDivisionError: division by zero"),
            (KeyboardInterrupt(), 130, "interrupted"),
        ],
        ids=repr,
    )
    def test_every_exception_has_a_code_and_one_line(
        self,
        error: BaseException | type[BaseException],
        code: int,
        line: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(path: Path, **asked: object) -> None:
            raise error

        monkeypatch.setattr(lorazip_core.info, "info", fail)
        assert main(["info", "B"]) == code
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith(f"lorazip: error: {line}")
        assert output.err.count("\n") == 1

    def test_out_of_gpu_memory_and_a_full_disk_below_safetensors(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import torch
        from safetensors import SafetensorError

        gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nlong story")
        full = torch.AcceleratorError("CUDA error: out of memory\nlong story")
        disk = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        for error, line in (
            (gpu, "not enough memory on the GPU: 9 GiB more were asked for (choose --device cpu)"),
            (full, "not enough memory on the GPU (choose --device cpu)"),
            (disk, "No space left on device (free"),
        ):
            monkeypatch.setattr(lorazip_core.info, "info", _raiser(error))
            assert main(["info", "B"]) == 8
            assert capsys.readouterr().err.startswith(f"lorazip: error: {line}")

    def test_debug_shows_where(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(lorazip_core.info, "info", lambda path, **asked: 1 / 0)
        monkeypatch.setenv("LORAZIP_DEBUG", "1")
        assert main(["info", "B"]) == 70
        assert "Traceback (most recent call last)" in capsys.readouterr().err

    def test_each_bad_adapter_has_its_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(path: Path, **asked: object) -> None:
            raise AdapterErrors([AdapterError("a", "no B"), AdapterError("b\n\x1b[31m", "NaN", "train it again")])

        monkeypatch.setattr(lorazip_core.info, "info", fail)
        assert main(["info", "B"]) == 3
        assert capsys.readouterr().err.splitlines() == [
            "lorazip: error: adapter 'a': no B",
            r"lorazip: error: adapter 'b\n\x1b[31m': NaN (train it again)",
            "lorazip: error: 2 adapters cannot be used",
        ]

    def test_compress_tells_of_skip_bad(
        self, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = tmp_path / "adapters"
        shutil.copytree(adapters, root)
        bad = sorted(root.iterdir())[0]
        (bad / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        argv = ["compress", str(root), "-o", str(tmp_path / "bundle"), "--rank", "2", "--json", "-q"]
        assert main(argv) == 3
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.splitlines()[-1] == "lorazip: error: 1 adapter cannot be used (--skip-bad goes on without)"
        assert main([*argv, "--skip-bad"]) == 0
        output = capsys.readouterr()
        assert [skipped["name"] for skipped in json.loads(output.out)["skipped"]] == [bad.name]
        assert output.err == ""

    @pytest.mark.parametrize(
        ("argv", "line"),
        [
            (["compress", "--bits", "3"], "No such option: --bits (see 'lorazip compress --help')"),
            (
                ["compress", "--methd=svd"],
                "No such option: --methd (did you mean --method? see 'lorazip compress --help')",
            ),
            (
                ["verify", "B", "--out", "x"],
                "No such option: --out (did you mean --output? see 'lorazip verify --help')",
            ),
            (["compres"], "No such command 'compres'. Did you mean 'compress'? (see 'lorazip --help')"),
            (["train"], "No such command 'train' (see 'lorazip --help')"),
            (
                ["export"],
                "Missing argument 'BUNDLE' (usage: lorazip export BUNDLE -o DIR [options];"
                " see 'lorazip export --help')",
            ),
            (
                ["fetch", "owner/repo"],
                "Missing option '-o' / '--output' (usage: lorazip fetch SOURCE... -o DIR [options];"
                " see 'lorazip fetch --help')",
            ),
            (
                ["compress", "A", "-o", "B", "--rank", "0"],
                "Invalid value for '--rank': 0 is not a number of 1 or more (see 'lorazip compress --help')",
            ),
            (
                ["compress", "A", "-o", "B", "--rank", "few"],
                "Invalid value for '--rank': not a whole number (see 'lorazip compress --help')",
            ),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_a_slip_is_answered_with_what_exists(
        self, argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(argv) == 2
        assert capsys.readouterr().err == f"lorazip: error: {line}\n"

    def test_the_documented_table_is_the_real_one(self) -> None:
        assert markdown_table() in DOCUMENT.read_text()
        assert set(exit_codes()) >= {0, 1, 2, 3, 4, 5, 6, 8, 70, 130}

    def test_two_failures_cannot_share_a_code(self) -> None:
        class Clash(LorazipError):
            slug = "clash"
            exit_code = 4
            meaning = "something else"

        try:
            with pytest.raises(ValueError, match="Clash claims exit code 4"):
                exit_codes()
        finally:
            Clash.exit_code = 3
            del Clash
            import gc

            gc.collect()
        exit_codes()


class TestDocument:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_options_are_documented_and_no_others(self, name: str) -> None:
        section = re.search(rf"^## lorazip {name}\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
        assert section is not None
        rows = [line.split(" | ")[0] for line in section[1].splitlines() if line.startswith("| `-")]
        documented = {option for row in rows for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", row)}
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
        real = {
            option
            for parameter in command.params
            for option in [*parameter.opts, *parameter.secondary_opts]
            if option.startswith("-")
        }
        assert documented == real - {"--help"}

    def test_defaults_of_compress_are_those_of_the_core(self) -> None:
        command = typer.main.get_command(app).commands["compress"]  # type: ignore[attr-defined]
        defaults = {parameter.name: parameter.default for parameter in command.params}
        options = CompressOptions()
        for field in CompressOptions.__struct_fields__:
            assert str(defaults[field]) == str(getattr(options, field)), field
        ranks = {name: SCHEMES[name].default_rank for name in methods()}
        assert ranks == {"joint": 16, "diag": 16, "svd": 4, "coded": None}, "the help and docs/commands.md say so"


class TestRenderings:
    def test_compress(self, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["compress", str(adapters), "-o", str(tmp_path / "b"), "--rank", "4"]
        assert main(argv) == 0
        output = capsys.readouterr()
        assert output.out == ""
        assert re.search(r"^3 adapters of HuggingFaceTB/SmolLM2-135M-Instruct in \S+: 1\.6 MB to ", output.err, re.M)
        assert re.search(r"^squared error: mean 0\.\d{4}, p95 0\.\d{4}, worst 0\.\d{4} \(fv_\w+\)$", output.err, re.M)
        assert main(argv) == 6
        assert main([*argv, "-q", "--force"]) == 0
        capsys.readouterr()

    def test_compress_individually(self, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["compress", str(adapters), "-o", str(tmp_path / "b"), "--rank", "1", "--max-error", "0.2"]
        assert main(argv) == 0
        assert re.search(r"^kept individually: [123] adapters?$", capsys.readouterr().err, re.M)

    def test_dry_run_needs_no_output(self, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compress", str(adapters), "--dry-run", "--method", "svd"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "3 adapters of HuggingFaceTB/SmolLM2-135M-Instruct, 18 modules, 1.6 MB"
        assert lines[1].split() == ["method", "rank", "clusters", "bundle", "saved"]
        assert lines[2].startswith("svd (chosen)")
        assert lines[6] == "work     reads 1.6 MB"
        assert re.fullmatch(
            r"memory   at most [\d,]+ MiB on this machine; the least that --memory can be is \d+ MiB", lines[7]
        )
        assert len(lines) == 8

    def test_dry_run_says_how_much_work_and_memory_it_is_and_that_the_output_exists(
        self, adapters: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plan = ["compress", str(adapters), "--dry-run", "--clusters", "2", "--rank", "2"]
        assert main([*plan, "-o", str(bundle)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[6] == "work     reads 1.6 MB and finds 36 shared bases"
        assert lines[8] == f"note     {bundle} exists: without --force, compress would end with exit code 6"
        assert main([*plan, "-o", str(tmp_path / "new"), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["problems"], report["output_exists"]) == (36, False)
        assert report["least_memory_bytes"] <= report["memory_bytes"]
        least = report["least_memory_bytes"]
        compress = [word for word in plan if word != "--dry-run"] + ["-o", str(tmp_path / "new"), "-q", "--memory"]
        assert main([*compress, str(least // 2)]) == 8
        assert main([*compress, str(least)]) == 0
        assert main([*plan, "--device", "cuda:99", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["memory_bytes"] is None

    def test_verify(self, bundle: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "report.json"
        argv = ["verify", str(bundle), "--against", str(adapters), "-o", str(file)]
        assert main(argv) == 0
        output = capsys.readouterr()
        assert output.out == ""
        assert f"{bundle}: sound\n" in output.err
        assert "squared error, measured: mean 0." in output.err
        worst = [float(line.split()[1]) for line in output.err.splitlines() if line.startswith("fv_")]
        assert len(worst) == 3
        assert worst == sorted(worst, reverse=True)
        assert json.loads(file.read_bytes())["ok"] is True
        assert main(argv) == 6
        assert main([*argv, "--force"]) == 0
        assert main(["verify", str(bundle), "-o", str(bundle / "report.json")]) == 2
        assert main(["verify", str(bundle), "-o", str(tmp_path)]) == 2

    def test_verify_says_what_failed_even_when_quiet(self, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(bundle), "-q"]) == 0
        assert capsys.readouterr() == ("", "")
        assert main(["verify", str(bundle), "-q", "--max-error", "0", "--max-mean-error", "0"]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 4
        assert all(line.startswith("lorazip: error: ") for line in lines)

    def test_verify_of_damage(self, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        damaged = tmp_path / "bundle"
        shutil.copytree(bundle, damaged)
        basis = next((damaged / "bases").iterdir())
        basis.write_bytes(basis.read_bytes()[:-1])
        assert main(["verify", str(damaged), "--json"]) == 4
        output = capsys.readouterr()
        assert json.loads(output.out)["ok"] is False
        assert f"lorazip: error: bases/{basis.name}: " in output.err
        (damaged / "manifest.json").unlink()
        assert main(["verify", str(damaged)]) == 4

    def test_export(self, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["export", str(bundle), "-o", str(tmp_path / "x"), "--target", "vllm"]
        assert main(argv) == 0
        assert re.search(
            r"^3 adapters \(peft, rank 4\) in .*\nserve with: .* --max-lora-rank 8$", capsys.readouterr().err, re.M
        )
        assert main(argv) == 6
        assert main([*argv, "--force", "--adapter", "fv_nothing"]) == 2
        assert main([*argv, "--force", "--adapter", "fv_ag_news", "--json"]) == 0
        assert [one["name"] for one in json.loads(capsys.readouterr().out)["adapters"]] == ["fv_ag_news"]

    def test_info(self, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", str(bundle)]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        assert "method       joint, rank 4, bf16, seed 0\n" in output.out
        assert len([line for line in output.out.splitlines() if line.startswith("fv_")]) == 3
        assert "resident" not in output.out
        assert main(["info", str(bundle), "--resident"]) == 0
        told = capsys.readouterr().out
        assert re.search(
            r"^resident +[\d.]+ MB: [\d.]+ MB shared, an adapter [\d,]+ bytes on average, [\d,]+ bytes at most$",
            told,
            re.M,
        )
        assert re.search(r"^adapter +kept as .* its own +resident$", told, re.M)

    def test_demo(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.chdir(tmp_path)
        left = tmp_path / "lorazip-demo" / ".bundle.partial"  # by one that was interrupted
        left.mkdir(parents=True)
        (left / ".lorazip").touch()
        assert main(["demo"]) == 0
        out = capsys.readouterr().out
        assert re.search(r"adapters +16,", out)
        assert re.search(r"before +8\.3 MB", out)
        assert re.search(r"squared error +mean 0\.\d+, worst 0\.\d+", out)
        assert "the errors are what the bundle claims" in out
        assert {path.name for path in (tmp_path / "lorazip-demo").iterdir()} == {"bundle", "adapters", "verify.json"}
        assert [path.name for path in tmp_path.iterdir()] == ["lorazip-demo"]
        assert main(["demo"]) == 6
        (tmp_path / "lorazip-demo" / "mine.txt").touch()
        assert main(["demo", "--force"]) == 6

    @pytest.mark.parametrize(
        ("schema", "argv"),
        [
            ("compress", ["compress", "{adapters}", "-o", "{tmp}/b", "--rank", "2"]),
            ("plan", ["compress", "{adapters}", "--dry-run"]),
            ("verify", ["verify", "{bundle}", "--against", "{adapters}"]),
            ("export", ["export", "{bundle}", "-o", "{tmp}/x"]),
            ("info", ["info", "{bundle}"]),
        ],
    )
    def test_json_is_exactly_one_canonical_object(
        self,
        schema: str,
        argv: list[str],
        adapters: Path,
        bundle: Path,
        tmp_path: Path,
        capsysbinary: pytest.CaptureFixture[bytes],
    ) -> None:
        filled = [each.format(adapters=adapters, bundle=bundle, tmp=tmp_path) for each in argv]
        assert main([*filled, "--json"]) == 0
        out = capsysbinary.readouterr().out
        assert out.count(b"\n") == 1
        assert out.endswith(b"\n")
        report = json.loads(out)
        assert report["schema"] == f"lorazip.{schema}/1"
        assert out.decode() == json.dumps(report, sort_keys=True, ensure_ascii=False, separators=(",", ":")) + "\n"

    def test_numbers(self) -> None:
        assert [table.megabytes(size) for size in (0, 99_999, 100_000, 8_342_528, 2_500_000_000)] == [
            "0 bytes",
            "99,999 bytes",
            "0.1 MB",
            "8.3 MB",
            "2,500.0 MB",
        ]
        assert [table.error(value) for value in (None, 0.0, 1e-9, 0.12345, 1.0)] == [
            "-",
            "0",
            "1.0e-09",
            "0.1235",
            "1.0000",
        ]

    def test_a_table_is_aligned_and_harmless(self) -> None:
        text = table.table(("name", "n"), [("a", "10"), ("b\x1b[2J\n", "9")])
        assert text.split("\n") == ["name         n", "a           10", "b\\x1b[2J\\n   9"]

    def test_a_file_name_that_is_no_unicode_can_be_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        console.line(os.fsdecode(b"caf\xe9 caf\xc3\xa9"))
        assert capsys.readouterr().out == "caf\\udce9 café\n"


class TestStreams:
    def test_no_ansi_in_a_log(self, adapters: Path, tmp_path: Path) -> None:
        result = process(
            "compress", str(adapters), "-o", str(tmp_path / "b"), "--rank", "2", FORCE_COLOR="1", CLICOLOR_FORCE="1"
        )
        assert result.returncode == 0
        assert ANSI not in result.stdout + result.stderr
        assert "\r" not in result.stderr

    @pytest.mark.parametrize(("no_color", "moves"), [("", True), pytest.param("1", False, marks=pytest.mark.slow)])
    def test_a_bar_on_a_terminal_unless_no_color(
        self, no_color: str, moves: bool, adapters: Path, tmp_path: Path
    ) -> None:
        pty = pytest.importorskip("pty")
        controller, terminal = pty.openpty()
        child = subprocess.Popen(
            [sys.executable, "-m", "lorazip_cli", "compress", str(adapters), "-o", str(tmp_path / "b"), "--rank", "2"],
            env={**os.environ, "NO_COLOR": no_color, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
            stderr=terminal,
        )
        os.close(terminal)
        seen = b""
        while True:
            try:
                chunk = os.read(controller, 4096)
            except OSError:  # Linux says so when the other side is closed
                break
            if not chunk:
                break
            seen += chunk
        os.close(controller)
        assert child.wait() == 0
        assert (ANSI.encode() in seen) is moves
        assert b"squared error: mean" in seen

    def test_a_reader_that_leaves_early_is_no_failure(self, bundle: Path) -> None:
        child = subprocess.Popen(
            [sys.executable, "-m", "lorazip_cli", "info", str(bundle)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == b""
        child.stderr.close()
        assert child.wait() == 0

    def test_a_log_gets_lines_now_and_then(self, capsys: pytest.CaptureFixture[str]) -> None:
        now = 0.0
        with Lines(clock=lambda: now).stage("work", 1000) as advance:
            for _ in range(1000):
                now += 0.5
                advance(1)
        assert capsys.readouterr().err.splitlines() == [
            "work ...",
            *(f"work: {done}% in {elapsed}, about {left} left" for done, elapsed, left in _tenths(500)),
            "work: done in 8 min 20 s",
        ]

    def test_a_slow_stage_speaks_every_minute_and_a_failed_one_is_not_done(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        now = 0.0

        def fail() -> None:
            nonlocal now
            with Lines(clock=lambda: now).stage("work", 1_000_000) as advance:
                now = 59.0
                advance(1)
                now = 61.0
                advance(1)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        assert lines[1].startswith("work: 0% in 1 min 1 s, about ")

    def test_quiet_says_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        show = progress(quiet=True)
        with show.stage("work", 2) as advance:
            advance(2)
        show.note("a decision")
        assert capsys.readouterr() == ("", "")


class TestInterrupt:
    @pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
    def test_leaves_nothing_half_written(self, number: signal.Signals, tmp_path: Path) -> None:
        target = tmp_path / "bundle"
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lorazip_cli",
                "compress",
                str(sample_path()),
                "-o",
                str(target),
                "--method",
                "joint",
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("fitting bases"):
                break
        child.send_signal(number)
        said = child.stderr.read()
        child.stderr.close()
        assert child.wait(timeout=600) == 130
        assert "Traceback" not in said
        assert said.splitlines()[-1].startswith("lorazip: error: interrupted")
        kept = [".bundle.partial"] if "what was finished is kept" in said else []
        assert [path.name for path in tmp_path.iterdir()] == kept

    def test_is_heard_although_a_library_loses_it(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Raised inside torch or safetensors, KeyboardInterrupt comes out as another exception now and then."""

        def lose(path: Path, **asked: object) -> None:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)

        def rename(path: Path, **asked: object) -> None:
            lose(path)
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")

        def go_on(path: Path, **asked: object) -> None:
            lose(path)
            check_stop()
            pytest.fail("went on")

        for library in (rename, go_on):
            monkeypatch.setattr(lorazip_core.info, "info", library)
            assert main(["info", "B"]) == 130
            assert capsys.readouterr().err == "lorazip: error: interrupted; nothing was left half-written\n"

    def test_what_the_parent_has_us_ignore_is_ignored(self, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a job in the background
        try:
            real = lorazip_core.info.info

            def info(path: Path, **asked: bool) -> lorazip_core.info.InfoReport:
                signal.raise_signal(signal.SIGINT)
                return real(path, **asked)

            monkeypatch.setattr(lorazip_core.info, "info", info)
            assert main(["info", str(bundle)]) == 0
        finally:
            signal.signal(signal.SIGINT, before)

    def test_the_handler_of_the_caller_comes_back(self, bundle: Path) -> None:
        before = signal.getsignal(signal.SIGTERM)
        assert main(["verify", str(bundle), "-q"]) == 0
        assert signal.getsignal(signal.SIGTERM) is before

    def test_the_console_script_exits_with_the_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["lorazip", "info", "/nowhere/at/all"])
        with pytest.raises(SystemExit) as stop:
            main_module.run()
        assert stop.value.code == 2


def _tenths(total: int) -> list[tuple[int, str, str]]:
    """Percent, and the seconds until then and from then on, of ``total``."""

    def written(seconds: int) -> str:
        if seconds < 60:
            return f"{seconds} s" if seconds else "0.0 s"
        return f"{seconds // 60} min {seconds % 60} s"

    return [(10 * tenth, written(total * tenth // 10), written(total * (10 - tenth) // 10)) for tenth in range(1, 11)]


def _raiser(error: Exception) -> Callable[..., None]:
    def fail(path: Path, **asked: object) -> None:
        raise error

    return fail
