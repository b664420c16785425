"""Independent pieces of work on all cores of the CPU, one thread each.

The matrices of one module are too small for several threads to share, and the result of a product can depend on how
many there are. So pieces run side by side and each uses one thread: faster, and the same bytes on any number of cores.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

import torch

from .stopping import check_stop, stop_with

T = TypeVar("T")
R = TypeVar("R")

_MOST = 16  # workers: each holds the factors of a pack
_limit = _MOST


def cores() -> int:
    """The cores that this process may use, as far as they are worth a worker each."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST, there)


@contextmanager
def at_most(workers: int) -> Iterator[None]:
    """Have no more than ``workers`` at work at a time, so that memory is bounded; what they make stays the same."""
    global _limit
    before, _limit = _limit, workers
    try:
        yield
    finally:
        _limit = before


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of PyTorch for each step of this thread, also beside a GPU: the steps are small.

    More of them would wait for each other, longest where other programs want the cores too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(
    function: Callable[[T], R], items: Iterable[T], device: torch.device, *, workers: int = _MOST
) -> Generator[R, None, None]:
    """``function`` of every item, in the order of the items, several at once on the CPU and one by one on a GPU.

    Few results wait at any time, so that a slow consumer does not fill the memory. Whoever may not use them all closes
    the generator: what is under way ends at its next `check_stop`, and nothing runs any more when `close` returns.
    """
    if device.type != "cpu":
        for item in items:
            check_stop()
            yield function(item)
        return
    threads = torch.get_num_threads()
    workers = min(workers, _limit, cores())
    abandoned = Event()
    pool = ThreadPoolExecutor(workers, initializer=_start_worker, initargs=(abandoned,))
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            check_stop()
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        abandoned.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _start_worker(abandoned: Event) -> None:
    torch.set_num_threads(1)
    stop_with(abandoned)


def delayed(items: Iterable[T], count: int) -> Iterator[T]:
    """The items in order, each when ``count`` later ones have been made, or all."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def each_done(pool: ThreadPoolExecutor, function: Callable[[T], object], items: Iterable[T]) -> None:
    """``function`` of every item by the threads of ``pool``. Returns when all have ended, or raises what one raised."""
    running = [pool.submit(function, item) for item in items]
    wait(running)
    for each in running:
        each.result()


def loaded_ahead(load: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """``load`` of every item, in order, each while the caller still works with the one before."""
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[R] | None = None
        for item in items:
            loading = pool.submit(load, item)
            if waiting is not None:
                yield waiting.result()
            waiting = loading
        if waiting is not None:
            yield waiting.result()
