"""Addresses of the Hub's pages, as people paste them from a browser, as sources of `fetch`."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from ..base.errors import UsageError

_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_OTHER_KINDS = {"datasets": "a dataset", "spaces": "a space", "papers": "a paper", "docs": "documentation"}


def source_of_address(text: str) -> str | None:
    """The source that an address names, written as the lock has it; None for what is no address.

    ``https://huggingface.co/owner/repo/tree/main/sub?library=peft`` is ``owner/repo/sub@main``. Of a file it is the
    folder that it is in. The scheme may be missing. Raises UsageError for the address of anything else; the text is
    not repeated where it might hold a password.
    """
    scheme, found, rest = text.partition("://")
    if not found:
        scheme, rest = "https", text
    if not found and rest.partition("/")[0].lower() not in _HOSTS:
        return None
    try:
        parts = urlsplit(f"{scheme}://{rest}")
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("https", "http") or parts.netloc.lower() not in _HOSTS:
        raise UsageError(
            "an address is a source only on https://huggingface.co, and without a password", "write owner/repo"
        )
    # Only then the parts are decoded: a revision may have an encoded "/" in it.
    return _source([unquote(step) for step in parts.path.split("/") if step], f"https://huggingface.co{parts.path}")


def _source(steps: list[str], address: str) -> str:
    match steps:
        case ["collections", owner, slug]:
            return f"collection:{owner}/{slug}"
        case [kind, _, *_] if kind in _OTHER_KINDS:
            raise UsageError(f"{address!r}: {_OTHER_KINDS[kind]}, not a model")
        case [name] | [name, "models" | "collections"]:
            hint = f"for all its adapters write org:{name} or user:{name}"
            raise UsageError(f"{address!r}: the page of an organisation or a user", hint)
        case [owner, repository]:
            return f"{owner}/{repository.removesuffix('.git')}"
        case [owner, repository, "tree" | "commit" | "commits", revision, *folder]:
            return f"{'/'.join((owner, repository, *folder))}@{revision}"
        case [owner, repository, "blob" | "resolve" | "raw" | "blame", revision, *folder, _]:
            return f"{'/'.join((owner, repository, *folder))}@{revision}"
    raise UsageError(f"{address!r}: neither a repository, nor one of its folders or files, nor a collection")
