"""Errors of the Hub and the network, each in one line that says what to do about it.

Nothing of an exception's own text is repeated but what the Hub says about a refusal: addresses can carry signatures and
passwords, and a server can echo a token.
"""

from __future__ import annotations

import json
import os
from urllib.parse import urlsplit

from huggingface_hub import get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of the httpx that the hub uses
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..base.errors import HubError, LorazipError, UsageError
from ..base.text import count, plain

_TRANSIENT = (408, 429, 500, 502, 503, 504)
_KEPT = "what has arrived is kept: run again later"
_KEPT_429 = f"{_KEPT}, with fewer «jobs», or with HF_TOKEN set"


class HubRefused(HubError):
    """The Hub answered, and will not give it: missing, private, gated, gone. Asking again does not help."""


class HubDiffers(HubRefused):
    """The Hub does not have, or not any more, a repository or file that was asked for."""


class RevisionGone(HubDiffers):
    """The repository is there, the revision is not."""


class HubFailed(HubError):
    """The Hub or the network failed, and so did the last attempt; later it may work. ``where`` says for what."""

    def __init__(self, where: str, what: str, hint: str) -> None:
        super().__init__(f"{where}: {what}", hint)
        self._what = what

    @property
    def as_unavailable(self) -> HubUnavailable:
        """The same failure, as one of the Hub as a whole."""
        return HubUnavailable(self._what, self.hint)


class HubCorrupt(HubFailed):
    """Other bytes arrive than the digest says, again and again: something in between is at fault, not the adapter."""


class HubUnavailable(HubError):
    """The Hub does not answer at all, or refuses everything: there is no use in asking for anything else."""


class Outage:
    """Tells an outage of the Hub, ``many`` requests in a row that fail, from failures of single repositories."""

    def __init__(self, many: int) -> None:
        self._many = max(3, many)
        self._in_a_row = 0

    def record(self, error: LorazipError | None) -> None:
        """Count how a request ended, None for well. Raises HubUnavailable once ``many`` in a row have failed."""
        if not isinstance(error, HubFailed):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._in_a_row >= self._many:
            raise error.as_unavailable


def check_access(endpoint: str) -> None:
    """Raise UsageError for an address or a token that no request could be made with."""
    try:
        parts = urlsplit(endpoint)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UsageError("HF_ENDPOINT is no address such as https://huggingface.co")
    token = get_token()
    if token is not None and not (token.isascii() and token.isprintable()):
        raise UsageError("the token of the Hub has characters that no token has", "look at HF_TOKEN")


def is_transient(error: BaseException) -> bool:
    """Whether asking again may help."""
    error = _root(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return isinstance(error, HTTPError) or _is_inconsistent(error) or _is_xet(error)


def is_rate_limit(error: BaseException | None) -> bool:
    """Whether the Hub asked to wait, so that the time so far says nothing about it."""
    root = _root(error) if error else None
    return isinstance(root, HfHubHTTPError) and root.response.status_code == 429


def translate(
    error: BaseException, what: str, *, endpoint: str, revision: str | None, file: str | None, attempts: int
) -> HubError | None:
    """The failure that an exception of huggingface_hub stands for; None for one that is not about the Hub."""
    error = _root(error)
    where = f"{what}: {file}" if file else what
    host = without_password(endpoint)
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnavailable(f"{where}: not in the cache, and HF_HUB_OFFLINE is set", "unset it, or fetch it online")
    if isinstance(error, HFValidationError):
        return HubRefused(f"{what}: no name of a repository")
    if isinstance(error, GatedRepoError):
        return HubRefused(f"{what}: access is restricted", f"ask for it at {host}/{what}, {_log_in('then ')}")
    if isinstance(error, RevisionNotFoundError):
        return RevisionGone(f"{what}: it has no revision {revision!r}", "was it deleted or its history rewritten?")
    if isinstance(error, EntryNotFoundError):
        return HubDiffers(f"{where}: the Hub does not have it")
    if isinstance(error, DisabledRepoError):
        return HubRefused(f"{what}: the Hub has disabled it")
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, what, where, host, attempts)
    if isinstance(error, HTTPError):
        return HubFailed(where, f"no answer from {host} after {count(attempts, 'attempt')}: {_reason(error)}", _KEPT)
    if _is_inconsistent(error):
        return HubFailed(where, f"another size arrived than was promised, {count(attempts, 'attempt')}", _KEPT)
    if _is_xet(error):
        return HubFailed(where, f"Xet failed, {count(attempts, 'attempt')}", "without it: HF_HUB_DISABLE_XET=1")
    if isinstance(error, json.JSONDecodeError | FileMetadataError):
        return HubError(f"{what}: {host} does not answer as a Hub does", "is HF_ENDPOINT right, or a proxy in between?")
    return None


def _refusal(error: HfHubHTTPError, what: str, where: str, host: str, attempts: int) -> HubError:
    status = error.response.status_code
    reason = _one_line(error.server_message or "")
    if status == 401 and "Invalid credentials" in reason:
        return HubUnavailable(f"{host} refuses your token", "renew HF_TOKEN, or run 'hf auth login'")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        kind = HubDiffers if status == 404 else HubRefused  # without a token, what is missing is a 401 as well
        if get_token() is None:
            return kind(f"{what}: not found, or private", f"check the name; if it is private, {_log_in()}")
        return kind(f"{what}: not found, or your token may not read it", "check the name and the token")
    if status in _TRANSIENT:
        still = f"the Hub still answers {status}{' (too many requests)' if status == 429 else ''}"
        return HubFailed(where, f"{still} after {count(attempts, 'attempt')}", _KEPT_429 if status == 429 else _KEPT)
    return HubRefused(f"{where}: the Hub answers {status}{f': {reason}' if reason else ''}")


def describe_transient(error: BaseException) -> str:
    """What is wrong, in words, with a request that will be repeated."""
    error = _root(error)
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answers {error.response.status_code}"
    if isinstance(error, HTTPError):
        return f"the Hub does not answer ({_reason(error)})"
    return "Xet fails" if _is_xet(error) else "other bytes arrive than the Hub promised"


def is_unreachable(error: BaseException) -> bool:
    """Whether no connection could be made: no such host, or none that accepts it."""
    return "ConnectError" in type(_root(error)).__name__


def _root(error: BaseException) -> BaseException:
    """The failure that huggingface_hub has wrapped: 'not in the cache' says why it could not be downloaded."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_inconsistent(error: BaseException) -> bool:
    """huggingface_hub's bare OSError for a body of another length than was promised."""
    return type(error) is OSError and "Consistency check failed" in str(error)


def _is_xet(error: BaseException) -> bool:
    return "xet" in type(error).__module__.lower() or "xet" in type(error).__name__.lower()


def _log_in(before: str = "") -> str:
    return f"{before}set HF_TOKEN or run 'hf auth login'"


def _reason(error: BaseException) -> str:
    """The innermost system error in words, or the kind of failure."""
    if "Timeout" in type(error).__name__:
        return "timed out"
    innermost = error
    while (deeper := innermost.__cause__ or innermost.__context__) is not None:
        innermost = deeper
    if isinstance(innermost, OSError) and innermost.errno is not None:
        return os.strerror(innermost.errno) if innermost.errno > 0 else (innermost.strerror or "unknown host")
    return "the connection broke off" if "ProtocolError" in type(error).__name__ else type(error).__name__


def _one_line(text: str) -> str:
    """Text of a server on one line, cut to 200 characters, and without the token."""
    token = get_token()
    text = plain(" ".join(text.split()))
    return (text.replace(token, "***") if token else text)[:200]


def without_password(endpoint: str) -> str:
    """The address of a Hub as it may be shown."""
    parts = urlsplit(endpoint)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
