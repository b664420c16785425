"""The Hub: what is in its repositories, and their files, by huggingface_hub's own client and cache.

Requests are repeated when the Hub or the network fails (`tenacity`), and every file is checked against the digest that
the Hub lists before anybody sees it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tenacity
from huggingface_hub import HfApi, constants, hf_hub_download, metadata_load, try_to_load_from_cache
from tenacity.nap import sleep_using_event

from ..adapter.formats.names import CONFIG_NAME
from ..adapter.lock import Filters, LockedFile
from ..base.errors import HubError
from .http_client import HttpClient
from .hub_errors import (
    HubCorrupt,
    HubFailed,
    check_access,
    describe_transient,
    is_rate_limit,
    is_transient,
    is_unreachable,
    translate,
    without_password,
)
from .options import RetryPolicy
from .requested import RequestedFile

T = TypeVar("T")

Received = Callable[[int], None]


class Corrupt(Exception):
    """A file arrived that is not what the Hub lists."""


class Snapshot(NamedTuple):
    """A repository at a commit: its files with their sizes and digests, and the licence that its card names."""

    repository: str
    commit: str
    files: tuple[RequestedFile, ...]
    license: str | None


class Hub:
    """The requests of one run. Every method raises HubError, in one line, when the last attempt has failed."""

    def __init__(self, client: HttpClient, retries: RetryPolicy) -> None:
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
        self._api = HfApi(endpoint=endpoint or None, library_name="lorazip")
        check_access(self.endpoint)
        self._client = client
        self._retries = retries
        self._counting = threading.Lock()
        self.downloaded = 0
        """Bytes of files that have arrived, also of attempts that failed."""

    @property
    def endpoint(self) -> str:
        return str(self._api.endpoint)

    def collection(self, slug: str) -> list[tuple[str, str]]:
        """(type, id) of every item of a collection."""
        collection = self._call(f"collection:{slug}", lambda: self._api.get_collection(slug))
        return [(item.item_type, item.item_id) for item in collection.items]

    def repositories_of(self, author: str, filters: Filters) -> Iterator[tuple[str, bool]]:
        """(id, whether it has an adapter) of an author's models that the filters leave, most downloaded first."""
        tags = list(filters.tags)
        if filters.base_model is not None:
            tags.append(f"base_model:adapter:{filters.base_model}")

        def pages() -> list[tuple[str, bool]]:
            models = self._api.list_models(
                author=author, search=filters.search, filter=tags or None, sort="downloads", full=True
            )
            found = []
            for model in models:
                names = [sibling.rfilename for sibling in model.siblings or ()]
                found.append((model.id, any(name.rpartition("/")[2] == CONFIG_NAME for name in names)))
            return found

        yield from self._call(author, pages)

    def snapshot(self, repository: str, revision: str | None) -> Snapshot:
        """What a repository has at a branch, tag or commit, or on its default branch."""
        info = self._call(
            repository,
            lambda: self._api.model_info(
                repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ),
            revision=revision,
        )
        if info.sha is None:
            raise HubError(
                f"{repository}: {without_password(self.endpoint)} names no commit for it", "is HF_ENDPOINT a Hub?"
            )
        files = tuple(
            RequestedFile(
                name=sibling.rfilename.rpartition("/")[2],
                path=sibling.rfilename,
                size_bytes=sibling.size,
                sha256=sibling.lfs.sha256 if sibling.lfs else None,
                git_oid=None if sibling.lfs else sibling.blob_id,
            )
            for sibling in info.siblings or ()
        )
        return Snapshot(repository, info.sha, files, _license(info))

    def cached(self, repository: str, commit: str, path: str) -> bool:
        """Whether the cache has the file already."""
        return isinstance(try_to_load_from_cache(repository, path, revision=commit), str)

    def file(self, repository: str, commit: str, file: RequestedFile, received: Received) -> tuple[Path, LockedFile]:
        """A file at a commit, in the cache and checked. ``received`` is called with the bytes as they arrive.

        When an attempt fails, it is called with a negative number for those that do not count.
        """
        counter = _counter(self._count, received)
        wrong = False

        def get() -> tuple[Path, LockedFile]:
            nonlocal wrong
            counter.restart()
            path = hf_hub_download(
                repository,
                file.path,
                revision=commit,
                endpoint=self.endpoint,
                library_name="lorazip",
                force_download=wrong,
                tqdm_class=counter,
            )
            blob = Path(os.path.realpath(path))
            identified = file.identify(blob)
            if identified is None:
                wrong = True  # else the cache would give it again
                raise Corrupt
            return blob, identified

        return self._call(repository, get, revision=commit, file=file.path)

    def stop(self) -> None:
        """End all requests, and make no more."""
        self._client.stop()

    def _gives_up(self, state: tenacity.RetryCallState) -> bool:
        """Whether the attempt that has failed was the last one."""
        retries, error = self._retries, state.outcome.exception() if state.outcome else None
        late = (state.seconds_since_start or 0.0) >= retries.seconds
        return state.attempt_number >= retries.attempts or (late and not is_rate_limit(error))

    def _count(self, size: int) -> None:
        with self._counting:
            self.downloaded += size

    def _call(self, what: str, function: Callable[[], T], *, revision: str | None = None, file: str | None = None) -> T:
        """``function()``, repeated after transient failures; other failures are raised as HubError."""
        started = time.monotonic()
        attempts = 0

        def attempt() -> T:
            nonlocal attempts
            attempts += 1
            self._client.check_stopped()
            self._client.attach()
            return function()

        retrying = tenacity.Retrying(
            stop=self._gives_up,
            wait=tenacity.wait_exponential_jitter(self._retries.first_wait, max=30.0, jitter=self._retries.first_wait),
            retry=tenacity.retry_if_exception(lambda error: is_transient(error) or isinstance(error, Corrupt)),
            sleep=sleep_using_event(self._client.stopped),
            before_sleep=self._note_retry,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except Corrupt:
            raise HubCorrupt(
                what,
                f"{file} arrived {attempts} times with other bytes than its digest says",
                "was it changed on the way, by a proxy or a mirror?",
            ) from None
        except Exception as error:
            trouble = translate(error, what, endpoint=self.endpoint, revision=revision, file=file, attempts=attempts)
            if trouble is None:
                raise
            if is_unreachable(error) and isinstance(trouble, HubFailed) and self._client.last_answer < started:
                raise trouble.as_unavailable from error
            raise trouble from error

    def _note_retry(self, state: tenacity.RetryCallState) -> None:
        """Report an attempt that failed, before the wait for the next one."""
        error = state.outcome.exception() if state.outcome else None
        if error is not None and state.next_action is not None:
            repeats = self._retries.attempts - 1
            self._client.note_retry(describe_transient(error), state.next_action.sleep, state.attempt_number, repeats)


def license_in(card: Path) -> str | None:
    """The licence that a model card on disk names; None where there is no card, or none that can be read."""
    try:
        return _license_text((metadata_load(card) or {}).get("license"))
    except Exception:  # whatever people write between the dashes
        return None


def _license(info: Any) -> str | None:
    """The licence that the card of a repository names, or else its tags."""
    named = _license_text(info.card_data.get("license") if info.card_data else None)
    tags = (tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:"))
    return named or next(tags, None)


def _license_text(value: Any) -> str | None:
    """One line; a card can name several."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")
    return " ".join(text.split())[:200] or None


def _counter(arrived: Received, received: Received) -> Any:
    """A class that huggingface_hub takes for the progress bar of a file, and which calls the two functions instead.

    ``arrived`` gets all bytes. ``received`` gets them too, and a negative number when the download starts again.
    """

    class Counter:
        counted = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.n = 0

        @classmethod
        def restart(cls) -> None:
            if cls.counted:
                received(-cls.counted)
                cls.counted = 0

        def update(self, n: float | None = 1) -> None:
            type(self).counted += int(n or 0)
            arrived(int(n or 0))
            received(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on the wire, which Xet counts apart from bytes of the file."""

        def set_postfix_str(self, *args: Any, **kwargs: Any) -> None: ...

        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None: ...

        def close(self) -> None: ...

        def __enter__(self) -> Counter:
            return self

        def __exit__(self, *args: object) -> None: ...

    return Counter
