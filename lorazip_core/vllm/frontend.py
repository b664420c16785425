"""What vLLM's front end is taught: which adapters there are, and to refuse others before the engine sees them.

Each function here wraps one of vLLM's. Where an engine serves no bundle, it calls that and does nothing else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from difflib import get_close_matches
from functools import lru_cache, wraps
from http import HTTPStatus
from typing import Any

from prometheus_client import Counter
from vllm.entrypoints.openai.models.serving import OpenAIServingModels, create_error_response
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver
from vllm.v1.engine.input_processor import InputProcessor

from ..base.errors import LorazipError
from ..bundle.reader import Bundle
from .source import Settings, Source, settings, source_of

_requests = Counter("lorazip_requests", "Requests for each adapter of a bundle", ["adapter"])

Method = Callable[..., Awaitable[Any]]


def install() -> None:
    """Teach it."""
    InputProcessor._validate_lora = _validating(InputProcessor._validate_lora)
    for name, wrapped in {
        "show_available_models": _listing,
        "resolve_lora": _resolving,
        "load_lora_adapter": _loading,
        "unload_lora_adapter": _unloading,
    }.items():
        setattr(OpenAIServingModels, name, wrapped(getattr(OpenAIServingModels, name)))


class BundleResolver(LoRAResolver):
    """Finds the adapters of a bundle by their names, but for those that were unloaded."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.names = names_of(source.open())
        self.unloaded: set[str] = set()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        if lora_name not in self.names or lora_name in self.unloaded:
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(self.source))


@lru_cache(maxsize=4)
def names_of(bundle: Bundle) -> dict[str, None]:
    """The names of all adapters, in order."""
    return dict.fromkeys(adapter.name for adapter in bundle.manifest.adapters)


def _validating(stock: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Of `InputProcessor`: raises ValueError, which becomes a 400, for an adapter that no bundle has."""

    @wraps(stock)
    def validate(self: Any, lora_request: Any) -> None:
        stock(self, lora_request)
        if lora_request is None:
            return
        if not hasattr(self, "_lorazip"):
            self._lorazip, self._lorazip_ids = settings(self.vllm_config), {}
        known: Settings | None = self._lorazip
        if known is None:
            return
        name = lora_request.lora_name
        try:
            names = names_of(source_of(lora_request.lora_path, known.source).open())
        except (LorazipError, OSError) as error:
            raise ValueError(f"adapter {name}: {error}") from error
        if name not in names:
            alike = "".join(f": is it {other}?" for other in get_close_matches(name, names, 1))
            raise ValueError(f"there is no adapter {name} in {known.source.bundle}{alike}")
        identity = name, lora_request.lora_path
        if (other := self._lorazip_ids.setdefault(lora_request.lora_int_id, identity)) != identity:
            raise ValueError(f"lora_int_id {lora_request.lora_int_id} of adapter {name} is that of adapter {other[0]}")
        _requests.labels(name).inc()

    return validate


def _listing(stock: Method) -> Method:
    @wraps(stock)
    async def show(self: Any) -> Any:
        if (resolver := _resolver(self)) is None:
            return await stock(self)
        before, taken = self.lora_requests, resolver.names.keys() - resolver.unloaded
        self.lora_requests = {
            name: LoRARequest(lora_name=name, lora_int_id=1, lora_path=str(resolver.source))
            for name in resolver.names
            if name in taken
        } | before
        try:
            return await stock(self)
        finally:
            self.lora_requests = before

    return show


def _resolving(stock: Method) -> Method:
    @wraps(stock)
    async def resolve(self: Any, lora_name: str) -> Any:
        _resolver(self)
        return await stock(self, lora_name)

    return resolve


def _loading(stock: Method) -> Method:
    """A path to load from is the folder of a bundle that has an adapter of this name."""

    @wraps(stock)
    async def load(self: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        if (resolver := _resolver(self)) is None:
            return await stock(self, request, *arguments, **options)
        name = request.lora_name
        if name in resolver.names and name not in resolver.unloaded and name not in self.lora_requests:
            return _refused(f"adapter {name} is served already: unload it first")
        if request.load_inplace:
            return _refused("load_inplace would change requests under way: unload the adapter, then load it")
        try:
            source = source_of(request.lora_path, resolver.source)
            there = name in names_of(source.open())
        except (LorazipError, OSError) as error:
            return _refused(str(error))
        if not there:
            return _refused(f"there is no adapter {name} in {source.bundle}")
        request.lora_path = str(source)
        return await stock(self, request, *arguments, **options)

    return load


def _unloading(stock: Method) -> Method:
    """Frees its place in the engine, too, as soon as no request uses it."""

    @wraps(stock)
    async def unload(self: Any, request: Any) -> Any:
        if (resolver := _resolver(self)) is None:
            return await stock(self, request)
        name = request.lora_name
        if name not in self.lora_requests and name in resolver.names and name not in resolver.unloaded:
            await self.resolve_lora(name)
        known = self.lora_requests.get(name)
        answer = await stock(self, request)
        if known is not None and name not in self.lora_requests:
            resolver.unloaded.add(name)
            await self.engine_client.remove_lora(known.lora_int_id)
        return answer

    return unload


def _resolver(models: Any) -> BundleResolver | None:
    """That of an engine that serves a bundle."""
    if not hasattr(models, "_lorazip"):
        known = settings(models.engine_client.vllm_config)
        models._lorazip = BundleResolver(known.source) if known else None
        if known:
            models.lora_resolvers.append(models._lorazip)
    found: BundleResolver | None = models._lorazip
    return found


def _refused(message: str) -> Any:
    return create_error_response(message=message, err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST)
