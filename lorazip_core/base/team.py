"""Several processes at one job, as ``torchrun`` starts them: who does what, and how all come to know the same.

They run the same program. What takes long is dealt out, and results are gathered in the order of the work, so that
they do not depend on how many processes there are. Messages go through gloo and main memory, whatever the devices.

A process is alone until its program says otherwise, with `joined`: variables of torchrun in the environment may be
those of a training that calls this library in one of its processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from .errors import LocalError, PeerEnded

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)  # one process may work on while the others have nothing to do; torchrun notices a death


class _Membership(NamedTuple):
    """How many processes there are, the number of this one, and its number among those of its host."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> _Membership:
        """What torchrun says. RANK and WORLD_SIZE alone may be those of whatever job this runs in."""
        if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        return cls(*(int(os.environ.get(name, "0")) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")))


_membership = _Membership()


def size() -> int:
    """How many processes there are."""
    return _membership.size


def rank() -> int:
    """The number of this one."""
    return _membership.rank


def local_rank() -> int:
    """Its number among those of its host."""
    return _membership.local_rank


def is_first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that ``torchrun`` started; nothing happens where there is only this one.

    For programs that torchrun starts to run this work and nothing else: every one of them has to come here. Raises
    LocalError when they do not find each other.
    """
    global _membership
    found = _Membership.of_environment()
    if found.size == 1 or size() > 1:
        yield
        return
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise LocalError(f"the processes of this run do not find each other: {reason}", "start it again") from error
    _membership = found
    try:
        yield
    finally:
        _membership = _Membership()
        dist.destroy_process_group()


def gathered(own: T) -> list[T]:
    """What every process has, in their order."""
    if size() == 1:
        return [own]
    found: list[T | None] = [None] * size()
    with _all_there():
        dist.all_gather_object(found, own)
    return found  # type: ignore[return-value]


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, for all; where it fails, all raise what it raised."""
    if size() == 1:
        return make()
    made: list[tuple[T | None, Exception | None]] = [(None, None)]
    if is_first():
        try:
            made = [(make(), None)]
        except Exception as error:
            made = [(None, error)]
    with _all_there():
        dist.broadcast_object_list(made, src=0)
    [(found, failure)] = made
    if failure is not None:
        raise failure
    return found  # type: ignore[return-value]


def dealt(count: int) -> range:
    """The numbers out of 0 … ``count`` − 1 that are this process's work."""
    return range(rank(), count, size())


def in_turn(own: Iterator[T], count: int) -> Iterator[T]:
    """The results of all ``count`` pieces of work, in their order, where ``own`` yields those that were `dealt`."""
    if size() == 1:
        yield from own
        return
    for start in range(0, count, size()):
        mine = next(own) if start + rank() < count else None
        yield from gathered(mine)[: count - start]  # type: ignore[misc]


@contextmanager
def _all_there() -> Iterator[None]:
    """Messages to and from all. A process that has ended is no bug of this one, which hears a closed connection."""
    try:
        yield
    except RuntimeError as error:
        raise PeerEnded("another process of this run has ended", "it said why, or torchrun does") from error
