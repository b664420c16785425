"""The forms of adapters that are read, and which of them an adapter has."""

from __future__ import annotations

import json
from typing import Any

from ...base.errors import AdapterError
from ..unreadable import refuse_pointer
from .foreign import tool_of_config
from .format import Format, LoraConfig, NotLora
from .names import CONFIG_NAME
from .peft import PEFT

FORMATS: tuple[Format, ...] = (PEFT,)


def recognise(adapter: str, text: bytes) -> tuple[Format, dict[str, Any]]:
    """The form of an adapter with this ``adapter_config.json``, and the object in it.

    Raises AdapterError for what is no configuration, and NotLora for that of another tool.
    """
    refuse_pointer(adapter, CONFIG_NAME, text, "the file")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(adapter, f"{CONFIG_NAME} is not JSON: {error}") from None
    if isinstance(raw, dict):
        for form in FORMATS:
            if form.recognises(raw):
                return form, raw
        if tool := tool_of_config(raw):
            raise NotLora(adapter, f"{CONFIG_NAME} is of {tool.owner}, not of PEFT", tool.hint)
    raise NotLora(adapter, f"{CONFIG_NAME} has no peft_type: not a PEFT adapter")


def parse_config(adapter: str, text: bytes) -> LoraConfig:
    """Read ``adapter_config.json``. Raises AdapterError, naming the method, for anything but plain LoRA."""
    form, raw = recognise(adapter, text)
    return form.parse_config(adapter, raw)
