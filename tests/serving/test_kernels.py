"""The kernels, interpreted and without a GPU, against `Resident.apply`; and that they compile for one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from testing import random_bundle
from testing.device_tables import expected
from testing.random_bundle import UNEVEN, Sketch, make_bundle
from testing.triton_process import KERNELS, Case, by_kernels, compiled, triton_process

from lorazip_core.bundle.reader import Bundle
from lorazip_core.schemes.registry import SCHEMES
from lorazip_core.schemes.scheme import IndividualScheme
from lorazip_core.serving.resident import Resident

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: it is in the environment of 'make test-vllm'"
)
SCHEMES_OF = {
    torch.float32: tuple(SCHEMES),
    torch.float16: tuple(SCHEMES),
    # The interpreter takes bf16 for whole numbers where matrices are multiplied, as the kernels of bases do.
    torch.bfloat16: tuple(name for name, scheme in SCHEMES.items() if isinstance(scheme, IndividualScheme)),
}
OTHERS = torch.float32, torch.float16
ROUNDING = {torch.float32: 0.5, torch.float16: 0.5, torch.bfloat16: 1.0}  # the interpreter rounds bf16 towards 0
MANY = 530  # more than 512: wide tiles, and products by tensor cores


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kernels")
    one = [Sketch("a", "joint", [0, 1, 2, 3], 3), Sketch("g", "original", [0, 1, 2, 3], 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_bundle, "JOINT_RANK", 18)
        make_bundle(root / "wide")
    return {
        "wide": root / "wide" / "bundle",
        "all": make_bundle(root / "all"),
        "uneven": make_bundle(root / "uneven", dtype="f16", sketches=UNEVEN),
        "one": make_bundle(root / "one", sketches=one),
    }


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    with triton_process(interpreted=True, cache=tmp_path_factory.mktemp("cache")) as process:
        yield process


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    with triton_process(interpreted=False, cache=tmp_path_factory.mktemp("cache")) as process:
        yield process


def check(interpreter: Executor, case: Case) -> None:
    found = torch.from_numpy(interpreter.submit(by_kernels, case).result()).double()
    store, resident = case.store(), Resident.of(Bundle(case.bundle), torch.device("cpu"))
    x, y = case.inputs(store)
    exact = expected(resident, store.layers[case.layer], x, case.rows(), y)
    # Sums are in float32, and rounded once.
    margin = ROUNDING[case.dtype] * torch.finfo(case.dtype).eps * exact.abs() + 2e-4 * exact.abs().amax(1, keepdim=True)
    assert ((found - exact).abs() <= margin).all()
    assert torch.equal(found[case.tokens :], y[case.tokens :].double())


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("dtype", SCHEMES_OF)
@pytest.mark.parametrize("bundle", ["all", "uneven"])
def test_few_tokens(
    interpreter: Executor, bundles: dict[str, Path], bundle: str, dtype: torch.dtype, layer: int
) -> None:
    check(interpreter, Case(bundles[bundle], layer, dtype, 23, padding=3, schemes=SCHEMES_OF[dtype]))


@pytest.mark.parametrize("dtype", SCHEMES_OF)
@pytest.mark.parametrize("bundle", ["all", "uneven"])
def test_many_tokens(interpreter: Executor, bundles: dict[str, Path], bundle: str, dtype: torch.dtype) -> None:
    check(interpreter, Case(bundles[bundle], 1, dtype, MANY, padding=14, schemes=SCHEMES_OF[dtype]))


@pytest.mark.parametrize("tokens", [9, MANY])
@pytest.mark.parametrize("bundle", ["all", "uneven"])
def test_loops_and_blocks_of_few_columns(
    interpreter: Executor, bundles: dict[str, Path], bundle: str, tokens: int
) -> None:
    """As modules have them that are larger than those of tests."""
    check(interpreter, Case(bundles[bundle], 1, torch.float32, tokens, padding=2, small=True))


@pytest.mark.parametrize("tokens", [23, MANY])
@pytest.mark.parametrize("split", [(1, 2, False), (3, 4, False), (1, 2, True)])
def test_tensor_parallel_ranks(
    interpreter: Executor, bundles: dict[str, Path], split: tuple[int, int, bool], tokens: int
) -> None:
    check(interpreter, Case(bundles["all"], 1, torch.float32, tokens, split=split))


@pytest.mark.parametrize("tokens", [23, MANY])
def test_bases_of_more_than_sixteen_columns(interpreter: Executor, bundles: dict[str, Path], tokens: int) -> None:
    case = Case(bundles["wide"], 1, torch.float32, tokens, schemes=("diag", "joint"))
    assert {call.tensors[0].shape[-1] for call in case.store().calls(1) if call.operator == "add_cores"} == {16, 32}
    check(interpreter, case)


def test_no_tokens(interpreter: Executor, bundles: dict[str, Path]) -> None:
    check(interpreter, Case(bundles["all"], 1, torch.float32, tokens=0))
    check(interpreter, Case(bundles["all"], 1, torch.float32, tokens=0, padding=4))


def check_compiled(compiler: Executor, case: Case) -> set[tuple[str, str]]:
    found = compiler.submit(compiled, case).result()
    assert {name for name, _ in found} == set(KERNELS)
    return found


@pytest.mark.parametrize("tokens", [2, MANY])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)])
def test_they_compile_for_a_gpu(compiler: Executor, bundles: dict[str, Path], dtype: torch.dtype, tokens: int) -> None:
    check_compiled(compiler, Case(bundles["all"], 1, dtype, tokens))


@pytest.mark.parametrize("tokens", [1, MANY])
@pytest.mark.parametrize("layer", [0, 1])
def test_they_compile_where_numbers_are_1(
    compiler: Executor, bundles: dict[str, Path], layer: int, tokens: int
) -> None:
    """Those are constants to the compiler, and have no ``to``, say, which the interpreter gives them."""
    check_compiled(compiler, Case(bundles["one"], layer, torch.bfloat16, tokens))


@pytest.mark.parametrize(("tokens", "others"), [(16, (1, 2, 17)), (MANY + 14, (MANY, MANY + 1))])
def test_an_engine_compiles_nothing_while_it_answers(
    compiler: Executor, bundles: dict[str, Path], tokens: int, others: tuple[int, ...]
) -> None:
    """What is compiled for some number of tokens, when an engine warms up, is right for all."""
    cases = [Case(bundles["all"], 1, torch.bfloat16, number) for number in (tokens, *others)]
    first, *rest = [check_compiled(compiler, case) for case in cases]
    assert all(each == first for each in rest)
