"""Quantised components: their errors are those of what is stored, and about what was predicted."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorazip_core.maths import fixed_rate
from lorazip_core.maths import quantise as quantise_
from lorazip_core.maths.quantise import (
    MOST,
    WEAKEST,
    Codes,
    Components,
    Spectrum,
    losses_of,
    predicted_of,
    predicted_step,
    quantise,
    unpacked_scale,
)
from lorazip_core.maths.weighting import DAMPING, InputMoments


def factors(m: int, d_out: int, d_in: int, rank: int, seed: int = 0, decay: float = 0.7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(m, d_out, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(m, rank, d_in, generator=generator, dtype=torch.float64)
    return b * decay ** torch.arange(rank), a


def components_of(b: Tensor, a: Tensor) -> Components:
    return Components.of((b, a))


def predicted(components: Components, step: float) -> tuple[Tensor, Tensor]:
    """What every update will lose [m], and its bits [m]."""
    left, bits = predicted_of(components.spectrum.strengths, components.b.shape[-2], components.a.shape[-1], step)
    return (components.s.square() * left).sum(-1), bits


def decoded(codes: Codes) -> Tensor:
    scales = unpacked_scale(codes.scale, torch.float64) * codes.kept
    return (codes.u.double() * scales.unsqueeze(-2)) @ codes.v.double()


def lost(codes: Codes, dense: Tensor) -> Tensor:
    return (dense - decoded(codes)).square().sum((-2, -1))


def assert_same(one: Codes, other: Codes) -> None:
    for each, also in zip(one, other, strict=True):
        assert torch.equal(each, also)


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 24), st.integers(1, 24), st.integers(1, 6))
STEPS = st.floats(0.01, 8.0)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 999), STEPS)
def test_the_error_is_that_of_what_is_stored(shape: tuple[int, int, int, int], seed: int, step: float) -> None:
    b, a = factors(*shape, seed=seed)
    codes = quantise(components_of(b, a), step)
    assert (codes.u.dtype, codes.v.dtype, codes.scale.dtype) == (torch.int8, torch.int8, torch.int16)
    norms = (b @ a).square().sum((-2, -1))
    torch.testing.assert_close(codes.squared_errors, lost(codes, b @ a), rtol=1e-9, atol=1e-9 * float(norms.max()))
    assert (codes.squared_errors <= norms * (1 + 1e-3)).all()  # nothing that is kept makes it worse, but for rounding


def test_finer_steps_lose_less() -> None:
    components = components_of(*factors(3, 60, 50, 8))
    errors = [float(quantise(components, 2.0**-octave).squared_errors.sum()) for octave in range(-3, 5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.integers(0, 999), STEPS)
def test_signs_of_pairs_and_the_order_of_modules_do_not_matter(
    shape: tuple[int, int, int, int], seed: int, step: float
) -> None:
    components = components_of(*factors(*shape, seed=seed))
    codes = quantise(components, step)
    signs = torch.randint(0, 2, components.s.shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    turned = quantise(
        replace(components, x=components.x * signs.unsqueeze(-2), y=components.y * signs.unsqueeze(-1)), step
    )
    most = codes.scale.shape[-1]
    assert torch.equal(turned.u, (codes.u * signs[:, None, :most]).to(torch.int8))
    assert torch.equal(turned.scale, codes.scale)
    torch.testing.assert_close(turned.squared_errors, codes.squared_errors, rtol=1e-9, atol=1e-9)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    permuted = quantise(components_of(components.b[order], components.a[order]), step)
    assert torch.equal(permuted.u, codes.u[order])
    assert torch.equal(permuted.v, codes.v[order])
    assert torch.equal(permuted.kept, codes.kept[order])


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.integers(0, 999), STEPS, st.integers(-60, 60))
def test_powers_of_two_scale_errors_and_nothing_else(
    shape: tuple[int, int, int, int], seed: int, step: float, power: int
) -> None:
    components = components_of(*factors(*shape, seed=seed))
    codes = quantise(components, step)
    s, energies = components.s * 2.0**power, components.energies * 4.0**power
    larger = replace(components, b=components.b * 2.0**power, s=s, energies=energies, spectrum=Spectrum(s, s, energies))
    scaled = quantise(larger, step * 2.0**power)
    assert_same(
        scaled._replace(scale=scaled.scale - 32 * power * scaled.kept, squared_errors=codes.squared_errors), codes
    )
    torch.testing.assert_close(scaled.squared_errors, codes.squared_errors * 4.0**power, rtol=1e-6, atol=0)


def test_updates_of_zero_have_no_components() -> None:
    b, a = factors(3, 9, 7, 2)
    b[1] = 0
    codes = quantise(components_of(b, a), 0.1)
    assert codes.kept.any(-1).tolist() == [True, False, True]
    assert float(codes.squared_errors[1]) == 0
    assert not codes.u[1].any()
    nothing = quantise(components_of(b * 0, a), 1.0)
    assert (nothing.u.shape, nothing.v.shape, nothing.scale.shape) == ((3, 9, 0), (3, 0, 7), (3, 0))
    assert nothing.squared_errors.tolist() == [0, 0, 0]


def test_a_rank_that_is_not_there_is_not_kept() -> None:
    b, a = factors(2, 30, 20, 3)
    doubled = torch.cat([b, b], -1), torch.cat([a, a], -2)
    codes = quantise(components_of(*doubled), 0.01)
    assert codes.kept.sum(-1).tolist() == [3, 3]
    torch.testing.assert_close(codes.squared_errors, lost(codes, 2 * b @ a), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("power", [20, 60])
def test_factors_of_any_size_that_make_up_for_each_other(power: int) -> None:
    b, a = factors(2, 40, 30, 4)
    apart = 2.0 ** torch.tensor([power, 0.0, -power, 3.0], dtype=torch.float64)
    usual, odd = (quantise(components_of(*each), 0.1) for each in ((b, a), (b * apart, a / apart[:, None])))
    torch.testing.assert_close(odd.squared_errors, usual.squared_errors, rtol=1e-3, atol=0)


def test_an_outlier_is_the_largest_code_and_makes_its_component_coarser() -> None:
    b, a = factors(1, 64, 48, 1)
    b[0, 5] = 1e4
    components = components_of(b, a)
    codes = quantise(components, 1e-3)
    assert (codes.u[0, :, 0].abs() == MOST).nonzero().flatten().tolist() == [5]
    assert int(codes.u.long().abs().max()) == int(codes.v.long().abs().max()) == MOST
    torch.testing.assert_close(codes.squared_errors, lost(codes, b @ a), rtol=1e-9, atol=0)
    assert codes.squared_errors[0] < 0.01 * (b @ a).square().sum()


def test_steps_and_components_that_are_kept() -> None:
    components = components_of(*factors(2, 40, 40, 6))
    step = 1.0
    codes = quantise(components, step)
    expected = components.deviations >= step / WEAKEST
    assert torch.equal(codes.kept, expected[:, : codes.kept.shape[1]])
    assert not expected[:, codes.kept.shape[1] :].any()


@pytest.mark.parametrize("step", [0.1, 0.3, 0.7, 1.5])
def test_what_is_predicted(step: float) -> None:
    """Within 5% for factors that are as Gaussian as those that it was made for; bits are held against the entropy."""
    components = components_of(*factors(32, 512, 384, 12, decay=0.8))
    error, bits = predicted(components, step)
    codes = quantise(components, step)
    assert float(error.sum()) == pytest.approx(float(codes.squared_errors.sum()), rel=0.05)
    entropy = 0.0
    for side in (codes.u.mT, codes.v):
        for vector in side[codes.kept]:
            shares = vector.unique(return_counts=True)[1].double() / len(vector)
            entropy -= float((shares * shares.log2()).sum()) * len(vector)
            entropy += (len(shares) - 1) / (2 * math.log(2))  # Miller and Madow: so much a sample shows too little
    assert float(bits.sum()) == pytest.approx(entropy + 12 * int(codes.kept.sum()), rel=0.05)


@pytest.mark.parametrize("share", [0.3, 0.1, 0.01])
def test_a_predicted_step_loses_about_its_limit(share: float) -> None:
    components = [components_of(*factors(3, 400, 300, 16, seed)) for seed in range(2)]
    limit = share * sum(float(each.s.square().sum()) for each in components)
    step = predicted_step(components, limit, losses_of(components))
    real = sum(float(quantise(each, step).squared_errors.sum()) for each in components)
    assert real == pytest.approx(limit, rel=0.1)


@pytest.mark.parametrize("module", [quantise_, fixed_rate])
def test_losses_are_those_that_are_predicted_of_components(module: ModuleType) -> None:
    """Of updates of two sizes; the coarsest step leaves nothing, the finest one is beyond the curves, and with one the
    strongest component is just not worth to be kept."""
    sizes = [(40, 300), (90, 20)]
    components = [components_of(*factors(3, *size, 7, seed)) for seed, size in enumerate(sizes)]
    just_dropped = math.log2(components[0].widest[0] * WEAKEST) + 0.5 / 64
    steps = torch.tensor([-30.0, -2.0, 0.0, just_dropped, 1.4, 6.0], dtype=torch.float64)
    expected = torch.zeros_like(steps)
    for each, size in zip(components, sizes, strict=True):
        for place, step in enumerate(steps.exp2().tolist()):
            expected[place] += (each.s.square() * module.predicted_of(each.s, *size, step)[0]).sum()
    assert expected[-1] == pytest.approx(sum(float(each.energies.sum()) for each in components))
    torch.testing.assert_close(module.losses_of(components)(steps), expected, rtol=1e-9, atol=0)


def test_updates_of_several_shapes_are_decomposed_as_each_alone() -> None:
    exact = [factors(2, 30, 20, 5, 0), factors(4, 10, 50, 5, 1), factors(1, 20, 30, 5, 2)]
    moments = [inputs_of(len(a), a.shape[-1], seed) for seed, (_, a) in enumerate(exact)]
    for inputs in (None, moments):
        together = Components.of_all(exact, inputs)
        for number, (each, both) in enumerate(zip(together, exact, strict=True)):
            alone = Components.of(both, None if inputs is None else inputs[number])
            for name in ("s", "energies", "lengths", "deviations"):
                torch.testing.assert_close(getattr(each, name), getattr(alone, name), rtol=1e-9, atol=0)
            torch.testing.assert_close(each.x @ each.y, alone.x @ alone.y, rtol=1e-9, atol=1e-12)
            assert each.widest == each.deviations.amax(0).tolist()
            assert torch.equal(each.spectrum.energies, each.energies)
            assert torch.equal(each.spectrum.s, each.s)


def test_scales_are_the_nearest_ones() -> None:
    """One component: whatever other scale it had, it would lose more."""
    b, a = factors(1, 20, 30, 1)
    codes = quantise(components_of(b, a), 0.5)
    for other in (-1, 1):
        moved = codes._replace(scale=codes.scale + other)
        assert float(lost(moved, b @ a)) > float(codes.squared_errors)


def test_codes_do_not_depend_on_threads() -> None:
    components = [components_of(*factors(2, 120, 90, 8, seed)) for seed in range(8)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([quantise(each, 0.3) for each in components])
        torch.set_num_threads(1)
        for order in (components, components[::-1]):
            with ThreadPoolExecutor(4) as pool:
                results = list(pool.map(lambda each: quantise(each, 0.3), order))
            found.append(results if order is components else results[::-1])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, also in zip(found[0], other, strict=True):
            for name in ("u", "v", "scale", "kept"):
                assert torch.equal(getattr(one, name), getattr(also, name))


def inputs_of(m: int, d_in: int, seed: int = 0) -> InputMoments:
    """Of inputs whose directions differ much in size."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(m, 3, d_in, generator=generator, dtype=torch.float64) * torch.tensor([[5.0], [2.0], [0.5]])
    rest = torch.rand(m, d_in, generator=generator, dtype=torch.float64) ** 4
    return InputMoments.of(directions.square().sum(-2) + rest, directions)


def lost_of_outputs(codes: Codes, dense: Tensor, inputs: InputMoments) -> Tensor:
    rest = dense - decoded(codes)
    return inputs.between(rest, rest).diagonal(dim1=-2, dim2=-1).sum(-1) + DAMPING * rest.square().sum((-2, -1))


@settings(deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_components_for_outputs_are_singular_under_the_moments(shape: tuple[int, int, int, int], seed: int) -> None:
    m, _, d_in, rank = shape
    b, a = factors(*shape, seed=seed)
    inputs = inputs_of(m, d_in, seed)
    found = Components.of((b, a), inputs)
    su, v = b @ found.x, found.y @ a
    torch.testing.assert_close(su @ v, b @ a, rtol=1e-5, atol=1e-6 * float((b @ a).abs().max()))
    under = inputs.between(v, v) + DAMPING * (v @ v.mT)
    there = found.s > 1e-4 * found.s[..., :1]
    both = there.unsqueeze(-1) & there.unsqueeze(-2)
    torch.testing.assert_close(under * both, torch.eye(rank, dtype=torch.float64) * both, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(su.square().sum(-2).sqrt() * there, found.s * there, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(v.square().sum(-1).sqrt() * there, found.lengths * there, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.energies, (b @ a).square().sum((-2, -1)))


@pytest.mark.parametrize("seed", range(4))
def test_codes_for_outputs_lose_less_of_them_in_as_many_bits(seed: int) -> None:
    b, a = factors(3, 96, 64, 6, seed=seed)
    inputs, dense = inputs_of(3, 64, seed), b @ a
    plain, weighted = Components.of((b, a)), Components.of((b, a), inputs)
    step = 0.3 * float(plain.s.max()) / 64**0.5
    bits = float(predicted(plain, step)[1].sum())
    low, high = 0.1 * step, 10 * step
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if float(predicted(weighted, middle)[1].sum()) > bits else (low, middle)
    for_weights, for_outputs = quantise(plain, step), quantise(weighted, high)
    assert lost_of_outputs(for_outputs, dense, inputs).sum() < 0.9 * lost_of_outputs(for_weights, dense, inputs).sum()
    assert lost(for_outputs, dense).sum() > lost(for_weights, dense).sum()
    torch.testing.assert_close(for_outputs.squared_errors, lost(for_outputs, dense))


def test_scales_for_outputs_are_the_best() -> None:
    b, a = factors(1, 24, 16, 3)
    inputs = inputs_of(1, 16)
    codes = quantise(Components.of((b, a), inputs), 1.0)
    best = float(lost_of_outputs(codes, b @ a, inputs))
    for change in (-1, 1):
        for place in range(codes.scale.shape[-1]):
            scale = codes.scale.clone()
            scale[0, place] += 2 * change  # one is within rounding
            assert best <= float(lost_of_outputs(codes._replace(scale=scale), b @ a, inputs))


def test_inputs_that_are_all_alike_change_nothing() -> None:
    b, a = factors(2, 30, 20, 4)
    alike = InputMoments(torch.zeros(2, 1, 20, dtype=torch.float64), torch.ones(2, 20, dtype=torch.float64))
    plain, weighted = (
        quantise(Components.of((b, a)), 0.7),
        quantise(Components.of((b, a), alike), 0.7 * (1 + DAMPING) ** 0.25),
    )
    torch.testing.assert_close(weighted.squared_errors, plain.squared_errors, rtol=0.3, atol=0)
