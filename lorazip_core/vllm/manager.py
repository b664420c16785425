"""In place of vLLM's own manager of adapters in a worker: all adapters of a bundle are there from the start.

vLLM knows an adapter by a number of its own, here an id, which stands for one name and ``lora_path`` until it is
removed: `admission` sees to that, and none is removed that a request uses. Several ids may stand for one adapter.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.logger import init_logger

from ..serving.store import NONE, AdapterStore
from .layers import layers_of, put_behind
from .servable import check_adapters, entry
from .source import Settings, Source, source_of

logger = init_logger("vllm.lorazip")

_WARM_UP = "warmup_"
"""How vLLM begins the names of the adapters that it tries an engine with, and their path."""
_NO_PATH = "/not/a/real/path"


class BundleManager:
    """What vLLM's model runner calls, as it calls its ``LRUCacheWorkerLoRAManager``."""

    def __init__(self, settings: Settings, vllm_config: Any, device: torch.device) -> None:
        self._settings = settings
        self._device = device
        self._dtype = vllm_config.model_config.dtype
        self._most_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._store: AdapterStore
        self._batch: torch.Tensor
        self._of_id: dict[int, int] = {}
        self._held: dict[tuple[str, str], int] = {}
        """By name and digest, the number in the store."""

    def create_lora_manager(self, model: Any, vllm_config: Any) -> Any:
        """Put the bundle on ``model``. Raises LocalError where it does not fit, and as `Bundle`."""
        begin = time.perf_counter()
        bundle = self._settings.source.open()
        layers = layers_of(model, bundle.manifest.modules)
        self._store = AdapterStore(bundle, layers, device=self._device, dtype=self._dtype, spare=self._settings.spare)
        self._held = {(name, self._settings.source.digest): number for name, number in self._store.numbers.items()}
        self._batch = torch.zeros(self._store.most_ints(self._most_tokens), dtype=torch.int32, device=self._device)
        modules = dict(model.named_modules())
        for number, layer in enumerate(layers):
            put_behind(modules[layer.name], self._store.calls(number), self._batch)
        logger.info(
            "lorazip: %d adapters of %s in %d layers, %.1f MiB on %s, in %.1f s",
            len(self._held),
            self._settings.source.bundle,
            len(layers),
            self._store.nbytes / 2**20,
            self._device,
            time.perf_counter() - begin,
        )
        return model

    def set_active_adapters(self, requests: Iterable[Any], mapping: Any) -> None:
        """Before a batch is computed: which adapter every token has."""
        requests = list(requests)
        warm_up = [request.lora_int_id for request in requests if _warms_up(request)]
        if not warm_up:
            for request in requests:
                self.add_adapter(request)
        if mapping is not None:
            ids = np.fromiter(mapping.index_mapping, np.int64, len(mapping.index_mapping))
            self._send(self._store.batch(self._numbers(ids, self._warm_up(warm_up) if warm_up else self._of_id)))

    def add_adapter(self, request: Any) -> bool:
        """Hold the adapter of a request, reading it where it is not held.

        Raises LocalError where it does not fit, Unsupported where it cannot be served, and as `Bundle`.
        """
        if request.lora_int_id in self._of_id:
            return False
        source = source_of(request.lora_path, self._settings.source)
        key = request.lora_name, source.digest
        if key not in self._held:
            self._held[key] = self._read(request.lora_name, source)
        self._of_id[request.lora_int_id] = self._held[key]
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        """Let go of an adapter, unless vLLM has another id for it. No token of a batch to come has it."""
        number = self._of_id.pop(adapter_id, None)
        if number is None:
            return False
        if number not in self._of_id.values():
            del self._held[next(key for key, held in self._held.items() if held == number)]
            self._store.remove(number)
        return True

    def list_adapters(self) -> set[int]:
        """The ids that vLLM gave to what is held."""
        return set(self._of_id)

    def remove_all_adapters(self) -> None:
        """After warming up, and when weights of the model were replaced: nothing of that concerns what is held."""

    def pin_adapter(self, adapter_id: int) -> bool:
        """All are, anyway."""
        return adapter_id in self._of_id

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """Those that are held do to warm up with."""
        return True

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Nothing is made to warm up with."""
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """No matter."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Only of the language model are layers served."""
        return False

    def _read(self, name: str, source: Source) -> int:
        begin = time.perf_counter()
        bundle = source.open()
        adapter = entry(bundle, name)
        check_adapters(bundle, [adapter])
        number = self._store.add(bundle, adapter)
        logger.info("lorazip: adapter %s of %s in %.3f s", name, source.bundle, time.perf_counter() - begin)
        return number

    def _warm_up(self, ids: list[int]) -> dict[int, int]:
        """Adapters that are held, for those that vLLM makes up."""
        held = list(self._held.values()) or [NONE]
        return {adapter_id: held[adapter_id % len(held)] for adapter_id in ids}

    @staticmethod
    def _numbers(ids: NDArray[np.int64], of_id: Mapping[int, int]) -> NDArray[np.int32]:
        """Of every token, the number in the store; 0 is vLLM's id of no adapter."""
        known, where = np.unique(ids, return_inverse=True)
        return np.array([of_id[id_] if id_ > 0 else NONE for id_ in known.tolist()], np.int32)[where]

    def _send(self, batch: NDArray[np.int32]) -> None:
        """To the device, from memory that is not used again: an earlier batch may still be on its way."""
        if self._device.type == "cuda":
            pinned = torch.empty(len(batch), dtype=torch.int32, pin_memory=True)
            pinned.numpy()[:] = batch
            self._batch[: len(batch)].copy_(pinned, non_blocking=True)
        else:
            self._batch[: len(batch)] = torch.from_numpy(batch)


def _warms_up(request: Any) -> bool:
    """Whether an adapter is made up by vLLM, to try an engine with."""
    return bool(request.lora_path == _NO_PATH and request.lora_name.startswith(_WARM_UP))
