"""Who may see what, and what the Hub says to those who may not.

The Hub doesn't tell strangers whether a private repository exists: missing and private look the same, 401 without a
token and 404 with one. Of a gated repository everybody sees the metadata, and only its readers get files.
"""

from __future__ import annotations

from email.message import Message

from .answers import Refused
from .repository import Catalogue, Collection, Repository


def user_of(headers: Message, catalogue: Catalogue) -> str | None:
    """Who asks; None is anybody."""
    authorization = headers.get("Authorization")
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or token not in catalogue.tokens:
        raise Refused(401, "Invalid credentials in Authorization header")
    return catalogue.tokens[token]


def is_visible(thing: Repository | Collection, user: str | None) -> bool:
    return not thing.private or user in thing.readers


def readable(id: str, user: str | None, catalogue: Catalogue) -> Repository:
    """The repository whose metadata a user may see."""
    repository = catalogue.repositories.get(id)
    if repository is None or not is_visible(repository, user):
        if user is None:
            # Over https the Hub sends no code here: the client knows 401 by the address. Over http it needs the code.
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        raise Refused(404, "Repository not found", "RepoNotFound")
    if repository.disabled:
        raise Refused(403, "Access to this resource is disabled.")
    return repository


def check_files(repository: Repository, user: str | None) -> None:
    """Whether a user may have the files of a repository that they can see."""
    if not repository.gated or user in repository.readers:
        return
    restricted = f"Access to model {repository.id} is restricted"
    if user is None:
        raise Refused(
            401,
            f"{restricted}. You must have access to it and be authenticated to access it. Please log in.",
            "GatedRepo",
        )
    raise Refused(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")
