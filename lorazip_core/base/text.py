"""Names and numbers as people read them."""

from __future__ import annotations

import re

# A parameter that a message names, as in «max_error»: no text of another library has these marks. Not within a longer
# word, a path or quotes: that is the name of a file.
PARAMETER = re.compile(r"""(?<![\w/'"])«([a-z_]+)»(?![\w/'"])""")


def unmarked(message: str) -> str:
    """A message as it is stored, for readers who know nothing of marks: parameters stand by their names alone."""
    return PARAMETER.sub(r"\1", message)


def plain(text: str) -> str:
    r"""``text`` on one line and harmless: control and format characters, which a file name may have, are escaped.

    Line breaks, escape sequences of a terminal and marks that turn the direction of writing all show as ``\x1b`` does.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "replace").decode() for char in text)


def printable(name: str) -> str:
    """A file name as text that can be written, also one whose bytes are no UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def megabytes(size: int) -> str:
    """Bytes in MB = 10⁶ bytes, small ones in bytes."""
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size:,} bytes"


def error(value: float | None) -> str:
    """A squared error; '-' where there is none."""
    return "-" if value is None else "0" if value == 0 else f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"


def saved(ratio: float | None) -> str:
    """The share of a size that is saved, below or beside the word; of one that has grown, by how much."""
    return "-" if ratio is None else f"{100 * ratio:.1f}%" if ratio >= 0 else f"{-100 * ratio:.1f}% larger"


def saving(ratio: float | None) -> str:
    """The same within a sentence."""
    return saved(ratio) if ratio is None or ratio < 0 else f"{saved(ratio)} saved"


def times(before: int, after: int) -> str:
    """How many times smaller ``after`` is, or how many times the size where it is larger."""
    if not (before and after):
        return "-"
    return f"{before / after:.1f} times smaller" if after <= before else f"{after / before:.2f} times the size"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
