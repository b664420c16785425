"""Triton in a process of its own, since it is decided for good when it is imported: interpreted, or for which GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lorazip_core.bundle.reader import Bundle
from lorazip_core.schemes.registry import SCHEMES
from lorazip_core.serving.store import NONE, AdapterStore
from testing.device_tables import computed, inputs, layers

KERNELS = "_shrink_terms", "_expand_terms", "_shrink_bases", "_expand_bases"


class Case(NamedTuple):
    """A batch for a layer of a bundle."""

    bundle: Path
    layer: int
    dtype: torch.dtype
    tokens: int
    padding: int = 0
    split: tuple[int, int, bool] = (0, 1, False)
    """Arguments of `layers`."""
    schemes: tuple[str, ...] = tuple(SCHEMES)
    """Those of the adapters in the batch."""
    small: bool = False
    """Work is cut so small that every loop of the kernels runs several times, and every slice has several blocks."""

    def store(self) -> AdapterStore:
        rank, ranks, by_rows = self.split
        own = layers(rank, ranks, by_rows=by_rows)
        return AdapterStore(Bundle(self.bundle), own, device=torch.device("cpu"), dtype=self.dtype)

    def rows(self) -> list[int]:
        """For each token an adapter of the bundle, by its place there, or none."""
        adapters = enumerate(Bundle(self.bundle).manifest.adapters)
        some = [NONE, *(place for place, adapter in adapters if adapter.scheme in self.schemes)]
        return np.random.default_rng(self.tokens).choice(some, self.tokens).tolist()

    def numbers(self, store: AdapterStore) -> list[int]:
        """The same by number in the store."""
        names = [adapter.name for adapter in Bundle(self.bundle).manifest.adapters]
        return [NONE if row == NONE else store.numbers[names[row]] for row in self.rows()]

    def inputs(self, store: AdapterStore) -> tuple[Tensor, Tensor]:
        """x and y."""
        return inputs(store.layers[self.layer], self.tokens + self.padding, self.dtype, seed=self.tokens)


@contextmanager
def triton_process(*, interpreted: bool, cache: Path) -> Iterator[Executor]:
    """A process for `by_kernels`, where it is ``interpreted``, or for `compiled`."""
    before = {name: os.environ.get(name) for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "OMP_NUM_THREADS")}
    os.environ |= {
        "TRITON_INTERPRET": str(int(interpreted)),
        "TRITON_CACHE_DIR": str(cache),  # none that was there before
        "OMP_NUM_THREADS": "1",
    }
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            process.submit(int).result()  # it has begun, with these variables
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        yield process


def by_kernels(case: Case) -> Any:
    """What the kernels make of y, as an array of float32."""
    from lorazip_core.serving import kernels

    store = case.store()
    x, y = case.inputs(store)
    with _small_cuts() if case.small else nullcontext():
        found = computed(store, case.layer, x, case.numbers(store), y, case.padding, operators=kernels)
    return found.float().numpy()


@contextmanager
def _small_cuts() -> Iterator[None]:
    from lorazip_core.serving.kernels import cores, terms
    from lorazip_core.serving.kernels.cuts import Cuts, Expand, Shrink

    small = Cuts(Shrink(1, 16, 1, groups=2), Expand(16, 1))
    with pytest.MonkeyPatch.context() as patch:
        for module in (cores, terms):
            patch.setattr(module, "OF_FEW", small)
            patch.setattr(module, "OF_MANY", small)
        patch.setattr(terms, "OF_MANY", small._replace(shrink=small.shrink._replace(terms=16)))
        yield


def compiled(case: Case) -> set[tuple[str, str]]:
    """The kernels that the case needs, compiled for a Hopper GPU, which need not be there: each by its name and by what
    was compiled. Nothing is computed."""
    import triton
    from triton.backends.compiler import GPUTarget

    from lorazip_core.serving.kernels import cores, terms

    class Driver:
        """As much of one as compiling asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    class OnlyCompiled:
        """In the place of a kernel that is launched."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **constants: Any) -> None:
                made = self.kernel.warmup(*arguments, grid=grid, **constants)
                assert "cubin" in made.asm
                found.add((self.kernel.__name__, made.hash))

            return launch

    found: set[tuple[str, str]] = set()
    triton.runtime.driver.set_active(Driver())
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            module = terms if name.endswith("terms") else cores
            patch.setattr(module, name, OnlyCompiled(getattr(module, name)))
        by_kernels(case)
    return found
