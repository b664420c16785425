"""Which requests an engine is given, so that none can stop it: all that is wrong is told before it gets there.

vLLM has an id for an adapter, ``lora_int_id``. An id stands for one adapter, of one bundle, until that is removed. The
adapters of the bundle that the engine was started with need not be added; all others have to be, since the engine
may have no room for them.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any, NamedTuple

from ..base.errors import LorazipError
from ..bundle.near import NearNames, did_you_mean
from ..bundle.reader import Bundle
from .servable import check_adapters, entry
from .source import Source, settings, source_of

_RATIO = 0.75  # of difflib: a letter of four may be wrong; what is less alike is another name


class Identity(NamedTuple):
    """An adapter that requests are for."""

    name: str
    source: Source


class Admission:
    """What the front end of one engine knows of its adapters. All that is raised here is ValueError."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._bundle = source.open()
        self._names = names_of(self._bundle)
        self._removed: set[str] = set()
        """Adapters of the first bundle that are held no more."""
        self._ids: dict[int, Identity] = {}
        self._added: set[int] = set()
        """The ids among them that the engine was told of."""
        self._leaving: set[int] = set()
        """The ids among them whose adapters the engine holds as long as requests use them, and no longer."""
        self._near: NearNames | None = None
        """Of all that is held; None if that has changed since."""

    @property
    def names(self) -> list[str]:
        """The adapters of the first bundle that are held, in its order."""
        return [name for name in self._names if name not in self._removed]

    def serves(self, name: str) -> bool:
        """Whether an adapter of this name is held that is of the first bundle."""
        return name in self._names and name not in self._removed

    def hint(self, name: str) -> str:
        """`` (did you mean 'NAME'?)``, where an adapter that is held is called nearly so; else nothing."""
        if self._near is None:
            added = (self._ids[adapter_id] for adapter_id in self._added)
            self._near = NearNames([*self.names, *(name for name, source in added if source != self.source)])
        return _hint(self._near, name)

    def admit(self, request: Any) -> None:
        """Check the adapter of a request, whose ``lora_path`` becomes that of its `Source`."""
        identity = self._identity(request)
        if not self._known(request.lora_int_id, identity):
            name, source = identity
            if source != self.source:
                raise ValueError(f"adapter {name} of {source.bundle} was not added to the engine: use add_lora")
            if name not in self._names:
                raise _no_adapter(name, self._bundle)
            if name in self._removed:
                raise ValueError(f"adapter {name} was removed from the engine")
            self._refuse_second_id(request, ())
            self._ids[request.lora_int_id] = identity
        request.lora_path = str(identity.source)

    def find(self, name: str, path: str) -> Source:
        """The bundle at ``path``, which has an adapter of this ``name`` that can be served."""
        try:
            source = source_of(path, self.source)
            bundle = source.open()
            if name not in names_of(bundle):
                raise _no_adapter(name, bundle)
            check_adapters(bundle, [entry(bundle, name)])
        except (LorazipError, OSError) as error:
            raise ValueError(f"adapter {name}: {error}") from error
        return source

    def adding(self, request: Any) -> None:
        """Check a request to hold an adapter, whose ``lora_path`` becomes that of its `Source`."""
        identity = self._identity(request)
        if not self._known(request.lora_int_id, identity):
            if identity.source != self.source or not self.serves(identity.name):  # what is held needs no disk
                self.find(request.lora_name, request.lora_path)
            self._refuse_second_id(request, self._added)
        request.lora_path = str(identity.source)

    def added(self, request: Any) -> None:
        """The engine holds it now."""
        identity = self._identity(request)
        self._ids[request.lora_int_id] = identity
        self._added.add(request.lora_int_id)
        self._near = None
        if identity.source == self.source:
            self._removed.discard(identity.name)

    def removing(self, adapter_id: int) -> None:
        """From now on no request with this id is admitted; it stands for no other adapter until `gone`."""
        self._added.discard(adapter_id)
        self._near = None
        if (identity := self._ids.get(adapter_id)) is None:
            return
        self._leaving.add(adapter_id)
        others = (own for other, own in self._ids.items() if other not in self._leaving)
        if identity.source == self.source and identity not in others:
            self._removed.add(identity.name)

    def gone(self, adapter_id: int) -> None:
        """The engine holds no adapter with this id any more."""
        self._ids.pop(adapter_id, None)
        self._leaving.discard(adapter_id)

    def _identity(self, request: Any) -> Identity:
        refuse_in_place(request)
        try:
            return Identity(request.lora_name, source_of(request.lora_path, self.source))
        except (LorazipError, OSError) as error:
            raise ValueError(f"adapter {request.lora_name}: {error}") from error

    def _known(self, adapter_id: int, identity: Identity) -> bool:
        if adapter_id in self._leaving:
            raise ValueError(f"lora_int_id {adapter_id} is that of an adapter that is being removed")
        known = self._ids.get(adapter_id)
        if known not in (None, identity):
            raise ValueError(f"lora_int_id {adapter_id} of adapter {identity.name} is that of adapter {known.name}")
        return known is not None

    def _refuse_second_id(self, request: Any, fine: Collection[int]) -> None:
        """Of the requests of a batch that have one name, vLLM shows the engine one alone.

        So each but those that were added needs to be the only one.
        """
        name = request.lora_name
        for adapter_id, identity in self._ids.items():
            if identity.name == name and adapter_id not in fine and adapter_id not in self._leaving:
                raise ValueError(f"adapter {name} has lora_int_id {adapter_id} already, not {request.lora_int_id}")


def refuse_in_place(request: Any) -> None:
    """Raise ValueError for a request to put an adapter in the place of another one, which requests may be using."""
    if request.load_inplace:
        raise ValueError(
            f"adapter {request.lora_name}: load_inplace would change requests under way: remove it, then add it"
        )


def admission(input_processor: Any) -> Admission | None:
    """That of the engine which this is a part of; None if it serves no bundle."""
    if not hasattr(input_processor, "_lorazip"):
        known = settings(input_processor.vllm_config.additional_config)
        input_processor._lorazip = Admission(known.source) if known else None
    found: Admission | None = input_processor._lorazip
    return found


@lru_cache(maxsize=4)
def names_of(bundle: Bundle) -> dict[str, None]:
    """The names of all adapters, in order."""
    return dict.fromkeys(adapter.name for adapter in bundle.manifest.adapters)


@lru_cache(maxsize=4)
def _near_names(bundle: Bundle) -> NearNames:
    return NearNames(names_of(bundle))


def _no_adapter(name: str, bundle: Bundle) -> ValueError:
    return ValueError(f"there is no adapter {name} in {bundle.path}{_hint(_near_names(bundle), name)}")


def _hint(names: NearNames, wrong: str) -> str:
    near = names.find(wrong, 1, _RATIO)
    return f" ({did_you_mean(near)})" if near and near != [wrong] else ""
