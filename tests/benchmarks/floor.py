"""The least time that factorising a collection can take on one device, from operations and bytes alone.

A *pass* multiplies every factor with a basis of k columns: Y_i = B_iᵀ U and X_i = A_i V, 2 r (d_out + d_in) k
operations for each adapter and module; with the way back, Σ B_i (X_i P_i) and its twin, twice that. It reads every
factor once, in bf16, and each cluster's bases once in float32 (and writes them when there is a way back).
Orthonormalising what comes back takes 4 d k² operations a basis (two rounds of Cholesky-QR: a Gram matrix and a
triangular product each). A pass takes the longer of its bytes at full bandwidth and its operations at full speed;
passes follow each other.

Nothing here is about launches, small matrices, or waiting; what a run takes above it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

BF16, F32 = 2, 4


class Pass(NamedTuple):
    """``count`` passes over all factors with bases of ``width`` columns; ``exact`` in float64.

    ``everywhere``: every adapter with the bases of all clusters, not only with those of its own.
    """

    width: int
    count: int = 1
    back: bool = False
    exact: bool = False
    everywhere: bool = False


@dataclass(frozen=True)
class Device:
    """Bytes a second, operations a second in float32 (no tensor cores) and in float64 (tensor cores)."""

    bandwidth: float = 3.35e12
    f32: float = 67e12
    f64: float = 67e12


class Floor(NamedTuple):
    """Of all passes together; ``seconds`` adds up the longer of both for every pass."""

    bytes: int
    operations: int
    seconds: float


def floor(
    adapters: int,
    modules: Sequence[tuple[int, int]],
    rank: int,
    clusters: int,
    passes: Sequence[Pass],
    device: Device = Device(),
) -> Floor:
    """Of ``adapters`` of one ``rank`` with modules of shapes (d_out, d_in), each in one of ``clusters``."""
    sides = sum(d_out + d_in for d_out, d_in in modules)
    total_bytes = total_operations = 0
    seconds = 0.0
    for one in passes:
        ways = 2 if one.back else 1
        moved = adapters * rank * sides * BF16 + ways * clusters * sides * one.width * F32
        operations = ways * 2 * adapters * rank * sides * one.width * (clusters if one.everywhere else 1)
        if one.back:
            operations += 4 * clusters * sides * one.width**2
        speed = device.f64 if one.exact else device.f32
        seconds += one.count * max(moved / device.bandwidth, operations / speed)
        total_bytes += one.count * moved
        total_operations += one.count * operations
    return Floor(total_bytes, total_operations, seconds)


def parse_pass(text: str) -> Pass:
    """``WIDTH[xCOUNT][FLAGS]``, like 64x2b, twice 64 columns and back: b back, e exact, a everywhere."""
    words = text.rstrip("bea")
    flags = text[len(words) :]
    width, _, count = words.partition("x")
    try:
        return Pass(int(width), int(count or 1), "b" in flags, "e" in flags, "a" in flags)
    except ValueError:
        raise SystemExit(f"{text!r} is no pass: WIDTH[xCOUNT][b][e][a]") from None


def table(adapters: int, modules: Sequence[tuple[int, int]], of: Floor, measured: float | None) -> str:
    """The floor in words, and how many times as long ``measured`` seconds are."""
    text = (
        f"{adapters:,} adapters, {len(modules)} modules: {of.bytes / 1e9:.1f} GB moved,"
        f" {of.operations / 1e12:.2f} TFLOP, floor {1e3 * of.seconds:.1f} ms"
    )
    return (
        text if measured is None else f"{text}; measured {measured:.3f} s: {measured / of.seconds:.1f} times the floor"
    )
