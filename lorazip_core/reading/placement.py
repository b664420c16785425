"""Where the bytes of a collection go while they are read: decided from sizes alone."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from ..base.threads import cores

_RESIDENT_SHARE = 0.6  # of the bound: what else is computed with, stacks in float32 above all, needs the rest
_STAGING_SHARE = 0.125  # of the bound, for each of the two blocks that are on the device at a time
# Bytes: enough adapters for all readers, and few enough that what is computed follows on their heels.
_MOST_IN_BLOCK = 2**31
_MOST_ON_HOST = 2**26  # bytes: small adapters together, so that threads seldom wait for each other


class Placement(NamedTuple):
    """``resident``: on the device, to stay. ``streamed``: there in turns. ``host``: in memory, in every thread a
    block at a time.

    ``block_bytes`` is how much is read before it is worked on, a single adapter at least.
    """

    kind: Literal["host", "resident", "streamed"]
    block_bytes: int


HOST = Placement("host", 0)


def choose_placement(device: torch.device, total: int, largest: int, device_memory: int) -> Placement:
    """The placement of ``total`` bytes of tensors, at most ``largest`` an adapter, within ``device_memory`` bytes."""
    if device.type == "cpu":
        return HOST
    if fits_to_stay(total, device_memory):
        return Placement("resident", _MOST_IN_BLOCK)
    passing = placement_of_one_pass(device, total, largest, device_memory)
    return passing if passing.kind == "streamed" else HOST


def placement_of_one_pass(device: torch.device, total: int, largest: int, device_memory: int) -> Placement:
    """The placement of tensors that are read once and do not stay. On the host, small adapters share a block."""
    staging = int(_STAGING_SHARE * device_memory)
    if device.type == "cpu" or largest > staging:
        return Placement("host", min(_MOST_ON_HOST, total // (4 * cores())))
    return Placement("streamed", min(_MOST_IN_BLOCK, staging))


def fits_to_stay(total: int, device_memory: int) -> bool:
    """Whether ``total`` bytes of tensors are kept on a device of which ``device_memory`` bytes may be used."""
    return total <= _RESIDENT_SHARE * device_memory
