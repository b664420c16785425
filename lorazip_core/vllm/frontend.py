"""What vLLM's front end is taught: which adapters there are, and to refuse others before the engine sees them.

These names of vLLM are given another value where a bundle is served:

- ``InputProcessor``: its ``__init__`` opens the bundle, and ``_validate_lora`` refuses requests for adapters that are
  not there;
- ``add_lora`` and ``remove_lora`` of ``AsyncLLM`` and ``LLMEngine``: a request under way keeps its adapter;
- of ``OpenAIServingModels``, its ``__init__``, which refuses a base model that has the name of an adapter, the list of
  models, loading and unloading.

Each function here wraps one of these. Where an engine serves no bundle, it calls that and does nothing else.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from copy import copy
from functools import cache, wraps
from http import HTTPStatus
from typing import Any
from weakref import WeakValueDictionary

from prometheus_client import Counter
from vllm.entrypoints.openai.models.serving import ErrorResponse, OpenAIServingModels, create_error_response
from vllm.exceptions import VLLMNotFoundError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine

from ..base.errors import LocalError
from .admission import Admission, admission, refuse_in_place
from .servable import names_taken

_requests = Counter("lorazip_requests", "Requests for each adapter of a bundle", ["adapter"])

Method = Callable[..., Awaitable[Any]]

_OF_ENGINE = "Call to add_lora method failed: "
_OF_WORKER = re.compile(r"Worker failed with error '(.*)', please check the stack trace", re.DOTALL)
_WAIT = 0.02
"""Seconds between looks at whether requests are done that use an adapter which is to be removed."""


@cache
def install() -> None:
    """Teach it."""
    InputProcessor.__init__ = _beginning(InputProcessor.__init__)
    InputProcessor._validate_lora = _validating(InputProcessor._validate_lora)
    AsyncLLM.add_lora = _adding_async(AsyncLLM.add_lora)
    AsyncLLM.remove_lora = _removing_async(AsyncLLM.remove_lora)
    LLMEngine.add_lora = _adding(LLMEngine.add_lora)
    LLMEngine.remove_lora = _removing(LLMEngine.remove_lora)
    OpenAIServingModels.__init__ = _naming(OpenAIServingModels.__init__)
    for name, wrapped in {
        "show_available_models": _listing,
        "resolve_lora": _resolving,
        "load_lora_adapter": _loading,
        "unload_lora_adapter": _unloading,
    }.items():
        setattr(OpenAIServingModels, name, wrapped(getattr(OpenAIServingModels, name)))


class BundleResolver(LoRAResolver):
    """Finds the adapters of the first bundle by their names, but for those that were unloaded."""

    def __init__(self, known: Admission) -> None:
        self._known = known

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        return _request(self._known, lora_name) if self._known.serves(lora_name) else None


def _request(known: Admission, name: str) -> LoRARequest:
    """For an adapter of the first bundle. vLLM gives it an id of its own."""
    return LoRARequest(lora_name=name, lora_int_id=1, lora_path=str(known.source))


def _beginning(stock: Callable[..., None]) -> Callable[..., None]:
    """Of `InputProcessor`: what is known of the bundle is known from the start, wherever that is moved meanwhile."""

    @wraps(stock)
    def begin(self: Any, *arguments: Any, **options: Any) -> None:
        stock(self, *arguments, **options)
        admission(self)

    return begin


def _validating(stock: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Of `InputProcessor`: raises ValueError, which becomes a 400."""

    @wraps(stock)
    def validate(self: Any, lora_request: Any) -> None:
        stock(self, lora_request)
        if lora_request is not None and (known := admission(self)) is not None:
            known.admit(lora_request)
            _requests.labels(lora_request.lora_name).inc()

    return validate


def _adding(stock: Callable[..., bool]) -> Callable[..., bool]:
    @wraps(stock)
    def add(self: Any, lora_request: Any) -> bool:
        if (known := admission(self.input_processor)) is None:
            return stock(self, lora_request)
        known.adding(lora_request)
        done = stock(self, lora_request)
        known.added(lora_request)
        return done

    return add


def _adding_async(stock: Method) -> Method:
    @wraps(stock)
    async def add(self: Any, lora_request: Any) -> Any:
        if (known := admission(self.input_processor)) is None:
            return await stock(self, lora_request)
        known.adding(lora_request)
        done = await stock(self, lora_request)
        known.added(lora_request)
        return done

    return add


def _removing(stock: Callable[..., bool]) -> Callable[..., bool]:
    """Raises ValueError where a request uses the adapter."""

    @wraps(stock)
    def remove(self: Any, lora_id: int) -> bool:
        known = admission(self.input_processor)
        if known is not None:
            if _used(self, lora_id):
                raise ValueError(f"the adapter with lora_int_id {lora_id} is in use")
            known.removing(lora_id)
        done = stock(self, lora_id)
        if known is not None:
            known.gone(lora_id)
        return done

    return remove


def _removing_async(stock: Method) -> Method:
    """Waits for the requests that use the adapter; it is removed, too, if nobody waits for that any more."""

    async def when_unused(self: Any, lora_id: int, known: Admission) -> Any:
        while _used(self, lora_id):
            await asyncio.sleep(_WAIT)
        done = await stock(self, lora_id)
        known.gone(lora_id)
        return done

    @wraps(stock)
    async def remove(self: Any, lora_id: int) -> Any:
        if (known := admission(self.input_processor)) is None:
            return await stock(self, lora_id)
        known.removing(lora_id)
        return await asyncio.shield(_kept(when_unused(self, lora_id, known)))

    return remove


_under_way: set[asyncio.Task[Any]] = set()
"""A task that nothing refers to may be thrown away before it is done."""


def _kept(work: Any) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.ensure_future(work)
    _under_way.add(task)
    task.add_done_callback(_under_way.discard)
    return task


def _used(engine: Any, adapter_id: int) -> bool:
    """Whether a request that is not done has the adapter with this id."""
    adapters = (state.lora_request for state in engine.output_processor.request_states.values())
    return any(adapter is not None and adapter.lora_int_id == adapter_id for adapter in adapters)


def _naming(stock: Callable[..., None]) -> Callable[..., None]:
    """Raises LocalError where the base model would answer for an adapter."""

    @wraps(stock)
    def begin(self: Any, *arguments: Any, **options: Any) -> None:
        stock(self, *arguments, **options)
        known = admission(self.engine_client.input_processor)
        if known and (taken := names_taken((path.name for path in self.base_model_paths), known.names)):
            raise LocalError(taken, "give the base model another served_model_name")

    return begin


def _listing(stock: Method) -> Method:
    @wraps(stock)
    async def show(self: Any) -> Any:
        if (known := _admission(self)) is None:
            return await stock(self)
        shown = copy(self)
        shown.lora_requests = {name: _request(known, name) for name in known.names} | self.lora_requests
        return await stock(shown)

    return show


def _resolving(stock: Method) -> Method:
    """What the engine was told of is noted even if the request is aborted meanwhile.

    Raises VLLMNotFoundError, a 404, for a name that is nearly one of an adapter: of what is returned for one that is
    not there, vLLM takes no message.
    """

    @wraps(stock)
    async def resolve(self: Any, lora_name: str) -> Any:
        if (known := _admission(self)) is None:
            return await stock(self, lora_name)
        if _is_unknown(self, known, lora_name):
            found: Any = _missing(f"LoRA adapter {lora_name} does not exist")
        else:
            found = await asyncio.shield(_kept(stock(self, lora_name)))
        if _is_missing(found) and (hint := known.hint(lora_name)):
            raise VLLMNotFoundError(f"The model `{lora_name}` does not exist{hint}")
        return found

    return resolve


def _loading(stock: Method) -> Method:
    """A path to load from is the folder of a bundle that has an adapter of this name."""

    @wraps(stock)
    async def load(self: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        if (known := _admission(self)) is None:
            return await stock(self, request, *arguments, **options)
        name = request.lora_name
        async with _lock(self, name):
            try:
                refuse_in_place(request)
                if name in self.lora_requests or known.serves(name):
                    raise ValueError(f"adapter {name} is served already: unload it first")
                # Reading a manifest takes a while, in which others are answered.
                request.lora_path = str(await asyncio.to_thread(known.find, name, request.lora_path))
            except ValueError as error:
                return _refused(str(error))
            answer = await stock(self, request, *arguments, **options)
        failed = isinstance(answer, ErrorResponse) and answer.error.code == HTTPStatus.INTERNAL_SERVER_ERROR
        return _refused(_cause(answer.error.message)) if failed else answer  # no room, or the file is damaged

    return load


def _unloading(stock: Method) -> Method:
    """Frees its place in the engine, too, and answers when that is done: when no request uses it any more."""

    @wraps(stock)
    async def unload(self: Any, request: Any) -> Any:
        if (known := _admission(self)) is None:
            return await stock(self, request)
        name = request.lora_name
        async with _lock(self, name):
            if name not in self.lora_requests and known.serves(name):
                await self.resolve_lora(name)  # it has no id yet, as nobody asked for it
            adapter = self.lora_requests.get(name)
            answer = await stock(self, request)
        # Nobody who waits for the lock goes on before the next await, when the engine knows what leaves.
        if adapter is not None and self.lora_requests.get(name) is not adapter:
            await self.engine_client.remove_lora(adapter.lora_int_id)
        if _is_missing(answer) and (hint := known.hint(name)):
            return _missing(f"The lora adapter '{name}' cannot be found{hint}")
        return answer

    return unload


def _lock(models: Any, name: str) -> asyncio.Lock:
    """Held while the adapter of this name is loaded or unloaded, and kept no longer than somebody waits for it."""
    locks: WeakValueDictionary[str, asyncio.Lock] = vars(models).setdefault("_lorazip", WeakValueDictionary())
    return locks.setdefault(name, asyncio.Lock())


def _is_unknown(models: Any, known: Admission, name: str) -> bool:
    """Whether there is no adapter of this name, and none just being loaded.

    vLLM need not be asked then, which keeps a lock for every name that it was ever asked for.
    """
    ours_alone = all(isinstance(each, BundleResolver) for each in models.lora_resolvers)
    there = name in models.lora_requests or known.serves(name) or name in vars(models).get("_lorazip", ())
    return ours_alone and not there


def _admission(models: Any) -> Admission | None:
    """That of the engine whose models these are. Its adapters are found by their names from now on."""
    known = admission(models.engine_client.input_processor)
    if known is not None and not any(isinstance(each, BundleResolver) for each in models.lora_resolvers):
        models.lora_resolvers.append(BundleResolver(known))
    return known


def _is_missing(answer: Any) -> bool:
    return isinstance(answer, ErrorResponse) and answer.error.code == HTTPStatus.NOT_FOUND


def _missing(message: str) -> Any:
    return create_error_response(message=message, err_type="NotFoundError", status_code=HTTPStatus.NOT_FOUND)


def _cause(message: str) -> str:
    """What a worker said, out of what the engine makes of it."""
    found = _OF_WORKER.search(message)
    return found[1] if found else message.removeprefix(_OF_ENGINE)


def _refused(message: str) -> Any:
    return create_error_response(message=message, err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST)
