"""``--max-error E`` is a guarantee: ``verify`` measures at most E, whatever the scales, dtypes and magnitudes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from testing import peft_fixtures as fixtures
from testing import random_adapters as ra

from lorazip_core.base.errors import AdapterErrors
from lorazip_core.bundle.manifest import AdapterEntry
from lorazip_core.bundle.reader import Bundle
from lorazip_core.bundle.summary import is_adapter_within, is_within
from lorazip_core.compress.run import compress
from lorazip_core.maths.stack import ScaledStack, Stack
from lorazip_core.planning.options import CompressOptions
from lorazip_core.verify.run import verify

# None of them is a float32 number: folded into a factor, each is rounded.
SCALES = (1 / 3, 8**0.5, 1e-3, 7 / 11)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
BELOW_ALL_ROUNDING = 1e-12


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of each scale, of every dtype, and one with A in float32 beside B in bfloat16."""
    root = tmp_path_factory.mktemp("awkward")
    recipes = [
        dataclasses.replace(recipe, scale=SCALES[i % 4], dtype=DTYPES[(i + i // 4) % 4])
        for i, recipe in enumerate(ra.plain(8, groups=2, modules=(ra.Q, ra.V)))
    ]
    ra.write_collection(root, (*recipes, ra.Recipe("mixed", 4, (ra.Q, ra.V), scale=8**0.5)))
    for i, recipe in enumerate(recipes):
        if recipe.dtype == torch.float64:
            fixtures.edit_weights(root / f"t{i:02}", divided_by_three)
    fixtures.edit_weights(root / "mixed", with_half_of_b)
    return root


def divided_by_three(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {key: tensor.double() / 3 for key, tensor in tensors.items()}


def with_half_of_b(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {key: tensor.bfloat16() for key, tensor in tensors.items() if "lora_B" in key}


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize(("method", "clusters"), [("joint", 1), ("joint", 2), ("diag", 1), ("svd", 1)])
def test_no_measured_error_is_above_the_limit(
    awkward: Path, tmp_path: Path, method: Any, clusters: int, dtype: Any
) -> None:
    """Limits are errors that another run has reached, as it claims them and as they are measured: the hardest ones."""
    options = CompressOptions(method=method, rank=3, clusters=clusters, dtype=dtype)
    compress(awkward, tmp_path / "first", options)
    found = verify(tmp_path / "first", against=awkward)
    assert found.findings == []
    reached = sorted((adapter.claimed_squared_error, adapter.squared_error) for adapter in found.adapters)
    for claimed, measured in reached:
        assert measured == pytest.approx(claimed, rel=1e-9, abs=BELOW_ALL_ROUNDING)
    for limit in {*reached[len(reached) // 2], *reached[-1]}:
        assert limit is not None
        report = compress(awkward, tmp_path / "out", structs.replace(options, max_error=limit), force=True)
        checked = verify(tmp_path / "out", against=awkward, max_error=limit)
        assert checked.findings == []
        assert max(adapter.squared_error or 0 for adapter in checked.adapters) <= limit
        assert len(report.individual) < 9 or method == "svd"


@pytest.mark.parametrize("method", ["joint", "diag", "svd"])
def test_a_limit_of_zero_keeps_every_factor_in_its_own_dtype(awkward: Path, tmp_path: Path, method: Any) -> None:
    compress(awkward, tmp_path / "out", CompressOptions(method=method, rank=3, max_error=0))
    checked = verify(tmp_path / "out", against=awkward, max_error=0)
    assert checked.findings == []
    assert [adapter.squared_error for adapter in checked.adapters] == [0] * 9
    bundle = Bundle(tmp_path / "out")
    b, a, scale = bundle.own(entry(tmp_path / "out", "mixed"), ra.Q.name).values()
    assert (b.dtype, a.dtype, scale) == (torch.bfloat16, torch.float32, 8**0.5 * 4 / 4)


def test_what_is_within_a_limit_leaves_room_for_rounding() -> None:
    assert is_within(0.05, 0.05 + 1e-8)
    assert not is_within(0.05, 0.05)
    assert is_within(1e-15, 1e-12)
    assert not is_within(0.0, 0.0)
    assert is_within(0.9, None)
    assert not is_within(float("inf"), None)


@pytest.mark.parametrize("method", ["joint", "diag", "svd"])
def test_an_adapter_that_is_zero_is_within_any_limit(tmp_path: Path, method: Any) -> None:
    assert is_adapter_within([0.0, 0.0], [0.0, 0.0], 0.0)
    assert not is_adapter_within([0.0, 0.0], [0.0, 1.0], 0.0)
    recipes = ra.plain(3, modules=(ra.Q, ra.V))
    ra.write_collection(tmp_path / "in", (*recipes, ra.Recipe("zero", 4, (ra.Q, ra.V), zero=True)))
    compress(tmp_path / "in", tmp_path / "out", CompressOptions(method=method, rank=3, max_error=0))
    checked = verify(tmp_path / "out", against=tmp_path / "in", max_error=0)
    assert checked.findings == []
    assert [adapter.squared_error for adapter in checked.adapters] == [0] * 4
    assert entry(tmp_path / "out", "zero").scheme == method


MAGNITUDES = {"whisper": 1e-40, "quiet": 1e-30, "soft": 1e-12, "loud": 1e18, "shout": 1e25}


@pytest.fixture(scope="module")
def extreme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six ordinary adapters beside some whose ‖ΔW‖ is as their name says, half of it in B and half in A."""
    root = tmp_path_factory.mktemp("extreme")
    names = tuple(ra.Recipe(name, 4, (ra.Q, ra.V), group=i % 2) for i, name in enumerate(MAGNITUDES))
    ra.write_collection(root, (*ra.plain(6, groups=2, modules=(ra.Q, ra.V)), *names))
    for name, magnitude in MAGNITUDES.items():
        fixtures.edit_weights(root / name, times(magnitude**0.5))
    return root


def times(factor: float) -> Any:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {key: tensor * factor for key, tensor in tensors.items()}

    return edit


def entry(bundle: Path, name: str) -> AdapterEntry:
    return next(each for each in Bundle(bundle).manifest.adapters if each.name == name)


@pytest.mark.parametrize("method", ["joint", "diag", "svd"])
@pytest.mark.parametrize(
    ("dtype", "as_they_were"),
    [("bf16", {"whisper"}), ("f32", {"whisper"}), ("f16", {"whisper", "quiet", "soft", "loud", "shout"})],
)
def test_tiny_and_huge_adapters_are_like_any_other(
    extreme: Path, tmp_path: Path, method: Any, dtype: Any, as_they_were: set[str]
) -> None:
    """In a basis they lose what the others lose; where the dtype cannot hold their values they are kept as they are."""
    report = compress(extreme, tmp_path / "out", CompressOptions(method=method, rank=6, dtype=dtype))
    checked = verify(tmp_path / "out", against=extreme)
    assert checked.findings == []
    kept = {each.name for each in Bundle(tmp_path / "out").manifest.adapters if each.scheme == "original"}
    assert kept == as_they_were
    errors = {adapter.name: adapter.squared_error for adapter in checked.adapters}
    assert all(errors[name] == 0 for name in as_they_were)
    assert max(error or 0 for error in errors.values()) < 0.6
    assert report.summary.adapters == 11


@pytest.mark.parametrize(("method", "clusters"), [("joint", "auto"), ("svd", 1)])
def test_a_limit_holds_for_tiny_and_huge_adapters(extreme: Path, tmp_path: Path, method: Any, clusters: Any) -> None:
    compress(extreme, tmp_path / "out", CompressOptions(method=method, rank=6, clusters=clusters, max_error=0.1))
    assert verify(tmp_path / "out", against=extreme, max_error=0.1).findings == []


def test_an_update_beyond_float32_is_refused_by_name(tmp_path: Path) -> None:
    root = ra.write_collection(tmp_path / "in", (*ra.plain(3), ra.Recipe("beyond")))
    fixtures.edit_weights(root / "beyond", times(1e25))
    with pytest.raises(AdapterErrors, match=r"beyond.*overflows float32") as error:
        compress(root, tmp_path / "out", CompressOptions(rank=2))
    assert error.value.exit_code == 3
    assert compress(root, tmp_path / "out", CompressOptions(rank=2), skip_bad=True).summary.adapters == 3


def test_a_scaled_stack_is_its_rows_times_its_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(5, r, generator=generator), torch.randn(r, 4, generator=generator)) for r in (2, 1, 2)]
    stack = ScaledStack(Stack.of(factors, [7, 8, 9]), torch.tensor([1 / 3, 2.0, 1e-30], dtype=torch.float64))
    assert stack.adapters == (8, 7, 9)
    u, v = torch.eye(5, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    dense = [factors[i][0].double() @ factors[i][1].double() for i in (1, 0, 2)]
    expected = torch.stack([update * factor for update, factor in zip(dense, stack.factors, strict=True)])
    torch.testing.assert_close(stack.exact().cores(u, v), expected, rtol=1e-12, atol=0)
    halves = stack.scaled(torch.full((3,), 0.5))
    assert halves.a.dtype == torch.float32
    torch.testing.assert_close(halves.cores(u.float(), v.float()).double(), expected / 2, rtol=1e-6, atol=1e-37)
    torch.testing.assert_close(
        stack.captured(u[None].float(), v[None].float())[:, 0], expected.square().sum((1, 2)), rtol=1e-6, atol=0
    )
    assert stack.select({7, 9}).factors.tolist() == [2.0, 1e-30]
