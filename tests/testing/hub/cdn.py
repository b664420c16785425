"""The other origin: it sends the content of LFS files to whoever has a signed address, and to nobody else."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from .answers import Answer, Request
from .ranges import content
from .repository import File

SIGNATURE = "SIGNED-ADDRESS-THAT-NO-OUTPUT-MAY-SHOW"
"""In every signed address. Whoever has one can download, so it must not appear in messages, logs or files."""


class Cdn:
    """What has been given an address stays there, as on the real one: a push or a squash changes nothing."""

    def __init__(self) -> None:
        self.url = ""
        self._published: dict[tuple[str, str], tuple[tuple[str, str], File]] = {}

    def publish(self, repository: str, path: str, file: File) -> str:
        """The signed address. It shows repository and path, so that faults can be aimed at them."""
        target = f"/{repository}/{file.sha256}/{path}"
        self._published[target, self._signature(file)] = (repository, path), file
        query = urlencode({"Expires": "1999999999", "Signature": self._signature(file), "Key-Pair-Id": "TEST"})
        # Encoded as one segment: no "../" in a path may lead to another address.
        return f"{self.url}/{repository}/{file.sha256}/{quote(path, safe='')}?{query}"

    def answer(self, request: Request) -> Answer:
        signature = request.query.get("Signature", [""])[0]
        published = self._published.get((request.path, signature))
        if request.method not in ("GET", "HEAD") or published is None:
            refusal = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access denied</Message></Error>"
            return Answer(403, {"Content-Type": "application/xml"}, refusal)
        served, file = published
        return content(request, file, served, {"Content-Type": "application/octet-stream"})

    def _signature(self, file: File) -> str:
        return f"{SIGNATURE}-{file.sha256[:16]}"
