"""What the Hub answers to a request, when nothing goes wrong that it doesn't know of."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

from . import describe
from .access import check_files, is_visible, readable, user_of
from .answers import Answer, Refused, Request, in_a_header, of_json
from .cdn import Cdn
from .ranges import content
from .repository import Catalogue, Commit, Repository

# A name has one or two segments, and what follows may look like one: the shorter reading is tried first.
_NAME = r"(?P<id>[^/]+(?:/[^/]+)??)"
_SHA = r"(?P<revision>[0-9a-f]{40})"
_SORTED = {"downloads": "downloads", "likes": "likes", "lastModified": "last_modified", "id": "id"}
_LIST_PARAMETERS = {
    *("author", "search", "filter", "gated", "sort", "direction"),
    *("limit", "cursor", "full", "cardData", "config", "expand"),
}


class Routes:
    def __init__(self, catalogue: Catalogue, cdn: Cdn, *, page_size: int, resolve_cache: bool) -> None:
        self.catalogue = catalogue
        self.cdn = cdn
        self.url = ""
        self._page_size = page_size
        self._resolve_cache = resolve_cache
        self._routes: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = [
            (method, re.compile(pattern), route)
            for method, pattern, route in (
                ("GET", r"/api/models", self._list),
                ("GET", rf"/api/models/{_NAME}/refs", self._refs),
                ("GET", rf"/api/models/{_NAME}/revision/(?P<revision>[^/]+)", self._model),
                ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", self._tree),
                ("POST", rf"/api/models/{_NAME}/paths-info/(?P<revision>[^/]+)", self._paths_info),
                ("GET", rf"/api/models/{_NAME}", self._model),
                ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", self._collection),
                ("GET", r"/api/agent-harnesses", self._harnesses),
                ("GET|HEAD", rf"/api/resolve-cache/models/{_NAME}/{_SHA}/(?P<path>.+)", self._cached),
                ("GET|HEAD", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self._resolve),
            )
        ]

    def answer(self, request: Request) -> Answer:
        try:
            return self._route(request, user_of(request.headers, self.catalogue))
        except Refused as refused:
            return refused.answer

    def _route(self, request: Request, user: str | None) -> Answer:
        target = request.target.partition("?")[0]
        for method, pattern, route in self._routes:
            match = pattern.fullmatch(target)
            if match and request.method in method.split("|"):
                parts = {name: None if part is None else unquote(part) for name, part in match.groupdict().items()}
                new = self.catalogue.renamed.get(parts.get("id") or "")
                if new is not None:
                    return Answer(307, {"Location": request.target.replace(match["id"], quote(new), 1)})
                return route(request, user, **parts)
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    # Routes that list

    def _list(self, request: Request, user: str | None) -> Answer:
        query = request.query
        if unknown := set(query) - _LIST_PARAMETERS:
            raise Refused(400, f"This server does not know {', '.join(sorted(unknown))}")
        found = [r for r in list(self.catalogue.repositories.values()) if is_visible(r, user) and _matches(r, query)]
        if sort := query.get("sort"):
            if sort[0] not in _SORTED:
                raise Refused(400, f"This server cannot sort by {sort[0]}")
            found.sort(key=lambda r: getattr(r, _SORTED[sort[0]]), reverse=sort[0] != "id")
        fields = set(describe.IN_A_FULL_LIST if _is_true(query, "full") else describe.IN_A_LIST)
        fields |= {name for name in ("cardData", "config") if _is_true(query, name)}
        fields = self._expanded(query) or fields
        size = min(int(query.get("limit", [self._page_size])[0]), self._page_size)
        page, headers = self._page(request, found, size)
        return of_json([describe.model(r, _head(r), fields) for r in page], headers=headers)

    def _tree(self, request: Request, user: str | None, id: str, revision: str, path: str | None) -> Answer:
        commit = self._commit(readable(id, user, self.catalogue), revision)
        expand = _is_true(request.query, "expand")
        entries = describe.tree(commit, path or "", recursive=_is_true(request.query, "recursive"), expand=expand)
        if entries is None:
            raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        page, headers = self._page(request, entries, self._page_size)
        return of_json(page, headers=headers)

    def _paths_info(self, request: Request, user: str | None, id: str, revision: str) -> Answer:
        commit = self._commit(readable(id, user, self.catalogue), revision)
        if request.headers.get("Content-Type", "").startswith("application/json"):
            asked = json.loads(request.body)
            wanted, expand = asked["paths"], bool(asked.get("expand"))
        else:
            form = parse_qs(request.body.decode(), keep_blank_values=True)
            wanted, expand = form.get("paths", []), _is_true(form, "expand")
        return of_json(describe.paths(commit, wanted, expand=expand))

    def _collection(self, request: Request, user: str | None, slug: str) -> Answer:
        found = self.catalogue.collections.get(slug)
        if found is None or not is_visible(found, user):
            raise Refused(404, "Collection not found")
        return of_json(describe.collection(found, user, self.catalogue))

    def _refs(self, request: Request, user: str | None, id: str) -> Answer:
        repository = readable(id, user, self.catalogue)
        kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.git_tags)}
        refs = {
            kind: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": sha} for name, sha in shas.items()]
            for kind, (folder, shas) in kinds.items()
        }
        return of_json({**refs, "converts": []})

    def _harnesses(self, request: Request, user: str | None) -> Answer:
        """The client may ask for these in a new process, whatever it was started for."""
        return of_json({"standardEnvVars": [], "harnesses": {}})

    # Routes of one repository

    def _model(self, request: Request, user: str | None, id: str, revision: str | None = None) -> Answer:
        repository = readable(id, user, self.catalogue)
        commit = self._commit(repository, revision) if revision is not None else _head(repository)
        fields = self._expanded(request.query) or describe.EXPANDABLE
        return of_json(describe.model(repository, commit, fields, blobs=_is_true(request.query, "blobs")))

    def _resolve(self, request: Request, user: str | None, id: str, revision: str, path: str) -> Answer:
        return self._file(request, user, id, revision, path, indirectly=self._resolve_cache)

    def _cached(self, request: Request, user: str | None, id: str, revision: str, path: str) -> Answer:
        return self._file(request, user, id, revision, path, indirectly=False)

    def _file(self, request: Request, user: str | None, id: str, revision: str, path: str, indirectly: bool) -> Answer:
        repository = readable(id, user, self.catalogue)
        check_files(repository, user)
        commit = self._commit(repository, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        file = commit.files[path]
        if not file.is_lfs and not indirectly:
            return content(request, file, (id, path), {**headers, "Content-Type": "text/plain; charset=utf-8"})
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size), "Accept-Ranges": "bytes"}
        if not file.is_lfs:
            headers["Location"] = f"/api/resolve-cache/models/{quote(id)}/{commit.sha}/{quote(path)}"
            return Answer(307, headers)
        headers["Location"] = location = self.cdn.publish(id, path, file)
        return Answer(302, headers, f"Found. Redirecting to {location}".encode())

    # What several routes need

    def _commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _expanded(self, query: Mapping[str, list[str]]) -> set[str]:
        fields = {*query.get("expand", ())}
        if unknown := fields - describe.EXPANDABLE:
            raise Refused(400, f"This server cannot expand {', '.join(sorted(unknown))}")
        return fields

    def _page(self, request: Request, entries: list[Any], size: int) -> tuple[list[Any], dict[str, str]]:
        """One page of a list, and where the next one is."""
        cursor = request.query.get("cursor")
        start = int(base64.urlsafe_b64decode(cursor[0])) if cursor else 0
        end = start + size
        if end >= len(entries):
            return entries[start:], {}
        following = {**request.query, "cursor": [base64.urlsafe_b64encode(str(end).encode()).decode()]}
        address = f"{self.url}{request.target.partition('?')[0]}?{urlencode(following, doseq=True)}"
        return entries[start:end], {"Link": f'<{in_a_header(address)}>; rel="next"'}


def _head(repository: Repository) -> Commit | None:
    return repository.at("main")


def _matches(repository: Repository, query: Mapping[str, list[str]]) -> bool:
    author, search, gated = query.get("author"), query.get("search"), query.get("gated")
    return (
        (author is None or repository.id.split("/")[0] == author[0])
        and (search is None or search[0].lower() in repository.id.lower())
        and (gated is None or bool(repository.gated) == _is_true(query, "gated"))
        and set(query.get("filter", ())) <= set(repository.all_tags)
    )


def _is_true(query: Mapping[str, list[str]], name: str) -> bool:
    return query.get(name, ["false"])[0].lower() in ("true", "1")
