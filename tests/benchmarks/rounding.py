"""Few bits a number, as published quantisers keep them: codes in groups that share one scale in 16 bits.

A level rounds along the last dimension and says how many bits that takes. Scales keep the 11 significant bits of an
f16, with whatever exponent: no group is lost because an adapter is small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rule = Literal["searched", "absmax", "minmax", "bf16"]
SCALE_BITS = 16
_RATIOS = {
    2: (0.45, 0.52, 0.6, 0.7, 0.85),
    3: (0.6, 0.7, 0.8, 0.9, 1.0),
    4: (0.75, 0.82, 0.9, 1.0),
    8: (1.0,),
}
"""Steps that are tried, as shares of the one whose outermost level is the largest number of the group."""


class Level(NamedTuple):
    """How a vector is kept: ``bits`` a number, groups of ``group`` numbers, the last one shorter.

    ``searched``: 2^bits levels ±½, ±1½, … steps; of several steps the best, then fitted by least squares. With one bit
    that is sign × mean. ``absmax``: round to nearest with −h … h, h = 2^(bits−1) − 1, the largest number being h steps.
    ``minmax``: 2^bits levels from the least to the largest number, with a zero point of ``bits``. ``bf16``: no groups.
    """

    bits: int
    group: int = 0
    rule: Rule = "searched"

    def size(self, length: int) -> int:
        """Bits of a vector of ``length``."""
        of_group = SCALE_BITS + (self.bits if self.rule == "minmax" else 0)
        return self.bits * length + (of_group * -(-length // self.group) if self.group else 0)

    def rounded(self, x: Tensor) -> Tensor:
        if self.rule == "bf16":
            return x.bfloat16().to(x.dtype)
        rules: dict[str, Callable[[Tensor], Tensor]] = {"absmax": self._absmax, "minmax": self._minmax}
        of_groups = rules.get(self.rule, self._searched)
        full = x.shape[-1] // self.group * self.group
        parts = []
        if full:
            parts.append(of_groups(x[..., :full].reshape(*x.shape[:-1], -1, self.group)).flatten(-2))
        if full < x.shape[-1]:
            parts.append(of_groups(x[..., full:]))
        return torch.cat(parts, dim=-1)

    def _absmax(self, x: Tensor) -> Tensor:
        most = 2 ** (self.bits - 1) - 1
        step = _eleven_bits(x.abs().amax(-1, keepdim=True) / most)
        return (x / _positive(step)).round().clamp(-most, most) * step

    def _minmax(self, x: Tensor) -> Tensor:
        most = 2**self.bits - 1
        least, largest = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        step = _eleven_bits((largest - least) / most)
        zero = (-least / _positive(step)).round()
        return ((x / _positive(step)).round().add(zero).clamp(0, most) - zero) * step

    def _searched(self, x: Tensor) -> Tensor:
        if self.bits == 1:
            return torch.where(x < 0, -1.0, 1.0) * _eleven_bits(x.abs().mean(-1, keepdim=True))
        half = 2 ** (self.bits - 1)
        widest = x.abs().amax(-1, keepdim=True) / (half - 0.5)
        best = step = kept = None
        for ratio in _RATIOS[self.bits]:
            codes = (x / _positive(ratio * widest)).floor_().clamp_(-half, half - 1).add_(0.5)
            inner, norm = (x * codes).sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True)
            gain = inner.square() / norm  # of ‖x‖², with the best step for these codes
            if best is None or step is None or kept is None:
                best, step, kept = gain, inner / norm, codes
                continue
            better = gain > best
            best = torch.where(better, gain, best)
            step = torch.where(better, inner / norm, step)
            kept = torch.where(better, codes, kept)
        assert step is not None
        assert kept is not None
        return kept * _eleven_bits(step)


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)


def _eleven_bits(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2048).round() / 2048, exponent)
