"""What `coded_bases.py` makes of bundles: errors as those of dense matrices, bytes that are the streams'."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from testing.random_adapters import plain, write_collection

sys.path.insert(0, str(Path(__file__).parent))

import coded_bases
from coded_bases import Bits, Coded, OneStep, Problem

from lorazip_core.adapter.collection import Collection, open_collection
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.maths.stack import Stack
from lorazip_core.planning.options import CompressOptions
from lorazip_core.schemes.streams import unpack_streams

METHODS = ("joint", "diag")


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return open_collection(write_collection(tmp_path_factory.mktemp("real"), plain(6, groups=2), seed=3))


@pytest.fixture(scope="module", params=METHODS)
def bundle(request: pytest.FixtureRequest, collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "bundle"
    compress(collection.root, path, CompressOptions(method=request.param, rank=4, clusters=2, device="cpu"))
    return path


def problem(diagonal: bool) -> Problem:
    """Three updates of rank 2 and other energies, and bases that hold them nearly; columns unequal."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, v = torch.linalg.qr(normal(20, 3)).Q, torch.linalg.qr(normal(30, 3)).Q
    factors = [((u @ normal(3, 2) + 0.01 * normal(20, 2)) * 10.0**i, normal(2, 3) @ v.mT) for i in range(3)]
    stack = Stack.of(factors, range(3))
    return Problem(u, v, stack, 1 / stack.squared_norms(), diagonal)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("rounding", [Bits(8, 8), Bits(4, 4), OneStep(0.5)])
def test_what_is_lost_is_that_of_dense_matrices(rounding: coded_bases.Rounding, diagonal: bool) -> None:
    of = problem(diagonal)
    coded = coded_bases.code(of, rounding)
    rank, n = 3, 3
    scales = torch.exp2(torch.from_numpy(coded.exponents).double() / 32)
    u, v = (
        torch.stack([torch.from_numpy(coded.vectors[first + k]) * scales[first + k] for k in range(rank)], 1)
        for first in (0, rank)
    )
    codes = torch.stack([torch.from_numpy(vector) for vector in coded.vectors[2 * rank :]])  # by row of the cores
    own = scales[2 * rank :]
    if diagonal:
        # Numbers of a diagonal have scales that belong to the bases, which is the same ΔŴ.
        exact = coded_bases.fitted(of, of.u, of.v)
        even = (exact.square() * of.weights[:, None]).sum(0).sqrt() if isinstance(rounding, Bits) else torch.ones(rank)
        cores = torch.diag_embed(codes.mT * own[:, None] * even)
    else:
        cores = codes.view(rank, n, rank).transpose(0, 1) * (
            own.view(n, rank, 1) if isinstance(rounding, Bits) else own.view(n, 1, 1)
        )
    exact = torch.cat([b @ a for b, a, _ in of.stack.factors()])
    lost = (exact - u @ cores @ v.mT).square().sum((1, 2))
    torch.testing.assert_close(coded.lost, lost, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("diagonal", [False, True])
def test_one_step_is_the_same_for_all_by_what_an_error_costs(diagonal: bool) -> None:
    of = problem(diagonal)
    scales = torch.exp2(torch.from_numpy(coded_bases.code(of, OneStep(0.5)).exponents).double() / 32)
    cores = coded_bases.fitted(of, of.u, of.v).square() * of.weights.view(-1, *[1] * (1 if diagonal else 2))
    costs = [cores.sum(0)] * 2 if diagonal else [cores.sum((0, 2)), cores.sum((0, 1))]
    steps = scales * torch.cat([*costs, of.weights]).sqrt()
    assert float(steps.max() / steps.min()) < 1.03  # they are rounded up, by a 32nd of an octave at most


def test_errors_of_eight_bits_are_nearly_those_of_the_bundle(bundle: Path, collection: Collection) -> None:
    claimed = [adapter.squared_error for adapter in Bundle(bundle).manifest.adapters]
    points = {point.setting.partition(", ")[2]: point for point in coded_bases.points(bundle, collection, "it")}
    eight, four = points["8 and 8 bits"], points["4 and 4 bits"]
    # How collinear the bases are, and so how much their rounding costs, differs a little from processor to processor.
    assert eight.mean == pytest.approx(sum(claimed) / len(claimed), rel=0.1)
    assert eight.worst == pytest.approx(max(claimed), rel=0.1)
    assert four.mean > 1.2 * eight.mean
    assert eight.bytes > four.bytes
    steps = [points[f"step {step:g}"] for step in (0.125, 0.25, 0.5, 1.0, 2.0)]
    assert [point.mean for point in steps] == sorted(point.mean for point in steps)
    assert [point.bytes for point in steps] == sorted((point.bytes for point in steps), reverse=True)


def test_bundles_with_adapters_on_their_own_are_refused(collection: Collection, tmp_path: Path) -> None:
    compress(collection.root, tmp_path / "own", CompressOptions(device="cpu"))
    with pytest.raises(ValueError, match="not all adapters are in clusters"):
        coded_bases.points(tmp_path / "own", collection, "")


def test_scales_are_the_best_of_those_tried() -> None:
    x = torch.randn(20, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bits, at_most in ((8, 1e-3), (4, 0.016)):
        found = coded_bases.rounded(x, bits)
        assert int(found.codes.abs().max()) <= 2 ** (bits - 1) - 1
        assert float((found.values - x).square().mean()) < at_most
    # One outlier: what a step that reaches it would lose is more than what clipping it does.
    x[:, 0] = 8
    clipped = coded_bases.rounded(x, 4)
    reaching = (x / (8 / 7)).round() * (8 / 7)
    assert float((clipped.values - x).square().sum()) < float((reaching - x).square().sum())


def test_a_step_is_coarser_where_a_code_would_not_fit() -> None:
    found = coded_bases.stepped(
        torch.tensor([[1.0, -0.3], [1000.0, -4.0]], dtype=torch.float64), torch.tensor([0.1, 0.1])
    )
    assert found.codes[0].tolist() == [10, -3]
    assert found.codes[1].tolist()[0] in (125, 126, 127)
    assert float(found.values[1, 0]) == pytest.approx(1000, rel=0.01)


def test_bytes_are_those_of_streams_that_can_be_read(bundle: Path, collection: Collection) -> None:
    vectors = [np.arange(-7, 8, dtype=np.int8)] * 4 + [np.full(40, 100, np.int8)]
    coded = Coded(vectors, np.arange(5, dtype=np.int64), torch.zeros(1))
    size = coded_bases.packed_bytes([coded])
    codes, lengths = np.concatenate(vectors), np.array([15] * 4 + [40])
    streams, kinds = coded_bases.assign_streams(lengths, coded_bases.measure(codes, lengths))
    data = coded_bases.pack_streams(codes, lengths, streams, kinds)
    assert (unpack_streams(data, lengths, streams, kinds) == codes).all()
    # Two kinds of streams; and three deflated columns of five numbers, at most as long as if stored.
    assert len(data) + len(kinds) + 3 <= size <= len(data) + len(kinds) + 3 * (5 + 5)
    assert math.isclose(coded_bases.packed_bytes([coded, coded]), size, rel_tol=0.9)
