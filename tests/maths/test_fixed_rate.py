"""Components quantised for a fixed number of bits: the best choice, what is predicted, and the codes themselves."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorazip_core.maths import fixed_rate
from lorazip_core.maths.fixed_rate import BITS_OF_COMPONENT, FINEST, choice_for, predicted_of, quantise
from lorazip_core.maths.quantise import MOST, Codes, Components, Spectrum, unpacked_scale
from lorazip_core.schemes.coded_resident import COMPONENT_BYTES, CodedModule, lay_out


def components_of(m: int, d_out: int, d_in: int, rank: int, seed: int = 0, decay: float = 0.7) -> Components:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(m, d_out, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(m, rank, d_in, generator=generator, dtype=torch.float64)
    return Components.of((b * decay ** torch.arange(rank), a))


def lost(codes: Codes, components: Components) -> Tensor:
    scales = unpacked_scale(codes.scale, torch.float64) * codes.kept
    decoded = (codes.u.double() * scales.unsqueeze(-2)) @ codes.v.double()
    return (components.b @ components.a - decoded).square().sum((-2, -1))


def resident_bits(codes: Codes) -> int:
    """Of all components, as they are packed."""
    total = 0
    for u, v, scale, kept in zip(codes.u, codes.v, codes.scale, codes.kept, strict=True):
        module = CodedModule(u.mT[kept].numpy(), v[kept].numpy(), scale[kept].numpy())
        total += 8 * (len(module.scale) * COMPONENT_BYTES + len(lay_out([module])["codes"]) - 1)
    return total


# Max, "Quantizing for minimum distortion" (1960), table II: equally spaced levels for a Gaussian.
@pytest.mark.parametrize(
    ("bits", "spacing", "left"),
    [(2, 0.9957, 0.1188), (3, 0.5860, 0.03744), (4, 0.3352, 0.01154), (5, 0.1881, 0.003495)],
)
def test_levels_are_those_of_the_literature(bits: int, spacing: float, left: float) -> None:
    assert fixed_rate._levels(bits) == pytest.approx((spacing, left), rel=2e-3)
    assert fixed_rate._levels(bits)[1] == pytest.approx(left, rel=1e-3)


def test_a_sign_keeps_two_over_pi() -> None:
    assert fixed_rate._levels(1)[1] == pytest.approx(1 - 2 / math.pi)


SIZES = st.tuples(st.integers(1, 700), st.integers(1, 700))


@settings(deadline=None)
@given(SIZES, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_no_pair_of_bits_is_better(size: tuple[int, int], s: float, step: float) -> None:
    """Of all 64, and of none at all, by what is lost and λ · bits."""
    rate = math.log(2) / 6 * step**2
    best = s**2
    for pair in product(range(1, FINEST + 1), repeat=2):
        kept = math.prod(1 - fixed_rate._left(bits, length) for bits, length in zip(pair, size, strict=True))
        bits = 64 + sum(8 * math.ceil(bits * length / 8) for bits, length in zip(pair, size, strict=True))
        best = min(best, s**2 * (1 - kept) + rate * bits)
    left, bits_of = predicted_of(torch.tensor([s], dtype=torch.float64), *size, step)
    assert float(s**2 * left[0] + rate * bits_of) == pytest.approx(best, rel=1e-9, abs=1e-4 * s**2)


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 24), st.integers(1, 24), st.integers(1, 6)),
    st.integers(0, 999),
    st.floats(0.01, 8.0),
)
def test_the_error_is_that_of_what_is_stored(shape: tuple[int, int, int, int], seed: int, step: float) -> None:
    components = components_of(*shape, seed=seed)
    codes = quantise(components, step)
    assert (codes.u.dtype, codes.v.dtype, codes.scale.dtype) == (torch.int8, torch.int8, torch.int16)
    tolerance = 1e-9 * float(components.energies.max())
    torch.testing.assert_close(codes.squared_errors, lost(codes, components), rtol=1e-9, atol=tolerance)
    assert (codes.squared_errors <= components.energies * (1 + 1e-3)).all()


@settings(deadline=None)
@given(st.integers(0, 999), st.floats(0.02, 4.0))
def test_codes_have_the_bits_that_were_chosen(seed: int, step: float) -> None:
    components = components_of(2, 90, 70, 6, seed=seed)
    codes = quantise(components, step)
    choice = choice_for(90, 70)
    pairs = choice.pairs[choice.of(components.s, step)]
    for side, places in ((codes.u.mT, pairs[..., 0]), (codes.v, pairs[..., 1])):
        for vectors, bits in zip(side, places, strict=True):
            for vector, own in zip(vectors.long(), bits.tolist(), strict=False):
                largest = int(vector.abs().max())
                assert largest == MOST if own == FINEST else largest <= 2**own - 1
                assert own in (0, FINEST) or (vector % 2 == 1).all()


@pytest.mark.parametrize("step", [0.1, 0.3, 0.7, 1.5, 3.0])
def test_what_is_predicted(step: float) -> None:
    """Errors within 5% for Gaussian factors; bits to the last one."""
    components = components_of(16, 511, 384, 12, decay=0.8)
    codes = quantise(components, step)
    left, bits = predicted_of(components.s, 511, 384, step)
    assert float((components.s.square() * left).sum()) == pytest.approx(float(codes.squared_errors.sum()), rel=0.05)
    assert int(bits.sum()) == resident_bits(codes)
    assert BITS_OF_COMPONENT == 8 * COMPONENT_BYTES


def test_coarser_steps_take_less_and_lose_more() -> None:
    components = components_of(3, 60, 50, 8)
    tried = [quantise(components, 2.0**-octave) for octave in range(-3, 7)]
    errors, bits = [float(codes.squared_errors.sum()) for codes in tried], [resident_bits(codes) for codes in tried]
    assert errors == sorted(errors, reverse=True)
    assert bits == sorted(bits)
    assert errors[-1] < 1e-3 * errors[0]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.floats(0.05, 4.0), st.integers(-60, 60))
def test_powers_of_two_scale_errors_and_nothing_else(seed: int, step: float, power: int) -> None:
    components = components_of(2, 30, 20, 5, seed=seed)
    codes = quantise(components, step)
    s, energies = components.s * 2.0**power, components.energies * 4.0**power
    larger = replace(components, b=components.b * 2.0**power, s=s, energies=energies, spectrum=Spectrum(s, s, energies))
    scaled = quantise(larger, step * 2.0**power)
    for one, other in zip(codes[:2], scaled[:2], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(scaled.scale, codes.scale + 32 * power * codes.kept)


def test_updates_of_zero_have_no_components() -> None:
    components = components_of(2, 9, 7, 2)
    nothing = Components.of((components.b * 0, components.a))
    codes = quantise(nothing, 1.0)
    assert (codes.u.shape, codes.v.shape, codes.scale.shape) == ((2, 9, 0), (2, 0, 7), (2, 0))
    assert codes.squared_errors.tolist() == [0, 0]


def test_the_finest_codes_reach_an_outlier() -> None:
    generator = torch.Generator().manual_seed(1)
    b, a = (torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in ((64, 1), (1, 48)))
    b[0, 5] = 50
    components = Components.of((b, a))
    codes = quantise(components, 1e-6)
    assert np.flatnonzero(codes.u[0, :, 0].abs().numpy() == MOST).tolist() == [5]
    assert float(codes.squared_errors[0]) < 1e-3 * float(components.energies[0])
    coarse = quantise(components, 3.0)  # it is cut off, and the scale makes the best of it
    assert 0 < float(coarse.squared_errors[0]) < float(components.energies[0])
