"""The exit codes and what they mean, gathered from the classes of `lorazip_core.base.errors`."""

from __future__ import annotations

from lorazip_core.base.errors import LorazipError

from .interrupt import INTERRUPTED

DONE, BUG = 0, 70


def exit_codes() -> dict[int, str]:
    """Meaning by code, ascending. Raises ValueError when two kinds of failure claim one code."""
    table = {DONE: "done", BUG: "a bug in lorazip", INTERRUPTED: "interrupted"}
    for kind in _kinds(LorazipError):
        if kind.exit_code in table:
            raise ValueError(f"{kind.__name__} claims exit code {kind.exit_code}: {table[kind.exit_code]}")
        table[kind.exit_code] = kind.meaning
    return dict(sorted(table.items()))


def markdown_table() -> str:
    """The table of docs/commands.md."""
    rows = [f"| {code} | {meaning} |" for code, meaning in exit_codes().items()]
    return "\n".join(["| exit | meaning |", "|---|---|", *rows])


def _kinds(base: type[LorazipError]) -> list[type[LorazipError]]:
    """Every class below ``base`` with an exit code of its own; the others share their parent's."""
    found = []
    for kind in base.__subclasses__():
        found += ([kind] if "exit_code" in vars(kind) else []) + _kinds(kind)
    return found
