"""Proof: what PEFT does with an adapter of ``found``, it does with the export from a bundle at full rank.

Each directory of ``../shared/data/found`` is compressed (svd at full rank, f32), exported and loaded by PEFT, by the
one that is here and by 0.13 where that loads the original. LORAZIP_OLD_PEFT names an interpreter with PEFT 0.13; else
an environment with it is made, or the part that needs it is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from acceptance.old_peft import make_environment
from acceptance.real_data import SHARED, Say
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorazip_core.base.errors import AdapterErrors
from lorazip_core.compress.run import compress
from lorazip_core.export.exporter import export
from lorazip_core.planning.options import CompressOptions

pytestmark = pytest.mark.acceptance

FOUND = SHARED / "data" / "found"
SCRIPT = Path(__file__).with_name("found_logits.py")

# Each collection, and the model in found_logits.py that its adapters fit.
COLLECTIONS = {
    "adapter-name-in-keys": "llama",
    "checkpoints-below": "llama",
    "embedding-lora": "llama",
    "empty-factors": "llama",
    "empty-saved-tensors": "llama",
    "equal-extras": "llama",
    "files-beside": "llama",
    "links/elsewhere": "llama",
    "links/hub-cache": "llama",
    "links/mixed": "llama",
    "old-config": "llama",
    "rare-float8": "llama",
    "renamed-model-keys": "gemma",
    "rslora-bf16": "llama",
    "scalar-in-saved-module": "net",
    "target-parameters": "qwen moe",
    "uneven-ranks": "wide llama",
    "wrapper-names/compiled": "llama",
    "wrapper-names/fsdp": "llama",
}
REFUSED = {"empty-factors/a0", "empty-saved-tensors/a0"}
"""Adapters that must be refused, by their names."""
REFUSED_OR_READ = {"rare-float8/x", "wrapper-names/compiled/a0", "wrapper-names/fsdp/a0"}
"""Adapters that may be refused by their names; where they are read, they must be right."""
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")


class Case(NamedTuple):
    """An adapter, and what became of it: the folder of its export, or the reason why it was refused."""

    name: str
    model: str
    original: Path
    exported: Path | None
    reason: str | None


def adapters_of(collection: str) -> list[str]:
    """The adapters below a collection, links followed."""
    root, found = FOUND / collection, []
    for folder, _, files in os.walk(root, followlinks=True):
        found += [Path(folder)] if "adapter_config.json" in files else []
        found += [Path(folder, file) for file in files if (Path(folder) / link_text(Path(folder, file))).is_dir()]
    return sorted(folder.relative_to(root).as_posix() for folder in found)


def link_text(path: Path) -> str:
    """Where a link leads that a copy without links has made a file; a name that is not there for any other file."""
    text = path.read_bytes()[:200].decode(errors="replace")
    return text if text.startswith("../") else "no link"


@pytest.fixture(scope="session")
def found(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ``found`` in which links are links."""
    root = tmp_path_factory.mktemp("data") / "found"
    shutil.copytree(FOUND, root, symlinks=True, copy_function=shutil.copyfile)
    for path in root.rglob("*"):
        path.chmod(0o755, follow_symlinks=True)
        if path.is_file() and (text := link_text(path)) != "no link":
            path.unlink()
            path.symlink_to(text)
    return root


NAMES = [f"{collection}/{name}" for collection in COLLECTIONS for name in adapters_of(collection)]


@pytest.fixture(scope="session")
def cases(found: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every adapter by its name, after compress and export of its collection."""
    made = {}
    for collection, model in COLLECTIONS.items():
        folder = tmp_path_factory.mktemp("collection")
        reasons = exported_by_name(found / collection, folder)
        for name in adapters_of(collection):
            reason = reasons.get(name, reasons.get(""))
            original = unwrapped(found / collection / name, folder / "unwrapped" / name)
            exported = None if reason else folder / "out" / name
            made[f"{collection}/{name}"] = Case(f"{collection}/{name}", model, original, exported, reason)
    return made


def exported_by_name(collection: Path, folder: Path) -> dict[str, str]:
    """Compress and export into ``folder``/out; why adapters were left out, under "" for all of them."""
    try:
        report = compress(collection, folder / "bundle", CompressOptions("svd", 64, dtype="f32"), skip_bad=True)
        export(folder / "bundle", folder / "out")
    except AdapterErrors as errors:
        return {error.adapter: error.reason for error in errors.errors}
    except Exception as error:  # one collection that fails must not hide the others
        return {"": f"{type(error).__name__}: {error}"}
    return {skipped.name: skipped.reason for skipped in report.skipped}


def unwrapped(original: Path, folder: Path) -> Path:
    """The original, or, where wrappers left their names in its keys so that PEFT applies nothing, a copy without."""
    if "wrapper-names" not in original.parts:
        return original
    weights = original / "adapter_model.safetensors"
    tensors = load_file(weights)
    folder.mkdir(parents=True)
    for wrapper in WRAPPERS:
        tensors = {key.replace(wrapper, ""): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / weights.name)
    (folder / "adapter_config.json").write_bytes((original / "adapter_config.json").read_bytes())
    return folder


Answers = dict[str, tuple[Tensor | str, Tensor | str | None, Tensor | str]]
"""By the adapter's name what the original, the export and the bare model give: logits, or an error."""


def answers_of(python: Path, cases: dict[str, Case], folder: Path) -> Answers:
    """What PEFT in the environment of ``python`` makes of originals and exports."""
    jobs: list[tuple[str, str | None]] = []
    for case in cases.values():
        jobs += [(case.model, str(case.original)), (case.model, None)]
        jobs += [(case.model, str(case.exported))] if case.exported else []
    (folder / "jobs.json").write_text(json.dumps(jobs))
    arguments = [str(python), str(SCRIPT), str(folder / "jobs.json"), str(folder / "answers.pt")]
    subprocess.run(arguments, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    results = iter(torch.load(folder / "answers.pt"))
    answers: Answers = {}
    for case in cases.values():
        original, base = next(results), next(results)
        answers[case.name] = original, next(results) if case.exported else None, base
    return answers


@pytest.fixture(scope="session")
def answers(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return answers_of(Path(sys.executable), cases, tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="session")
def old_answers(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    named = os.environ.get("LORAZIP_OLD_PEFT")
    try:
        python = Path(named) if named else make_environment(tmp_path_factory.mktemp("peft") / "0.13")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no environment with PEFT 0.13: {error.stderr.decode()[-200:]}")
    return answers_of(python, cases, tmp_path_factory.mktemp("old-answers"))


def test_every_directory_has_a_model(data: Path) -> None:
    tops = {entry.name for entry in FOUND.iterdir() if entry.is_dir()}
    assert tops == {collection.partition("/")[0] for collection in COLLECTIONS}


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name: str, cases: dict[str, Case], say: Say) -> None:
    reason = cases[name].reason
    if name in REFUSED:
        assert reason is not None
    elif name not in REFUSED_OR_READ:
        assert reason is None
    if reason is not None:
        say(f"{name}: refused: {reason}")


@pytest.mark.parametrize("name", NAMES)
def test_peft_gives_the_same_logits(name: str, answers: Answers, say: Say) -> None:
    say(f"{name}: {compared(answers[name], must_load=name not in REFUSED | REFUSED_OR_READ)}")


@pytest.mark.parametrize("name", NAMES)
def test_peft_0_13_gives_the_same_logits(name: str, old_answers: Answers, say: Say) -> None:
    say(f"{name}, PEFT 0.13: {compared(old_answers[name], must_load=False)}")


def compared(answers: tuple[Tensor | str, Tensor | str | None, Tensor | str], *, must_load: bool) -> str:
    """Hold the export against the original; one line of what was found."""
    original, exported, base = answers
    if isinstance(original, str) or isinstance(base, str):
        assert not must_load, original
        return f"the original does not load ({str(original)[:60]})"
    if exported is None:
        return "refused"
    assert isinstance(exported, Tensor), exported
    off, size = float((exported - original).abs().max()), float((original - base).abs().max())
    line = f"off by {off:.1e}, where the adapter moves logits by {size:.1e}"
    assert size > 1e-3, "the adapter has no effect"
    assert off <= (1e-5 if original.dtype == torch.float64 else 1e-3) * size, line
    return line
