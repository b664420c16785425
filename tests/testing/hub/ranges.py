"""The content of a file, or the part of it that a Range header asks for."""

from __future__ import annotations

import re

from .answers import Answer, Request
from .repository import File


def content(request: Request, file: File, served: tuple[str, str], headers: dict[str, str]) -> Answer:
    headers = {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", **headers}
    wanted = request.headers.get("Range")
    if wanted is None:
        return Answer(200, headers, file, served=served)
    span = _span(wanted, file.size)
    if span is None:
        return Answer(416, {**headers, "Content-Range": f"bytes */{file.size}"})
    start, end = span
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    return Answer(206, headers, file, start=start, length=end - start, served=served)


def _span(wanted: str, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last; None if there is no such part. Of several ranges, only the first."""
    match = re.match(r"bytes=(\d*)-(\d*)", wanted)
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    start, end = (int(first), int(last) + 1 if last else size) if first else (max(size - int(last), 0), size)
    end = min(end, size)
    return (start, end) if start < end else None
