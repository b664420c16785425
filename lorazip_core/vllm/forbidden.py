"""Options of vLLM with which no bundle is served: adapters would be lost while it runs, or be missing."""

from __future__ import annotations

from typing import Any, NamedTuple


class Forbidden(NamedTuple):
    """An option, by its field in a part of vLLM's configuration, and the most that it may be."""

    part: str
    field: str
    most: int
    why: str

    @property
    def option(self) -> str:
        """As it is on the command line."""
        return f"--{self.field.replace('_', '-')}"


_POOL = "vLLM may discard what is held of a bundle with the weights, and would serve other adapters after it"
FORBIDDEN = (
    Forbidden("model_config", "enable_sleep_mode", 0, _POOL),
    Forbidden("model_config", "enable_cumem_allocator", 0, _POOL),  # sleeping takes this alone
    Forbidden("parallel_config", "enable_elastic_ep", 0, "an engine that comes later would lack adapters"),
    Forbidden("parallel_config", "pipeline_parallel_size", 1, "each stage would have some of the bundle's modules"),
)


def forbidden_in(vllm_config: Any) -> Forbidden | None:
    """The first of them that a configuration has; a field that a release lacks is none."""
    for each in FORBIDDEN:
        if getattr(getattr(vllm_config, each.part, None), each.field, 0) > each.most:
            return each
    return None
