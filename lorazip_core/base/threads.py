"""Work in several threads: computations, one thread of PyTorch each, and work that waits for files or servers.

The matrices of one module are too small for several threads to share, and the result of a product can depend on how
many there are. So pieces run side by side and each uses one thread: faster, and the same bytes on any number of cores.

PyTorch, which takes seconds to load, is imported by those that compute with it and not by this module.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING, TypeVar

from .stopping import check_stop, stop_with

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

_MOST = 16  # workers: each holds the factors of a pack
_limit = _MOST


def cores() -> int:
    """The cores that this process may use, at most as many as `in_order` has workers."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST, there)


@contextmanager
def at_most(workers: int) -> Iterator[None]:
    """Let `in_order` have at most so many workers in the block, which bounds memory; the results stay the same."""
    global _limit
    before, _limit = _limit, workers
    try:
        yield
    finally:
        _limit = before


@contextmanager
def thread_pool(threads: int) -> Iterator[Executor]:
    """Threads for work that waits more than it computes; what has not begun when the block ends never does."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread on the CPU in the block, also when a GPU computes: the steps are small.

    More threads would wait for each other, longest where other programs want the cores too.
    """
    import torch

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

    At most as many results as ``workers`` wait, so that a slow consumer does not fill the memory; with one worker, each
    item is computed while the caller still uses the result before. A caller that may not use all of them closes the
    generator: what is under way ends at its next `check_stop`, and nothing runs any more when `close` returns.
    """
    if device.type != "cpu":
        for item in items:
            check_stop()
            yield function(item)
        return
    import torch

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
    import torch

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
