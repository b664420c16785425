"""The second moment that a file of moments stands for."""

from __future__ import annotations

from torch import Tensor

from lorazip_core.model.moments import Moment


def dense(moment: Moment) -> Tensor:
    """H [d_in, d_in] in float32: VᵀV with the diagonal that is kept, or VᵀV's where rounding made that larger."""
    v = moment.directions.float()
    h = v.mT @ v
    h.diagonal().copy_(moment.diagonal.maximum(h.diagonal()))
    return h
