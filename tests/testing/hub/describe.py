"""The Hub's JSON about repositories, trees and collections, with the fields that the client reads."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .access import is_visible
from .repository import Catalogue, Collection, Commit, File, Repository

EXPANDABLE = {
    "author",
    "cardData",
    "config",
    "createdAt",
    "disabled",
    "downloads",
    "gated",
    "lastModified",
    "library_name",
    "likes",
    "pipeline_tag",
    "private",
    "sha",
    "siblings",
    "tags",
    "usedStorage",
}
IN_A_LIST = {"createdAt", "downloads", "library_name", "likes", "private", "tags"}
IN_A_FULL_LIST = IN_A_LIST | {"author", "gated", "lastModified", "sha", "siblings"}


def model(repository: Repository, commit: Commit | None, fields: set[str], *, blobs: bool = False) -> dict[str, Any]:
    """An entry of a list, or a model's page, at one commit (none: a repository without any)."""
    files = commit.files if commit else {}
    values: dict[str, Any] = {
        "author": repository.id.partition("/")[0] if "/" in repository.id else None,
        "cardData": repository.card_data or None,
        "config": _config(files.get("adapter_config.json")) if "config" in fields else None,
        "createdAt": "2024-01-01T00:00:00.000Z",
        "disabled": repository.disabled,
        "downloads": repository.downloads,
        "gated": repository.gated,
        "lastModified": repository.last_modified,
        "library_name": repository.card_data.get("library_name"),
        "likes": repository.likes,
        "pipeline_tag": repository.card_data.get("pipeline_tag"),
        "private": repository.private,
        "sha": commit.sha if commit else None,
        "siblings": [_sibling(path, file, blobs) for path, file in files.items()] if "siblings" in fields else None,
        "tags": repository.all_tags,
        "usedStorage": sum(file.size for file in files.values()),
    }
    described = {"_id": _id(repository.id), "id": repository.id, "modelId": repository.id}
    return described | {name: values[name] for name in sorted(fields) if values[name] is not None}


def _config(file: File | None) -> dict[str, Any] | None:
    """What the Hub makes of an adapter's configuration. It's a service of the Hub, and it forgives anything."""
    try:
        config = json.loads(file.read()) if file else None
    except ValueError:
        return None
    if not isinstance(config, dict):
        return None
    kept = ("base_model_name_or_path", "task_type")
    return {"peft": {name: config[name] for name in kept if name in config}}


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if blobs:
        sibling |= {"blobId": file.blob_id, "size": file.size}
        if file.is_lfs:
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return sibling


def tree(commit: Commit, folder: str, *, recursive: bool, expand: bool) -> list[dict[str, Any]] | None:
    """The entries of a folder, folders among them also if it's recursive; None if there is no such folder."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in commit.files.items():
        if not path.startswith(prefix):
            continue
        steps = path.removeprefix(prefix).split("/")
        for depth in range(1, len(steps) if recursive else min(len(steps), 2)):
            above = prefix + "/".join(steps[:depth])
            if above:
                entries.setdefault(above, _folder(commit, above, expand))
        if recursive or len(steps) == 1:
            entries[path] = _file(commit, path, file, expand)
    return list(entries.values()) if entries or not folder else None


def paths(commit: Commit, asked: list[str], *, expand: bool) -> list[dict[str, Any]]:
    """Entries of those paths that exist; the Hub passes over the others in silence."""
    entries = []
    for path in asked:
        if path in commit.files:
            entries.append(_file(commit, path, commit.files[path], expand))
        elif any(other.startswith(f"{path}/") for other in commit.files):
            entries.append(_folder(commit, path, expand))
    return entries


def _file(commit: Commit, path: str, file: File, expand: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": file.blob_id, "size": file.size, "path": path}
    if file.is_lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return entry | (_last_commit(commit) if expand else {})


def _folder(commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    oid = hashlib.sha1(f"tree {commit.sha} {path}".encode("utf-8", "surrogatepass")).hexdigest()
    entry = {"type": "directory", "oid": oid, "size": 0, "path": path}
    return entry | (_last_commit(commit) if expand else {})


def _last_commit(commit: Commit) -> dict[str, Any]:
    return {"lastCommit": {"id": commit.sha, "title": commit.message, "date": "2024-01-01T00:00:00.000Z"}}


def collection(of: Collection, user: str | None, catalogue: Catalogue) -> dict[str, Any]:
    """Without the models that the user may not see; an item that the catalogue doesn't know stays."""
    items: list[dict[str, Any]] = []
    for item in of.items:
        repository = catalogue.repositories.get(item.id) if item.type == "model" else None
        if repository is not None and not is_visible(repository, user):
            continue
        entry: dict[str, Any] = {"_id": _id(of.slug + item.id), "position": len(items), "type": item.type}
        entry |= {"id": item.id} if item.type != "collection" else {"id": _id(item.id), "slug": item.id}
        if item.note is not None:
            entry["note"] = {"text": item.note, "html": item.note}
        items.append(entry)
    return {
        "slug": of.slug,
        "title": of.title,
        "lastUpdated": "2024-01-01T00:00:00.000Z",
        "gating": False,
        "owner": {"name": of.slug.partition("/")[0], "type": "org"},
        "items": items,
        "theme": "green",
        "private": of.private,
        "upvotes": 0,
        "position": 0,
    }


def _id(text: str) -> str:
    """24 hex digits, like the keys of the Hub's database."""
    return hashlib.sha1(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]
