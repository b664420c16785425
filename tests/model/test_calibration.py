"""Moments of inputs for the modules of a collection, and a compression and a verification that use them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing import random_adapters as ra
from testing.input_moments import dense
from torch import Tensor

import lorazip_core
from lorazip_cli.main import main
from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.module import Module
from lorazip_core.base.errors import UsageError
from lorazip_core.base.progress import Silent
from lorazip_core.bundle.decoder import decode
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.maths.weighting import DAMPING
from lorazip_core.model.calibration import Calibration, calibration_for
from lorazip_core.model.moments import Moment, to_bytes
from lorazip_core.planning.options import CompressOptions
from lorazip_core.planning.plan import plan

CPU = torch.device("cpu")
SAMPLE = Path(lorazip_core.__file__).parent / "sample" / "adapters"
MODULES = tuple(Module(f"layers.{i}.proj", "linear", 256, 192 + 64 * (i % 2)) for i in range(4))


def moment(size: int, *names: str, directions: int = 3, seed: int = 0) -> Moment:
    x = torch.randn(400, size, generator=torch.Generator().manual_seed(seed)) * torch.logspace(1, -1, size)
    return Moment.of_sum(names, x.mT @ x, len(x), directions)


def written(path: Path, *moments: Moment) -> Path:
    path.write_bytes(to_bytes(moments))
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("adapters"), ra.plain(6, rank=6, modules=MODULES))


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all modules but the last."""
    path = tmp_path_factory.mktemp("moments") / "moments.safetensors"
    known = [moment(module.d_in, module.name, seed=place) for place, module in enumerate(MODULES[:-1])]
    return written(path, *known)


def test_inputs_are_stacked_also_of_unequal_ranks_and_unknown_ones(tmp_path: Path) -> None:
    modules = [Module(name, "linear", 4, 8) for name in "abc"]
    one, other = moment(8, "a", directions=2), moment(8, "b", directions=4, seed=1)
    calibration = Calibration.open(written(tmp_path / "moments", one, other), modules)
    inputs = calibration.inputs_of(("a", "b", "c"), CPU)
    assert inputs.directions.shape == (3, 4, 8)
    eye = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    found = inputs.between(eye, eye)
    for place, known in enumerate((one, other)):
        expected = dense(known).double()
        torch.testing.assert_close(found[place], expected / expected.diagonal().mean(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[2], eye[2])
    assert calibration.known == {"a", "b"}
    assert calibration.unknown == "nothing is known of the inputs of 1 module, c for one: all count alike"


def test_moments_of_another_model_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "moments", moment(8, "a"))
    with pytest.raises(UsageError, match="knows the inputs of no module, not of b for one"):
        Calibration.open(path, [Module("b", "linear", 4, 8)])
    with pytest.raises(UsageError, match="the input of a has 8 entries there, but 9 in the adapters"):
        Calibration.open(path, [Module("a", "linear", 4, 9)])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop("a:directions"), "is damaged: "),
        (lambda tensors: tensors.update({"a:directions": torch.ones(3, 7, dtype=torch.bfloat16)}), "do not fit"),
        (lambda tensors: tensors.update({"a:diagonal": torch.ones(()), "a:directions": torch.ones(3)}), "do not fit"),
        (lambda tensors: tensors.update({"lorazip.moments": torch.tensor([1, 1])}), "is no version"),
        (lambda tensors: tensors["a:diagonal"].fill_(torch.inf), "has moments with NaN or Inf"),
    ],
    ids=["missing", "unfit", "scalar", "version", "inf"],
)
def test_damaged_moments_are_refused(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], told: str) -> None:
    path = written(tmp_path / "moments", moment(8, "a"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(UsageError, match=told):
        Calibration.open(path, [Module("a", "linear", 4, 8)])


def test_without_a_file_nothing_is_known(adapters: Path) -> None:
    assert calibration_for(None, open_collection(adapters), Silent()) is None


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    assert main([*map(str, words)]) == code
    return tuple(capsys.readouterr())  # type: ignore[return-value]


def test_a_budget_is_spent_on_outputs(
    adapters: Path, moments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = {}
    for name, more in (("weights", []), ("outputs", ["--calibration", moments])):
        _, told = run(capsys, "compress", adapters, "-o", tmp_path / name, "--budget", "16kB", *more)
        assert ("nothing is known of the inputs of 1 module, layers.3.proj for one" in told) == (name == "outputs")
        words = ["verify", tmp_path / name, "--against", adapters, "--calibration", moments, "--json"]
        reports[name] = json.loads(run(capsys, *words)[0])
        assert 15_000 <= reports[name]["summary"]["bytes_bundle"] <= 16_000
    weights, outputs = reports["weights"], reports["outputs"]
    assert outputs["outputs"]["mean_squared_error"] < 0.99 * weights["outputs"]["mean_squared_error"]
    assert outputs["summary"]["mean_squared_error"] > weights["summary"]["mean_squared_error"]
    errors = {each["name"]: each["output_squared_error"] for each in outputs["adapters"]}
    assert outputs["outputs"]["max_squared_error"] == max(errors.values())
    assert errors[outputs["outputs"]["worst_adapter"]] == max(errors.values())
    assert outputs["outputs"]["adapters"] == 6
    calibration = Bundle(tmp_path / "outputs").manifest.parameters.calibration
    assert calibration == Calibration.open(moments, MODULES).sha256


def test_the_error_of_outputs_is_what_its_formula_says(
    adapters: Path, moments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    run(capsys, "compress", adapters, "-o", bundle, "--method", "joint", "--rank", 8)
    words = ["verify", bundle, "--against", adapters, "--calibration", moments, "--json"]
    found = json.loads(run(capsys, *words)[0])["adapters"][0]
    opened, adapter = Bundle(bundle), open_collection(adapters).adapters[0]
    entry = opened.manifest.adapters[0]
    lost = norm = 0.0
    for module in opened.modules(entry):
        inputs = Calibration.open(moments, MODULES)
        if module.name in inputs.known:
            (b, a), (c, d) = adapter.factors(module.name, torch.float64), decode(opened, entry, module, torch.float64)
            update, rest = b @ a, b @ a - c @ d
            h = inputs.inputs_of((module.name,), CPU)
            norm += float(h.between(update[None], update[None]).diagonal(dim1=-2, dim2=-1).sum())
            lost += float(h.between(rest[None], rest[None]).diagonal(dim1=-2, dim2=-1).sum())
    assert found["name"] == adapter.name
    assert found["output_squared_error"] == pytest.approx(lost / norm, rel=1e-6)


def test_originals_that_cannot_be_read_are_findings_all_the_same(
    adapters: Path, moments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(adapters, tmp_path / "adapters")
    run(capsys, "compress", root, "-o", tmp_path / "bundle")
    for path in root.rglob("adapter_model.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    words = ["verify", tmp_path / "bundle", "--against", root, "--calibration", moments, "--json"]
    report = json.loads(run(capsys, *words, code=1)[0])
    assert {finding["kind"] for finding in report["findings"]} == {"source-unusable"}
    assert report["outputs"] is None


def test_errors_of_weights_are_no_warning_where_outputs_count(
    adapters: Path, moments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", adapters, "-o", tmp_path / "out", "--budget", "9kB", "--json"]
    assert [each["kind"] for each in json.loads(run(capsys, *words)[0])["warnings"]] == ["large-errors"]
    report = json.loads(run(capsys, *words, "--calibration", moments, "--force")[0])
    assert report["summary"]["mean_squared_error"] > 0.1
    assert not report["warnings"]
    assert not json.loads(run(capsys, "verify", tmp_path / "out", "--json")[0])["warnings"]


def test_a_page_tells_weighted_errors_from_those_of_weights(
    adapters: Path, moments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", adapters, "--budget", "16kB", "--calibration", moments, "--report", tmp_path / "page.html"]
    for more in (["--dry-run"], ["-o", tmp_path / "out", "--force"]):
        run(capsys, *words, *more)
        page = (tmp_path / "page.html").read_text()
        assert "weighted by inputs" in page
        assert str(moments) in page or "--dry-run" in more


def test_plans_are_about_outputs(
    adapters: Path, moments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", adapters, "--budget", "40kB", "--calibration", moments, "--dry-run"]
    plan = json.loads(run(capsys, *words, "--json")[0])
    assert plan["weighted"]
    assert {point["method"] for point in plan["frontier"]} == {"coded"}
    [chosen] = [point for point in plan["frontier"] if point["chosen"]]
    run(capsys, *words[:-1], "-o", tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert chosen["bytes_bundle"] == pytest.approx(size, rel=0.05)
    assert "weighted by inputs, squared errors" in run(capsys, *words)[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "limits are on the error of weights"),
        (["--max-error", "0.1"], "limits are on the error of weights"),
        (["--method", "svd", "--budget", "1MB"], "svd has no use for it"),
        (["--method", "joint"], "joint has no use for it"),
    ],
)
def test_what_makes_no_sense_is_refused(
    adapters: Path, moments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    _, error = run(capsys, "compress", adapters, "-o", tmp_path / "out", "--calibration", moments, *words, code=2)
    assert told in error
    assert "--calibration" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--budget", "1MB"], ["--objective", "resident"], []])
def test_hints_name_no_method_that_has_no_use_for_it(
    adapters: Path, moments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    words = ["compress", adapters, "-o", tmp_path / "out", "--method", "joint", "--calibration", moments, *more]
    _, error = run(capsys, *words, code=2)
    assert "use --method coded" in error
    assert "svd" not in error


def test_a_file_that_is_none_is_refused_before_the_work(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (tmp_path / "absent", tmp_path):
        words = ["compress", adapters, "-o", tmp_path / "out", "--budget", "40kB", "--calibration", wrong]
        assert f"{wrong} is not a file" in run(capsys, *words, code=2)[1]
    (tmp_path / "none").write_bytes(b"x" * 40)
    budget = ["--budget", "40kB", "--calibration", tmp_path / "none"]
    assert "is no file of moments" in run(capsys, "compress", adapters, "-o", tmp_path / "out", *budget, code=2)[1]
    run(capsys, "compress", adapters, "-o", tmp_path / "bundle")
    words = ["verify", tmp_path / "bundle", "--calibration", tmp_path / "none"]
    assert "--against" in run(capsys, *words, code=2)[1]
    assert "is no file of moments" in run(capsys, *words, "--against", adapters, code=2)[1]


def test_errors_that_are_planned_are_those_under_damped_moments(tmp_path: Path) -> None:
    """About: of real adapters, for inputs of the directions that they act on."""
    collection = open_collection(SAMPLE)
    names = [module.name for module in collection.modules]
    moments = []
    for name in names:
        x = torch.cat([adapter.factors(name)[0] @ adapter.factors(name)[1] for adapter in collection.adapters])
        moments.append(Moment.of_sum([name], x.mT @ x, len(x), 32))
    path = written(tmp_path / "moments", *moments)
    options = CompressOptions(budget=100_000, calibration=path)
    [chosen] = [point for point in plan(SAMPLE, options).frontier if point.chosen]
    compress(SAMPLE, tmp_path / "out", options)
    bundle, calibration = Bundle(tmp_path / "out"), Calibration.open(path, collection.modules)

    def energy(module: str, b: Tensor, a: Tensor) -> float:
        gram = calibration.inputs_of((module,), CPU).between(a[None], a[None])[0] + DAMPING * a @ a.mT
        return float((b.mT @ b * gram).sum())

    modules = {module.name: module for module in bundle.manifest.modules}
    errors = []
    for adapter, entry in zip(collection.adapters, bundle.manifest.adapters, strict=True):
        lost = norm = 0.0
        for name in names:
            b, a = adapter.factors(name, torch.float64)
            c, d = decode(bundle, entry, modules[name], torch.float64)
            norm += energy(name, b, a)
            lost += energy(name, torch.cat([b, -c], 1), torch.cat([a, d]))
        errors.append(lost / norm)
    assert chosen.mean_squared_error == pytest.approx(sum(errors) / len(errors), rel=0.3)
