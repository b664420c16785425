"""What stands for a value or a file: canonical JSON, SHA-256, and file names for any text."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from io import RawIOBase
from pathlib import Path
from typing import Any

from .filesystem import naming
from .stopping import check_stop

_CHUNK = 2**18  # bytes of a file that are hashed at a time


def canonical_json(value: Any) -> bytes:
    """The one byte string that stands for ``value``: sorted keys, no blanks, UTF-8, no NaN, a newline at the end."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8") + b"\n"


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with naming(path), path.open("rb", buffering=0) as file:
        return sha256_stream(file)


def sha256_stream(file: RawIOBase) -> str:
    """The digest of what is left in an unbuffered file, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    while count := file.readinto(buffer):
        check_stop()
        digest.update(buffer[:count])
    return digest.hexdigest()


def safe_name(name: str) -> str:
    """A file name for any adapter name: readable, portable, and distinct for distinct names.

    Names that differ only in case, Unicode form or characters that had to go get distinct digests.
    """
    readable = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    readable = re.sub(r"[^a-z0-9._-]+", "-", readable)[:80].strip("._-") or "adapter"
    return f"{readable}-{sha256_bytes(name.encode('utf-8', 'surrogatepass'))[:10]}"
